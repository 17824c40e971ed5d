"""How good a prediction is, judged on what was observed: from draws of the predictive distribution, torch only.

Draws come first: `samples` is `(draws, n, *event)`, drawn from each observation's predictive distribution, and `y`
is `(n, *event)`.  Where an observation is a vector, each of its numbers is judged on its own.  NaN in, NaN out.
All functions raise ValueError for shapes that do not fit together and where there is nothing to judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from varmeta._checks import probability


def log_density(log_probs: Tensor) -> Tensor:
    """log 1/S sum_s p(y_n | theta_s), the log density of the mixture over draws, `(n,)`, in nats.

    log_probs: log p(y_n | theta_s), `(draws, n)`.
    By Jensen it lies above the mean of `log_probs`; with few draws it is biased down, most for surprising observations.

    >>> log_density(torch.tensor([[0.5], [0.25]]).log()).exp()
    tensor([0.3750])
    """
    if log_probs.dim() != 2 or not len(log_probs):
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, expected (draws, n) with at least one draw")
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def rmse(prediction: Tensor, y: Tensor) -> Tensor:
    """Root mean square of prediction - y over everything, a scalar in y's units; both of one shape.

    >>> rmse(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 6.0])).square()
    tensor(12.5000)
    """
    if prediction.shape != y.shape or not y.numel():
        raise ValueError(f"prediction {tuple(prediction.shape)} and y {tuple(y.shape)} must share a shape, not empty")
    return (_floating(prediction) - y).square().mean().sqrt()


def crps_sample(samples: Tensor, y: Tensor, fair: bool = True) -> Tensor:
    """Continuous ranked probability score E|X - y| - 1/2 E|X - X'|, `(n, *event)`, in y's units; smaller is better.

    fair: average |X - X'| over pairs of different draws.  That is unbiased for the score of the distribution drawn
        from, whatever the number of draws (at least 2), and may be slightly negative; False scores the draws' empirical
        distribution itself, which favours many draws.

    Sorted, O(S log S).  With one draw and fair=False it is the absolute error.
    Source: Gneiting and Raftery 2007, section 4.2; fair: Ferro 2014.

    >>> crps_sample(torch.tensor([[0.0], [1.0]]), torch.tensor([0.0]), fair=False)
    tensor([0.2500])
    """
    samples, y = _matched(samples, y)
    draws = len(samples)
    if fair and draws < 2:
        raise ValueError("the fair score needs at least 2 draws: draw more, or set fair=False")
    error = samples - y  # about y rather than 0: the weighted sum below would cancel where y is far from 0
    rank = torch.arange(1, draws + 1, dtype=error.dtype, device=error.device).reshape(-1, *(1,) * y.dim())
    # sum over all pairs |x_i - x_j| = 2 sum_i (2 i - S - 1) x_(i)
    spread = ((2 * rank - draws - 1) * error.sort(0).values).sum(0)
    return error.abs().mean(0) - spread / (draws * (draws - 1 if fair else draws))


def interval_coverage(samples: Tensor, y: Tensor, level: float = 0.9) -> Tensor:
    """The share of observations inside the central interval of probability `level`, ends included; a scalar.

    The ends are the draws' quantiles (1 - level)/2 and (1 + level)/2, interpolated linearly as numpy does; S draws make
    the interval too narrow by about 2/S in probability.  Calibrated continuous predictions give `level`.

    >>> interval_coverage(torch.arange(101.0)[:, None].expand(101, 2), torch.tensor([5.0, 96.0]), level=0.9)
    tensor(0.5000)
    """
    level = probability("level", level)
    samples, y = _matched(samples, y)
    ordered = samples.sort(0).values
    inside = (quantile(ordered, (1 - level) / 2) <= y) & (y <= quantile(ordered, (1 + level) / 2))
    # NaN is sorted last, and compares as False, which would pass for a miss
    return torch.where(ordered[-1].isnan(), math.nan, inside.to(samples.dtype)).mean()


def pit(samples: Tensor, y: Tensor) -> Tensor:
    """Probability integral transform: where y falls among its draws, `(n, *event)`, between 0 and 1.

    (draws below y + half of the draws equal to y + 1/2) / (S + 1): uniform up to 1/S where predictions are calibrated
    and continuous.  For discrete y it is the mid-PIT, which has mean 1/2 but less spread than a uniform number.

    >>> pit(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.5]))
    tensor([0.6250])
    """
    samples, y = _matched(samples, y)
    below = (samples < y).sum(0).to(samples.dtype) + 0.5 * (samples == y).sum(0)
    value = (below + 0.5) / (len(samples) + 1)
    return torch.where(samples.isnan().any(0), math.nan, value)


def calibration_error(
    samples: Tensor,
    y: Tensor | None = None,
    levels: Sequence[float] | Tensor | None = None,
    kind: Literal["absolute", "rms"] = "absolute",
) -> Tensor:
    """Mean over levels p of |share of observations with PIT <= p, minus p|, a scalar between 0 and 1.

    samples: `(draws, n, *event)`; or, with y None, values of the predictive distribution function at the observations
        (`pit`, or an exact one), of any shape.
    levels: by default 20, evenly from 0.05 to 0.95.
    kind: "rms" takes the root mean square over levels.

    The levels are those of the distribution function, not of central intervals.  Perfect predictions do not score 0:
    with n independent observations the share has standard deviation sqrt(p (1 - p) / n), with dependent ones more.
    Source: Kuleshov, Fenner and Ermon 2018; in this form Rothfuss et al. 2021 (PACOH), whose published code takes the
    absolute mean for networks and the root mean square for Gaussian processes, per task and then averaged.

    >>> calibration_error(torch.tensor([0.1, 0.4, 0.8]), levels=[0.5])
    tensor(0.1667)
    """
    if kind not in ("absolute", "rms"):
        raise ValueError(f"kind is {kind!r}, expected 'absolute' or 'rms'")
    values = (_floating(samples) if y is None else pit(samples, y)).reshape(-1)
    if not len(values):
        raise ValueError("there are no observations to judge: give at least one")
    if bool(((values < 0) | (values > 1)).any()):
        raise ValueError(
            "without y, expected PIT values between 0 and 1; for draws give y too: calibration_error(draws, y)"
        )
    at = torch.as_tensor(torch.linspace(0.05, 0.95, 20, dtype=torch.float64) if levels is None else levels).to(values)
    if at.dim() != 1 or not len(at) or bool(((at < 0) | (at > 1)).any()):
        raise ValueError(f"levels must be probabilities, e.g. [0.1, 0.5, 0.9], not {levels}")
    share = torch.searchsorted(values.sort().values, at, right=True).to(values.dtype) / len(values)
    gap = (share - at).abs()
    error = gap.mean() if kind == "absolute" else gap.square().mean().sqrt()
    return torch.where(values.isnan().any(), math.nan, error)


def error_rate(probs: Tensor, y: Tensor) -> Tensor:
    """The share of observations whose most probable class is not y, a scalar; among equals the first class counts.

    probs: `(n, classes)`, nonnegative, rows sum to 1.
    y: classes 0, ..., C-1, `(n,)`.

    >>> error_rate(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
    tensor(0.5000)
    """
    probs, y = _classes(probs, y)
    wrong = (probs.argmax(-1) != y).to(probs.dtype)
    return torch.where(probs.isnan().any(), math.nan, wrong.mean())


def expected_calibration_error(probs: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Mean over observations of |accuracy - confidence| of their bin, a scalar between 0 and 1.

    Confidence is the probability of the most probable class; bins ((b-1)/B, b/B] are of equal width.  Like
    `calibration_error` it is biased up where there are few observations in a bin.
    probs, y: as for `error_rate`.
    Source: Naeini et al. 2015; Guo et al. 2017 (15 bins).

    >>> expected_calibration_error(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0]))
    tensor(0.2500)
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}, expected 1 or more")
    probs, y = _classes(probs, y)
    confidence, best = probs.max(-1)
    if bool(confidence.isnan().any()):
        return confidence.new_tensor(math.nan)
    index = ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    # |sum in the bin of (correct - confidence)| / n is |accuracy - confidence| times the bin's share
    gap = confidence.new_zeros(num_bins).index_add(0, index, (best == y).to(confidence.dtype) - confidence)
    return gap.abs().sum() / len(y)


def log_density_se(log_probs: Tensor) -> float:
    """Monte-Carlo standard error of the mean over n of `log_density(log_probs)`; log_probs `(draws, n)`.

    By the delta method; NaN for a single draw.  Too small where few draws carry the mean.

    >>> round(log_density_se(torch.tensor([[0.5], [1.5]]).log()), 3)
    0.5
    """
    relative = (log_probs - log_density(log_probs)).exp().mean(1)  # draws serve all observations at once
    return float(relative.std() / math.sqrt(len(relative))) if len(relative) > 1 else math.nan


def numbers(
    log_probs: Tensor, samples: Tensor, y: Tensor, level: float = 0.9, mean: Tensor | None = None, point: bool = False
) -> dict[str, float]:
    """The table's row for numeric responses; log_probs `(draws, n)`, in nats per observation averaged over n.

    mean: the predictive mean, of y's shape; None: that of the samples, which has noise^2 / draws more in its square error.
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


def normal(mean: Tensor, sd: Tensor, y: Tensor, level: float = 0.9) -> dict[str, float]:
    """The same row where the predictive distribution of y `(n,)` is N(mean, sd^2), exactly.

    CRPS: sd (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)) with z = (y - mean) / sd (Gneiting and Raftery 2007).

    >>> row = normal(torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([3.0]))
    >>> row["rmse"], row["coverage"], round(row["crps"], 3)
    (3.0, 1.0, 1.989)
    """
    if not len(y):
        raise ValueError("there is nothing to judge: give an observation")
    level = probability("level", level)
    z = (y - mean) / sd
    below = torch.special.ndtr(z)
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    inside = ((1 - level) / 2 <= below) & (below <= (1 + level) / 2)
    crps = sd * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return {
        "n": len(y),
        "log_density": float((-0.5 * z.square() - sd.log() - 0.5 * math.log(2 * math.pi)).mean()),
        "rmse": float(rmse(mean, y)),
        "coverage": float(torch.where(below.isnan(), math.nan, inside.to(y.dtype)).mean()),
        "calibration_error": float(calibration_error(below)),
        "crps": float(crps.mean()),
        "log_density_se": 0.0,
    }


def classes(log_probs: Tensor, probs: Tensor, y: Tensor, level: float = 0.9, point: bool = False) -> dict[str, float]:
    """The table's row for classes; probs `(draws, n, classes)` are averaged over draws, `level` is not used; point as above."""
    predictive = probs.mean(0)
    return {
        "n": len(y),
        "log_density": float(log_density(log_probs).mean()),
        "error_rate": float(error_rate(predictive, y)),
        "calibration_error": float(expected_calibration_error(predictive, y)),
        "log_density_se": 0.0 if point else log_density_se(log_probs),
    }


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.double()


def _matched(samples: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if samples.shape[1:] != y.shape or samples.dim() != y.dim() + 1:
        raise ValueError(
            f"samples has shape {tuple(samples.shape)} and y {tuple(y.shape)}: expected (draws, *y.shape), draws first"
        )
    if not samples.numel():
        raise ValueError(
            f"there is nothing to judge: samples has shape {tuple(samples.shape)}; give a draw and a point"
        )
    samples = _floating(samples)
    return samples, y.to(samples)


def _classes(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if probs.dim() != 2 or probs.shape[:1] != y.shape or not probs.numel():
        raise ValueError(f"probs {tuple(probs.shape)} and y {tuple(y.shape)}: expected (n, classes) and (n,), n >= 1")
    if bool(((y < 0) | (y >= probs.shape[1]) | (y != y.floor())).any()):
        raise ValueError(f"y must hold classes 0, ..., {probs.shape[1] - 1}, but goes from {y.min()} to {y.max()}")
    return _floating(probs), y.long()


def quantile(ordered: Tensor, probability: float) -> Tensor:
    """Of draws sorted along the first axis; torch.quantile refuses more than 16 million numbers."""
    position = probability * (len(ordered) - 1)
    below = min(math.floor(position), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
