"""What a finished fit should make its user doubt, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta.fitting import profiled_at_eta
from varmeta.fitting.convergence import risen
from varmeta.fitting.joint_newton import UNDETERMINED
from varmeta.fitting.pooled_start import NO_INFORMATION, is_regression, pooled_fit
from varmeta.fitting.whitened import whitened_correlation
from varmeta.likelihoods.base import SCALE
from varmeta.likelihoods.discrete import CONCENTRATION
from varmeta.priors.factors import FACTOR, PRECISION, TRIL
from varmeta.results.constant_columns import constant_columns, in_words
from varmeta.results.excess_noise import spread, unexplained
from varmeta.results.far_from_evidence import far_from_evidence, rough_quadrature
from varmeta.results.heywood import has_one_factor, heywood
from varmeta.results.result import Fit, profiled_of
from varmeta.results.separation import separated

if TYPE_CHECKING:
    from varmeta.models.hyper_posterior import HyperPosterior

# A weight whose prior precision exceeds what the best-informed task knows about it by this factor
# no longer varies.
RUNAWAY = 500.0
# One that is this many times weaker than what that task knows shares nothing.
LOST = 1e7
# A learned correlation matrix with an eigenvalue below this is singular (of two weights: a
# correlation of 0.9999).
SINGULAR = 1e-4
# A weight of a program that exceeds all numbers in the data by this factor has run off.
FAR = 1e5
# Counts whose variance exceeds their mean by less than this share are Poisson's.
OVERDISPERSED = 1e-3
# A weight takes part in a direction by at least this.
TAKES_PART = 0.1
# So many weights are named in a sentence.
FEW = 6


def doubts(fit: Fit, own_end: bool = False) -> list[str]:
    """Sentences to warn with, every one that holds.

    own_end: the user chose where the run ends, so that it may do so before convergence.
    """
    unfinished = not fit.converged and not own_end
    is_flat = unfinished or bool(fit.run.undetermined)
    constant = constant_columns(fit) if is_flat and fit.run.streamed is None else {}
    found = [in_words(constant)] if constant else []
    found += [f"the fit has not converged: {fit.stop}"] if unfinished else []
    # a stream's losses are each of other tasks
    by_steps = fit.run.schedule is not None and fit.run.streamed is None
    if by_steps and not unfinished and risen(fit.run.history, len(fit.tasks)):
        found.append(f"the fit diverges: {fit.stop}")
    away = _ran_off(fit)
    found += [away] if away else []
    if fit.hyper is not None and not fit.hyper.is_reliable:
        found.append(_few_draws(fit.hyper))
    separation = _separation(fit)
    # what is said below is of one eta
    if fit.members is not None or (fit.hyper is not None and fit.hyper.hyperguide != "reml"):
        return [*found, *([separation] if separation else [])]
    # a covariance that loses rank is a narrow, curved valley; precisions that are still on their
    # way are not judged
    spread = (
        [_one_task(fit)]
        if _one_task(fit)
        else [None if unfinished else _runaways(fit), _singular(fit)]
    )
    spread.append(heywood(fit) if fit.model.prior.learn_precision == "low_rank" else None)
    noise, counts = None if unfinished else _vanishing_noise(fit), _no_overdispersion(fit)
    far = far_from_evidence(fit) or rough_quadrature(fit) if fit.converged else None
    found += [
        sentence
        for sentence in (*spread, noise, counts, separation, far, unexplained(fit))
        if sentence
    ]
    explained = {
        name
        for name in fit.eta
        if (any(spread) and name.partition(".")[0] in (PRECISION, TRIL, FACTOR))
        or (name == FACTOR and not has_one_factor(fit))
        or (noise and name == SCALE)
        or (counts and name == CONCENTRATION)
        or (separation and name in fit.model.start)
    }
    return found + ([] if constant else _undetermined(fit, explained))


def is_singular(fit: Fit) -> bool:
    """Whether a learned sd has run to 0 (or to infinity), or the covariance has lost a direction.

    The estimates then lie on the edge of what they may be.
    """
    return bool(_runaways(fit) or _singular(fit))


def _ran_off(fit: Fit) -> str | None:
    """The weights of a program that lie far beyond all numbers in the data: its curve is the same
    from there on.
    """
    if fit.model.net is not None:
        return None
    data, sizes = fit.tasks.batch().support, [1.0]
    for rows in data.flat():
        if rows.is_floating_point() and len(rows):
            sizes += rows.abs().reshape(len(rows), -1).amax(0).tolist()
    # a coefficient has y's unit over x's
    least = min((size for size in sizes if size > 0.0), default=1.0)
    size, away = max(sizes) / min(least, 1.0), []
    for name in (*fit.model.weights.names, *fit.model.shared):
        if name not in fit.eta or not fit.eta[name].numel():
            continue
        value = fit.eta[name].detach().reshape(-1)
        largest, begun = (
            float(value[value.abs().argmax()]),
            float(fit.model.start[name].abs().max()),
        )
        if abs(largest) > FAR * max(size, begun):
            away.append(f"{name} = {largest:.4g}")
    if not away:
        return None
    named = ", ".join(away[:FEW]) + (f" and {len(away) - FEW} more" if len(away) > FEW else "")
    return (
        f"{named} ran off, far beyond any number in the data, where the program's curve hardly "
        "changes any more: the estimates mean nothing.  Start nearer, by tensors in params or "
        "GaussianPrior(loc=...)"
    )


def _undetermined(fit: Fit, explained: set[str]) -> list[str]:
    """What Newton's method found no curvature for, unless another sentence says why."""
    names = [name for name in fit.run.undetermined if name not in explained]
    if not fit.converged or not names:
        return []
    return [
        f"{UNDETERMINED} {' and '.join(names)} apart: the estimates of each rest on the others.  "
        "For a predictor far from 0, centre it; else leave one out, or give more rows per task"
    ]


