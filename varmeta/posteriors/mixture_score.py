"""The score of predictions that are mixtures of normals over draws of eta, exact given these."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from varmeta.models.model import TaskModel
from varmeta.numerics import normals
from varmeta.numerics.normals import absolute
from varmeta.posteriors.calibration import calibration_error
from varmeta.posteriors.metrics import rmse
from varmeta.posteriors.normal_mixture import Components, in_order, predictive, responses
from varmeta.tasks import Data

# For the distance of two observations of a mixture, up to so many components are paired with all
# others, as an ensemble's members are; more, as draws of eta are, each with a few: thousands of
# pairs either way.
ALL_PAIRS, PAIRS = 64, 4


def row_of(
    model: TaskModel, components: Components, data: Data, level: float
) -> Callable[[slice], dict[str, float]]:
    """The function from some observations to the table's row of them, as in `scoring.py`.

    log_density_se: Monte-Carlo, over the draws of eta; 0 of an ensemble, whose members are all.
    """
    y, share = responses(model, data).double(), components.share.double()
    rows, parts = [], []
    for at, mean, covariance in predictive(model, components, data, has_y=True):
        rows.append(at)
        parts.append(_judged(share, mean, covariance, y[at]))
    log_prob, *rest = zip(*parts, strict=True)
    log_probs = in_order(rows, log_prob, 1)
    centre, share_below, crps = (in_order(rows, part, 0) for part in rest)
    low, high, draws = (1 - level) / 2, (1 + level) / 2, components.draws

    def row(chosen: slice) -> dict[str, float]:
        under = share_below[chosen]
        inside = torch.where(under.isnan(), math.nan, ((low <= under) & (under <= high)).double())
        each = log_probs[:, chosen]
        density = (share.log()[:, None] + each).logsumexp(0)
        # a draw serves all observations at once
        relative = (each - density).exp().mean(1)
        spread = (share * (relative - 1).square()).sum()
        return {
            "n": len(under),
            "log_density": float(density.mean()),
            "rmse": float(rmse(centre[chosen], y[chosen])),
            "coverage": float(inside.mean()),
            "calibration_error": float(calibration_error(under.reshape(-1))),
            "crps": float(crps[chosen].mean()),
            "log_density_se": float((spread / draws).sqrt()) if draws else 0.0,
        }

    return row


def _judged(
    share: Tensor, mean: Tensor, covariance: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of n observations: log densities `(K, n)`, and three `(n, outputs)`.

    Those are the mixture's mean, its distribution function at y and its CRPS.  In float64: of
    float32 a covariance of responses that go together has lost its digits.
    """
    share, mean, covariance, y = (x.double() for x in (share, mean, covariance, y))
    log_prob = normals.log_density(mean, covariance, y)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    distance = torch.tensordot(share, absolute(y - mean, variance), 1)
    below = torch.tensordot(share, torch.special.ndtr((y - mean) / variance.sqrt()), 1)
    centre = torch.tensordot(share, mean, 1)
    return log_prob, centre, below, distance - 0.5 * _between(share, mean, variance)


def _between(share: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """E|X - X'| of two observations: over all pairs of components, or a sample of the others.

    Two of the same component, which happens as often as its share squared, are taken exactly.
    """
    number = len(share)
    own = share.square()
    total: Tensor = torch.tensordot(own, absolute(torch.zeros_like(mean), 2 * variance), 1)
    if number == 1:
        return total
    # the golden ratio's multiples: no two shifts alike, none a half, where mirror images stand
    some = (1 + int((number - 1) * (k * 0.6180339887 % 1.0)) for k in range(PAIRS))
    found, weight = torch.zeros_like(total), 0.0
    for shift in range(1, number) if number <= ALL_PAIRS else some:
        pair = share * share.roll(shift)
        apart = absolute(mean - mean.roll(shift, 0), variance + variance.roll(shift, 0))
        found = found + torch.tensordot(pair, apart, 1)
        weight = weight + float(pair.sum())
    # of all pairs the weight is what the own ones leave
    return total + found * ((1.0 - float(own.sum())) / weight) if weight else total
