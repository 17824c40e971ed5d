"""Pareto smoothing against distributions with a known tail, and at its edges; test_diagnostics.py
holds it against ArviZ.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from varmeta.posteriors.psis import reading, smooth


def log_weights(k: float, number: int) -> np.ndarray:
    """The quantiles of a Pareto distribution of shape k, in a random order."""
    quantiles = -k * np.log((np.arange(number) + 0.5) / number)
    return np.random.default_rng(0).permutation(quantiles)[None]


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_tail_of_a_pareto_distribution(k: float) -> None:
    assert smooth(log_weights(k, 200_000))[1][0] == pytest.approx(k, abs=0.01)


def test_smoothing_keeps_the_order_and_the_bulk() -> None:
    raw = log_weights(0.8, 1000)
    smoothed, _ = smooth(raw)
    assert np.exp(smoothed).sum() == pytest.approx(1.0)
    order = raw[0].argsort()
    assert np.array_equal(smoothed[0].argsort(), order)
    small = order[:800]
    np.testing.assert_allclose(
        smoothed[0, small] - smoothed[0, small[0]], raw[0, small] - raw[0, small[0]]
    )


def test_equal_weights_and_tails_of_too_few() -> None:
    equal, k = smooth(np.full((1, 50), 7.0))
    assert k[0] == -math.inf and np.allclose(np.exp(equal), 1 / 50)
    some = np.array([[0.0, -1.0, -math.inf, -2.0]])
    few, k = smooth(some)
    assert k[0] == math.inf and few[0, 2] == -math.inf
    np.testing.assert_allclose(few, some - np.log(np.exp(some).sum()))


def test_weights_that_are_alike_are_good_whatever_the_shape_of_their_tail() -> None:
    """Weights of a guide that is almost right have a local maximum, which makes a light tail look
    heavy until draws abound.
    """
    rng = np.random.default_rng(0)

    def weights(draws: int) -> np.ndarray:
        z = rng.normal(size=draws)
        return (0.07 * z - 0.023 * z**3)[None]

    few, many = weights(4000), weights(400_000)
    assert smooth(few)[1][0] > 1.0 and smooth(many)[1][0] < 0.5
    share = np.exp(few - np.logaddexp.reduce(few, 1, keepdims=True))
    ess = float(1 / (share**2).sum())
    assert ess > 0.97 * 4000 and reading(smooth(few)[1][0], 4000, ess) == "good"
    assert reading(1.2, 4000, 0.5 * 4000) == "misses the posterior"