def _separation(fit: Fit) -> str | None:
    """Coefficients that run to infinity, since the likelihood has no maximum."""
    found = separated(fit)
    if not found:
        return None
    where = ", ".join(f"{label} = {value:.4g}" for label, value in list(found.items())[:FEW])
    where += f" and {len(found) - FEW} more" if len(found) > FEW else ""
    return (
        f"the likelihood has no maximum: it rises for ever as {where} "
        f"grow{'s' * (len(found) == 1)} in size, since the outcomes are separated (on one side of "
        "some combination of the predictors y is always the same).  The search stopped on the way: "
        "its estimates and their standard errors mean nothing.  Give "
        "GaussianPrior(loc_hyperprior={name: pyro.distributions.Normal(0., 2.5)}), leave the "
        "predictor out, or join categories"
    )


def _few_draws(hyper: HyperPosterior) -> str:
    return (
        f"only {hyper.ess:.0f} draws of eta carry weight (k-hat {hyper.pareto_k:.2f}): its "
        "posterior is far from Gaussian, and what is said of it is rough.  Give hyperpriors that "
        "rule out the implausible, or use hyperguide='multivariate_normal'"
    )


def _one_task(fit: Fit) -> str | None:
    prior = fit.model.prior
    if len(fit.tasks) > 1 or prior.learn_precision is None or prior.has_hyperprior:
        return None
    return (
        f"there is one task, {fit.tasks[0].name!r}, from which nothing can be learned of how tasks "
        "differ: the prior's precision is arbitrary.  Check the column that says which task a row "
        "belongs to, or give a precision, with learn_precision=None"
    )


def _runaways(fit: Fit) -> str | None:
    """Learned precisions that run away: weights that no longer vary between tasks, or share
    nothing.
    """
    prior = fit.model.prior
    if prior.learn_precision is None:
        return None
    labels, precision = fit.prior.labels, fit.model.weights.flatten(fit.prior.precision)
    information = _information(fit, precision)
    if prior.learn_precision in ("shared", "per_module"):
        # weights under one number run away together or not at all: what is known best of any of
        # them decides
        weights = fit.model.weights
        owners = [
            "" if prior.learn_precision == "shared" else weights.module(name)
            for name in weights.names
        ]
        owner = np.repeat(owners, weights.sizes)
        for one in set(owners):
            rows = torch.from_numpy(owner == one).to(information.device)
            information[rows] = information[rows].max()
    guide = fit.problem.guide
    exact = guide.is_any_gaussian(fit.model.weights.size)
    away = precision > RUNAWAY * information
    if bool(away.any()):
        ways = [
            "centre the predictors",
            # what finds the mode of a task knows its correlations too
            *([] if exact or guide.at_mode else ["use guide='multivariate_normal'"]),
            "give a hyperprior",
        ]
        return (
            f"the prior precision of {_names(labels, away)} runs away, so the fit pools the tasks "
            f"completely there.  That may be the best-fitting value; if not: {', or '.join(ways)}"
        )
    lost = precision < information / LOST
    # where posteriors keep their width a small one is that of rows that are nearly exact
    if bool(lost.any()) and not (exact and fit.strategy.outer == "elbo"):
        return (
            f"the prior precision of {_names(labels, lost)} runs to zero, so that the tasks share "
            "nothing there: fix it (learn_precision=None), give a hyperprior, or learn it under a "
            "Gaussian guide"
        )
    return None


