"""Pareto smoothing against distributions with a known tail, and at its edges; test_diagnostics.py holds it against ArviZ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from varmeta.psis import smooth


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
    np.testing.assert_allclose(smoothed[0, small] - smoothed[0, small[0]], raw[0, small] - raw[0, small[0]])


def test_equal_weights_and_tails_of_too_few() -> None:
    equal, k = smooth(np.full((1, 50), 7.0))
    assert k[0] == -math.inf and np.allclose(np.exp(equal), 1 / 50)
    some = np.array([[0.0, -1.0, -math.inf, -2.0]])
    few, k = smooth(some)
    assert k[0] == math.inf and few[0, 2] == -math.inf
    np.testing.assert_allclose(few, some - np.log(np.exp(some).sum()))
