"""Whether stated probabilities hold: those of intervals, of quantiles and of classes.

They are made to hold by `Validation(calibrate=True)`, in `fitting/validation.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from varmeta._checks import one_of, probability

ErrorKind = Literal["absolute", "rms"]
ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)


def interval_coverage(samples: Tensor, y: Tensor, level: float = 0.9) -> Tensor:
    """The share of observations inside the central interval of probability `level`, a scalar.

    Ends are included.

    The ends are the draws' quantiles (1 - level)/2 and (1 + level)/2, interpolated linearly as
    numpy does; S draws make the interval too narrow by about 2/S in probability.  Calibrated
    continuous predictions give `level`.

    >>> draws = torch.arange(101.0)[:, None].expand(101, 2)
    >>> interval_coverage(draws, torch.tensor([5.0, 96.0]), level=0.9)
    tensor(0.5000)
    """
    level = probability("level", level)
    samples, y = _matched(samples, y)
    ordered = samples.sort(0).values
    inside = (quantile(ordered, (1 - level) / 2) <= y) & (y <= quantile(ordered, (1 + level) / 2))
    # NaN is sorted last, and compares as False, which would pass for a miss
    return torch.where(ordered[-1].isnan(), math.nan, inside.to(samples.dtype)).mean()


def pit(samples: Tensor, y: Tensor) -> Tensor:
    """Probability integral transform: where y falls among its draws, `(n, *event)`, in [0, 1].

    (draws below y + half of the draws equal to y + 1/2) / (S + 1): uniform up to 1/S where
    predictions are calibrated and continuous.  For discrete y it is the mid-PIT, which has mean 1/2
    but less spread than a uniform number.

    >>> pit(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.5]))
    tensor([0.6250])
    """
    samples, y = _matched(samples, y)
    below = (samples < y).sum(0).to(samples.dtype) + 0.5 * (samples == y).sum(0)
    value = (below + 0.5) / (len(samples) + 1)
    return torch.where(samples.isnan().any(0), math.nan, value)


def default_levels() -> Tensor:
    """20 levels, evenly from 0.05 to 0.95."""
    return torch.linspace(0.05, 0.95, 20, dtype=torch.float64)


def calibration_error(
    samples: Tensor,
    y: Tensor | None = None,
    levels: Sequence[float] | Tensor | None = None,
    kind: ErrorKind = "absolute",
) -> Tensor:
    """Mean over levels p of |share of observations with PIT <= p, minus p|, a scalar in [0, 1].

    samples: `(draws, n, *event)`; or, with y None, values of the predictive distribution function
        at the observations (`pit`, or an exact one), of any shape.
    levels: by default 20, evenly from 0.05 to 0.95.
    kind: "rms" takes the root mean square over levels.

    The levels are those of the distribution function, not of central intervals.  Perfect
    predictions do not score 0: with n independent observations the share has standard deviation
    sqrt(p (1 - p) / n), with dependent ones more.
    Source: Kuleshov, Fenner and Ermon 2018; in this form Rothfuss et al. 2021 (PACOH), whose
    published code takes the absolute mean for networks and the root mean square for Gaussian
    processes, per task and then averaged.

    >>> calibration_error(torch.tensor([0.1, 0.4, 0.8]), levels=[0.5])
    tensor(0.1667)
    """
    one_of("kind", kind, ERROR_KINDS)
    values = (_floating(samples) if y is None else pit(samples, y)).reshape(-1)
    if not len(values):
        raise ValueError("there are no observations to judge: give at least one")
    if bool(((values < 0) | (values > 1)).any()):
        raise ValueError(
            "without y, expected PIT values between 0 and 1; for draws give y too: "
            "calibration_error(draws, y)"
        )
    at = torch.as_tensor(default_levels() if levels is None else levels).to(values)
    if at.dim() != 1 or not len(at) or bool(((at < 0) | (at > 1)).any()):
        raise ValueError(f"levels must be probabilities, e.g. [0.1, 0.5, 0.9], not {levels}")
    share = torch.searchsorted(values.sort().values, at, right=True).to(values.dtype) / len(values)
    gap = (share - at).abs()
    error = gap.mean() if kind == "absolute" else gap.square().mean().sqrt()
    return torch.where(values.isnan().any(), math.nan, error)


def expected_calibration_error(probs: Tensor, y: Tensor, num_bins: int = 15) -> Tensor:
    """Mean over observations of |accuracy - confidence| of their bin, a scalar between 0 and 1.

    Confidence is the probability of the most probable class; bins ((b-1)/B, b/B] are of equal
    width.  Like `calibration_error` it is biased up where there are few observations in a bin.
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
    index = bins_of(confidence, num_bins)
    # |sum in the bin of (correct - confidence)| / n: |accuracy - confidence| times the bin's share
    gap = confidence.new_zeros(num_bins).index_add(
        0, index, (best == y).to(confidence.dtype) - confidence
    )
    return gap.abs().sum() / len(y)


def bins_of(confidence: Tensor, num_bins: int) -> Tensor:
    """Which of the bins ((b-1)/B, b/B] each confidence is in, counted from 0."""
    return ((confidence * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.double()


def _matched(samples: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if samples.shape[1:] != y.shape or samples.dim() != y.dim() + 1:
        raise ValueError(
            f"samples has shape {tuple(samples.shape)} and y {tuple(y.shape)}: expected (draws, "
            "*y.shape), draws first"
        )
    if not samples.numel():
        raise ValueError(
            f"there is nothing to judge: samples has shape {tuple(samples.shape)}; give a draw and "
            "a point"
        )
    samples = _floating(samples)
    return samples, y.to(samples)


def _classes(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if probs.dim() != 2 or probs.shape[:1] != y.shape or not probs.numel():
        raise ValueError(
            f"probs {tuple(probs.shape)} and y {tuple(y.shape)}: expected (n, classes) and (n,), n "
            ">= 1"
        )
    if bool(((y < 0) | (y >= probs.shape[1]) | (y != y.floor())).any()):
        raise ValueError(
            f"y must hold classes 0, ..., {probs.shape[1] - 1}, but goes from {y.min()} to "
            f"{y.max()}"
        )
    return _floating(probs), y.long()


def quantile(ordered: Tensor, probability: float) -> Tensor:
    """Of draws sorted along the first axis; torch.quantile refuses more than 16 million numbers."""
    position = probability * (len(ordered) - 1)
    below = min(math.floor(position), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
