"""How good a prediction is, judged on what was observed: from draws, torch only.

The draws are of the predictive distribution.

Draws come first: `samples` is `(draws, n, *event)`, drawn from each observation's predictive
distribution, and `y` is `(n, *event)`.  Where an observation is a vector, each of its numbers is
judged on its own.  NaN in, NaN out. All functions raise ValueError for shapes that do not fit
together and where there is nothing to judge.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta._checks import probability
from varmeta.numerics import normals
from varmeta.posteriors.calibration import (
    _classes,
    _floating,
    _matched,
    calibration_error,
    default_levels,
    expected_calibration_error,
    interval_coverage,
)


def log_density(log_probs: Tensor) -> Tensor:
    """log 1/S sum_s p(y_n | theta_s), the log density of the mixture over draws, `(n,)`, in nats.

    log_probs: log p(y_n | theta_s), `(draws, n)`. By Jensen it lies above the mean of `log_probs`;
    with few draws it is biased down, most for surprising observations.

    >>> log_density(torch.tensor([[0.5], [0.25]]).log()).exp()
    tensor([0.3750])
    """
    if log_probs.dim() != 2 or not len(log_probs):
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)}, expected (draws, n) with at least one "
            "draw"
        )
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def rmse(prediction: Tensor, y: Tensor) -> Tensor:
    """Root mean square of prediction - y over everything, a scalar in y's units; both of one shape.

    >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])).square()
    tensor(12.5000)
    """
    if prediction.shape != y.shape or not y.numel():
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and y {tuple(y.shape)} must share a shape, not "
            "empty"
        )
    return (_floating(prediction) - y).square().mean().sqrt()


def crps_sample(samples: Tensor, y: Tensor, fair: bool = True) -> Tensor:
    """Continuous ranked probability score E|X - y| - 1/2 E|X - X'|, `(n, *event)`, in y's units.

    Smaller is better.

    fair: average |X - X'| over pairs of different draws.  That is unbiased for the score of the
        distribution drawn from, whatever the number of draws (at least 2), and may be slightly
        negative; False scores the draws' empirical distribution itself, which favours many draws.

    Sorted, O(S log S).  With one draw and fair=False it is the absolute error.
    Source: Gneiting and Raftery 2007, section 4.2; fair: Ferro 2014.

    >>> crps_sample(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0]), fair=False)
    tensor([0.2500])
    """
    samples, y = _matched(samples, y)
    draws = len(samples)
    if fair and draws < 2:
        raise ValueError("the fair score needs at least 2 draws: draw more, or set fair=False")
    error = (
        samples - y
    )  # about y rather than 0: the weighted sum below would cancel where y is far from 0
    rank = torch.arange(1, draws + 1, dtype=error.dtype, device=error.device).reshape(
        -1, *(1,) * y.dim()
    )
    # sum over all pairs |x_i - x_j| = 2 sum_i (2 i - S - 1) x_(i)
    spread = ((2 * rank - draws - 1) * error.sort(0).values).sum(0)
    return error.abs().mean(0) - spread / (draws * (draws - 1 if fair else draws))


def error_rate(probs: Tensor, y: Tensor) -> Tensor:
    """The share of observations whose most probable class is not y, a scalar.

    Among equals the first class counts.

    probs: `(n, classes)`, nonnegative, rows sum to 1.
    y: classes 0, ..., C-1, `(n,)`.

    >>> error_rate(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
    tensor(0.5000)
    """
    probs, y = _classes(probs, y)
    wrong = (probs.argmax(-1) != y).to(probs.dtype)
    return torch.where(probs.isnan().any(), math.nan, wrong.mean())


def log_density_se(log_probs: Tensor) -> float:
    """Monte-Carlo standard error of the mean over n of `log_density(log_probs)`.

    log_probs `(draws, n)`.

    By the delta method; NaN for a single draw.  Too small where few draws carry the mean.

    >>> round(log_density_se(torch.tensor([[0.5], [1.5]]).log()), 3)
    0.5
    """
    relative = (
        (log_probs - log_density(log_probs)).exp().mean(1)
    )  # draws serve all observations at once
    return float(relative.std() / math.sqrt(len(relative))) if len(relative) > 1 else math.nan


def numbers(
    log_probs: Tensor,
    samples: Tensor,
    y: Tensor,
    level: float = 0.9,
    mean: Tensor | None = None,
    point: bool = False,
) -> dict[str, float]:
    """The table's row for numeric responses.

    log_probs `(draws, n)`, in nats per observation averaged over n.

    mean: the predictive mean, of y's shape; None: that of the samples, which has noise^2 / draws
        more in its square error.
    point: the weights are known, so that a single row of log_probs has no Monte-Carlo error.
    """
    _matched(samples, y)
    return {
        "n": len(y),
        "log_density": float(log_density(log_probs).mean()),
        "rmse": float(rmse(_floating(samples).mean(0) if mean is None else mean, y)),
        "coverage": float(interval_coverage(samples, y, level)),
        "calibration_error": float(calibration_error(samples, y)),
        "crps": float(crps_sample(samples, y, fair=len(samples) > 1).mean()),
        "log_density_se": 0.0 if point else log_density_se(log_probs),
    }


def normal(mean: Tensor, covariance: Tensor, y: Tensor, level: float = 0.9) -> dict[str, float]:
    """The same row where the predictive distribution of y `(n, k)` is N(mean, covariance), exactly.

    mean `(n, k)`, covariance `(n, k, k)`: the log density is that of the k numbers together, and
        all else is about each of them.
    CRPS: sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = (y - mean) / sd (Gneiting and
        Raftery 2007).

    >>> row = normal(torch.tensor([[0.0]]), torch.tensor([[[4.0]]]), torch.tensor([[3.0]]))
    >>> row["rmse"], row["coverage"], round(row["crps"], 3)
    (3.0, 1.0, 1.989)
    """
    if not len(y):
        raise ValueError("there is nothing to judge: give an observation")
    found = _normal(mean, covariance, y, probability("level", level))
    return {
        "n": len(y),
        "log_density": float(found.log_density.mean()),
        "rmse": float(found.square.mean().sqrt()),
        "coverage": float(found.inside.mean()),
        "calibration_error": float(calibration_error(found.below.reshape(-1))),
        "crps": float(found.crps.mean()),
        "log_density_se": 0.0,
    }


def normal_by_task(
    mean: Tensor, covariance: Tensor, y: Tensor, counts: Tensor, level: float = 0.9
) -> dict[str, Tensor]:
    """`normal` of every task that has observations, each a column of the table.

    counts: how many of the observations are each task's, in order, int64 `(tasks,)`.

    >>> y, one = torch.zeros(3, 1), torch.ones(3, 1, 1)
    >>> normal_by_task(torch.tensor([[1.0], [3.0], [4.0]]), one, y, torch.tensor([1, 0, 2]))["rmse"]
    tensor([1.0000, 3.5355], dtype=torch.float64)
    """
    counts = counts[counts > 0]
    owner = torch.repeat_interleave(counts)

    def mean_of(values: Tensor) -> Tensor:
        each = values.reshape(len(values), -1).mean(1)
        return each.new_zeros(len(counts)).index_add_(0, owner, each) / counts

    found = _normal(mean, covariance, y, probability("level", level))
    # NaN is below no level, and shows by `inside`
    gaps = [(mean_of((found.below <= p).double()) - p).abs() for p in default_levels().to(y.device)]
    coverage = mean_of(found.inside)
    return {
        "n": counts,
        "log_density": mean_of(found.log_density),
        "rmse": mean_of(found.square).sqrt(),
        "coverage": coverage,
        "calibration_error": torch.where(coverage.isnan(), math.nan, sum(gaps) / len(gaps)),
        "crps": mean_of(found.crps),
        "log_density_se": torch.zeros_like(coverage),
    }


class _Judged(NamedTuple):
    """Of n observations: log densities `(n,)`, and of each of their numbers `(n, k)`.

    below: the distribution function at y.  inside: 1 in the central interval, 0 outside.
    """

    log_density: Tensor
    square: Tensor
    below: Tensor
    inside: Tensor
    crps: Tensor


def _normal(mean: Tensor, covariance: Tensor, y: Tensor, level: float) -> _Judged:
    mean, covariance, y = mean.double(), covariance.double(), y.double()
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    z = (y - mean) / sd
    below = torch.special.ndtr(z)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    inside = ((1 - level) / 2 <= below) & (below <= (1 + level) / 2)
    return _Judged(
        normals.log_density(mean, covariance, y),
        (mean - y).square(),
        below,
        torch.where(below.isnan(), math.nan, inside.to(y.dtype)),
        sd * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi)),
    )


def classes(
    log_probs: Tensor, predictive: Tensor, y: Tensor, point: bool = False
) -> dict[str, float]:
    """The table's row for classes.

    predictive: their probabilities `(n, classes)`, averaged over the draws; point as above.
    """
    return {
        "n": len(y),
        "log_density": float(log_density(log_probs).mean()),
        "error_rate": float(error_rate(predictive, y)),
        "calibration_error": float(expected_calibration_error(predictive, y)),
        "log_density_se": 0.0 if point else log_density_se(log_probs),
    }