def _singular(fit: Fit) -> str | None:
    """A learned covariance that has lost a direction: some weights are the same combination of
    others in every task.
    """
    if fit.model.prior.learn_precision != "full" or fit.model.weights.size < 2:
        return None
    if fit.model.net is not None and not fit.model.all_linear:
        return None  # features of a network are many and alike: it says nothing of the tasks
    correlation = fit.prior.correlation.double()
    # a predictor far from 0 correlates intercept and slope in any fit: judged in columns that are
    # centred and told apart
    judged = _judged(fit)
    judged = correlation if judged is None else judged
    finite = bool(correlation.isfinite().all() and judged.isfinite().all())
    if not finite or float(torch.linalg.eigvalsh(judged)[0]) > SINGULAR:
        return None
    values, vectors = torch.linalg.eigh(correlation)
    # the direction in which tasks do not differ, in units of the weights' prior sds
    direction = vectors[:, 0]
    parts = [
        i
        for i in direction.abs().argsort(descending=True).tolist()
        if abs(float(direction[i])) > TAKES_PART
    ]
    labels = fit.prior.labels
    if len(parts) == 2:
        row, column = sorted(parts)
        what = (
            f"correlation of {labels[row]} and {labels[column]} is "
            f"{float(correlation[row, column]):.4f}"
        )
    else:
        parts = sorted(parts[:FEW])
        sum_of = " ".join(f"{float(direction[i]):+.2f} {labels[i]}" for i in parts)
        what = (
            f"correlations leave the combination {sum_of} (each in units of its prior sd) a "
            f"variance of {max(0.0, float(values[0])):.1e}, where independent weights have 1"
        )
    return (
        f"the fit is singular: the prior's {what}, so that it has fewer directions than weights.  "
        "That may be the best-fitting value where tasks are few; if not: centre the predictors, "
        "let fewer weights vary (shared=), or give GaussianPrior(lkj=2)"
    )


def _judged(fit: Fit) -> Tensor | None:
    """The correlations in whitened columns, where there are any."""
    exact = profiled_of(fit)
    if exact is not None:
        return profiled_at_eta.correlation(exact, fit.eta)
    return whitened_correlation(fit.problem, fit.tasks.batch(), fit.eta)


def _information(fit: Fit, precision: Tensor) -> Tensor:
    """What the best-informed task's data say about each weight, as a precision `(D,)`."""
    tiny = torch.finfo(precision.dtype).tiny  # in any units of the weights
    exact = profiled_of(fit)
    if exact is not None:
        return profiled_at_eta.information(exact, fit.eta).to(precision).clamp_min(tiny)
    known = fit.run.state.phi is not None or fit.strategy.traits(fit.problem).closed_form
    if known and not fit.is_point and fit.run.hyper is None:
        spread = fit.posterior().distribution.stddev.squeeze(-2)  # (tasks, D)
        return (spread**-2 - precision).max(0).values.clamp_min(tiny)
    # points have no width: one observation's information at the pooled fit, times the most that a
    # task has
    batch = fit.tasks.batch()
    if is_regression(fit.model, fit.tasks, fit.eta):
        found = pooled_fit(fit.model, batch, fit.model.init(precision))
        if found is not None and bool((found[1].diagonal() > NO_INFORMATION).all()):
            return (found[1].diagonal() * batch.support.num_points.max()).clamp_min(tiny)
    # of a network nothing is known beforehand but where it started
    return (
        fit.model.prior.log_precision(fit.model.weights, fit.model.init(precision), precision).exp()
        * 1e6
        / RUNAWAY
    )


def _names(labels: tuple[str, ...], chosen: Tensor) -> str:
    named = [label for label, yes in zip(labels, chosen.tolist(), strict=True) if yes]
    return ", ".join(named[:FEW]) + (
        f" and {len(named) - FEW} weights more" if len(named) > FEW else ""
    )


def _vanishing_noise(fit: Fit) -> str | None:
    """A learned noise scale far below all that y varies by, wherever its origin is."""
    scale, y = fit.prior.scale, fit.tasks.support_rows.y
    if scale is None or not y.is_floating_point() or not len(y):
        return None
    y = y if fit.model.likelihood is None else fit.model.likelihood.observed(y)
    size = spread(y) or float(y.abs().max())
    if float(scale) > 1e-8 * size:
        return None
    return (
        f"the noise scale runs to zero ({float(scale):.1e}): the weights fit every row exactly, as "
        "where a task has no more rows than weights, or y does not vary.  Fix it with "
        "learn_scale=False, or give more rows"
    )


def _no_overdispersion(fit: Fit) -> str | None:
    """A negative binomial whose concentration runs to infinity."""
    if CONCENTRATION not in fit.eta or fit.model.likelihood is None:
        return None
    concentration, y = float(fit.eta[CONCENTRATION].exp()), fit.tasks.support_rows.y
    counts = fit.model.likelihood.observed(y).double()
    # the mean of a count, weighted by how much it has to say of the variance
    if (
        not bool(counts.any())
        or float(counts.square().sum() / counts.sum()) > OVERDISPERSED * concentration
    ):
        return None
    return (
        f"the concentration runs to infinity ({concentration:.1e}): the counts vary no more than "
        "Poisson's, so use likelihoods.Poisson()"
    )
