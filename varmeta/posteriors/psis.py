"""Pareto smoothed importance sampling: are importance weights fit for use?

numpy only.  The largest weights of a row are taken for draws of a generalised Pareto distribution;
its shape k-hat says how heavy their tail is, and their expected order statistics replace them.

Source: Vehtari, Simpson, Gelman, Yao and Gabry, JMLR 25 (2024); the fit of the tail: Zhang and
Stephens, Technometrics 51 (2009).
"""

from __future__ import annotations

import math

import numpy as np

# Fewer weights in the tail say nothing about its shape.
MIN_TAIL = 5
# The prior on k in the fit of the tail: this many observations of 0.5.
PRIOR_WEIGHT, PRIOR_SHAPE = 10.0, 0.5

# With this share of the draws effective, the weights are so much alike that the shape of their tail
# is not estimable.
ALIKE = 0.95


def smooth(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised smoothed log weights `(rows, draws)`, and k-hat `(rows,)`.

    log_weights: `(rows, draws)`, up to a constant of each row; -inf is a weight of 0. The tail are
    the min(draws / 5, 3 sqrt(draws)) largest weights.  k-hat is +inf where the tail has fewer than
    five different weights above the rest, and -inf where all weights are equal to rounding.

    >>> ratios = np.random.default_rng(0).pareto(2.0, (1, 4000)) + 1  # a tail of shape 1/2
    >>> weights, k = smooth(np.log(ratios))
    >>> bool(abs(k[0] - 0.5) < 0.2), bool(abs(np.exp(weights).sum() - 1) < 1e-12)
    (True, True)
    """
    x = np.asarray(log_weights, dtype=np.float64)
    largest = x.max(1, keepdims=True)
    x = x - largest
    rows, draws = x.shape
    length = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    order = np.argsort(x, axis=1, kind="stable")
    ranked = np.take_along_axis(x, order, 1)
    # below the smallest number there is nothing to tell apart
    cut = np.maximum(ranked[:, draws - length - 1], math.log(np.finfo(float).tiny))
    tail = np.exp(ranked[:, draws - length :]) - np.exp(cut)[:, None]
    known = (tail > 0).sum(1) >= MIN_TAIL
    k = np.full(rows, np.inf)
    if known.any():
        shape, scale = _fit(np.maximum(tail[known], 0.0))
        k[known] = shape
        order_statistics = _quantiles((np.arange(length) + 0.5) / length, shape, scale)
        # no weight may exceed the largest one that was drawn
        new = np.minimum(np.log(order_statistics + np.exp(cut[known])[:, None]), 0.0)
        ranked[known, draws - length :] = np.where(
            np.isfinite(shape)[:, None], new, ranked[known, draws - length :]
        )
    x = np.empty_like(ranked)
    np.put_along_axis(x, order, ranked, 1)
    spread = -ranked[:, 0]
    k[spread <= 1e-10 * np.maximum(1.0, np.abs(largest[:, 0]))] = -np.inf
    return x - np.log(np.exp(x).sum(1, keepdims=True)), k


def limit(draws: int) -> float:
    """The k-hat up to which that many draws serve: min(1 - 1 / log10(draws), 0.7).

    >>> round(limit(1000), 2), limit(10_000)
    (0.67, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(draws), 0.7)


def reading(k: float, draws: int, ess: float = 0.0) -> str:
    """What a k-hat says about a task's guide, in words; nothing where the weights hardly differ.

    ess: effective draws.  A guide that is almost the posterior has weights with a local maximum,
    whose neighbourhood fills the tail together with the few that make it; the fit of one Pareto
    distribution to both gives shapes of 1 to 5 until there are enough draws (at 40,000 it was 0.3
    where it had been 4 at 4,000).
    """
    if k <= 0.5 or ess >= ALIKE * draws:
        return "good"
    if k <= limit(draws):
        return "usable"
    return "unreliable" if k <= 1.0 else "misses the posterior"


def _fit(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale of a generalised Pareto distribution for ascending x `(rows, n)`, by a
    profile of its likelihood.
    """
    n = x.shape[1]
    number = 30 + int(math.sqrt(n))
    quarter = x[:, int(n / 4 + 0.5) - 1]
    steps = 1 - np.sqrt(number / (np.arange(1, number + 1) - 0.5))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        b = 1 / x[:, -1:] + steps / (3 * quarter[:, None])
        k = np.log1p(-b[:, :, None] * x[:, None, :]).mean(2)
        profile = n * (np.log(-b / k) - k - 1)
        profile = np.where(np.isfinite(profile), profile, -np.inf)
        weights = np.exp(profile - profile.max(1, keepdims=True))
        weights = weights / weights.sum(1, keepdims=True)
        weights = np.where(weights >= 10 * np.finfo(float).eps, weights, 0.0)
        best = (np.where(weights > 0, b, 0.0) * weights).sum(1) / weights.sum(1)
        k = np.log1p(-best[:, None] * x).mean(1)
        scale = -k / best
    return (n * k + PRIOR_WEIGHT * PRIOR_SHAPE) / (n + PRIOR_WEIGHT), scale


def _quantiles(p: np.ndarray, k: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Of the generalised Pareto distribution, `(rows, len(p))`."""
    k, scale = k[:, None], scale[:, None]
    near = np.abs(k) < np.finfo(float).eps
    safe = np.where(near, 1.0, k)
    with np.errstate(over="ignore"):  # an infinite one is cut at the largest weight
        standard = np.where(near, -np.log1p(-p), np.expm1(-safe * np.log1p(-p)) / safe)
    quantiles: np.ndarray = scale * standard
    return quantiles
