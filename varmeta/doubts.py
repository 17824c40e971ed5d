"""What a finished fit should make its user doubt, in sentences: not converged, running away, not determined, singular."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from varmeta.training import UNDETERMINED

if TYPE_CHECKING:
    from varmeta.result import Fit

# A weight whose prior precision exceeds what the best-informed task knows about it by this factor no longer varies.
RUNAWAY = 500.0


def doubts(fit: Fit, own_end: bool = False) -> list[str]:
    """Sentences to warn with.  own_end: the user chose where the run ends, so that it may do so before convergence."""
    if not fit.converged and not own_end:
        return [f"the fit has not converged: {fit.stop}"]
    found = [sentence for sentence in (_runaways(fit), _vanishing_noise(fit)) if sentence]
    if not found and UNDETERMINED in fit.stop:
        end = fit.stop[fit.stop.index(UNDETERMINED) :]
        found.append(
            f"{end}: the estimates of each rest on the others.  For a predictor far from 0, centre it; else leave one out, "
            "or give more rows per task"
        )
    return found


def _runaways(fit: Fit) -> str | None:
    """Learned precisions that run away: weights that no longer vary between tasks."""
    prior = fit.model.prior
    if prior.learn_precision is None:
        return None
    labels, precision = fit.prior.labels, fit.prior.covariance.diagonal().reciprocal()
    if fit.is_point or fit.run.state.phi is None:
        start = prior.log_precision(fit.model.weights, fit.model.init(precision), precision)
        away = precision.log() - start > math.log(1e6)
    else:
        spread = fit.posterior().distribution.stddev.squeeze(-2)  # (tasks, D)
        information = spread**-2 - precision
        away = precision > RUNAWAY * information.max(0).values.clamp_min(torch.finfo(precision.dtype).eps)
    if not bool(away.any()):
        return None
    names = ", ".join(label for label, gone in zip(labels, away.tolist(), strict=True) if gone)
    dense = fit.strategy.guide == "multivariate_normal"
    ways = ["centre the predictors", *([] if dense else ["use guide='multivariate_normal'"]), "give a hyperprior"]
    return (
        f"the prior precision of {names} runs away, so the fit pools the tasks completely there.  That may be the "
        f"best-fitting value; if not: {', or '.join(ways)}"
    )


def _vanishing_noise(fit: Fit) -> str | None:
    """A learned noise scale far below anything in the data."""
    scale, data = fit.prior.scale, fit.tasks.batch().support
    if scale is None or not data.y.is_floating_point() or not bool(data.mask.any()):
        return None
    size = data.y[data.mask].abs().max()
    if float(scale) > 1e-8 * float(size):
        return None
    return (
        f"the noise scale runs to zero ({float(scale):.1e}): the weights fit every row exactly, as where a task has no more "
        "rows than weights, or y does not vary.  Fix it with learn_scale=False, or give more rows"
    )
