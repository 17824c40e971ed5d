"""Pareto smoothing against ArviZ, against distributions with a known tail, and at its edges."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from varmeta.numerics.psis import fit_generalised_pareto, psis


def log_weights(k: float, number: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (uniform**-k).log()


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_the_tail_of_a_pareto_distribution(k: float) -> None:
    assert psis(log_weights(k, 200_000))[1] == pytest.approx(k, abs=0.05)


@pytest.mark.parametrize("number", [100, 1000])
def test_as_arviz(number: int) -> None:
    az = pytest.importorskip("arviz")
    if not hasattr(az, "psislw"):
        pytest.skip("ArviZ 1.x")
    raw = log_weights(0.6, number, seed=1) + 3.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, k = az.psislw(raw.numpy())
    smooth, own = psis(raw)
    assert own == pytest.approx(float(k), abs=2e-3)
    np.testing.assert_allclose(smooth.numpy(), np.asarray(expected), atol=2e-2)


def test_smoothing_keeps_the_order_and_the_bulk() -> None:
    raw = log_weights(0.8, 1000)
    smooth, _ = psis(raw)
    assert float(smooth.exp().sum()) == pytest.approx(1.0)
    assert torch.equal(smooth.argsort(), raw.argsort())
    small = raw.argsort()[:800]
    torch.testing.assert_close(smooth[small] - smooth[small[0]], raw[small] - raw[small[0]])


def test_exponential_excess_has_no_heavy_tail() -> None:
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    k, sigma = fit_generalised_pareto(-2.0 * (-uniform).log1p())
    assert k == pytest.approx(0.0, abs=0.02) and sigma == pytest.approx(2.0, rel=0.02)


def test_edges() -> None:
    equal, k = psis(torch.full((50,), 7.0, dtype=torch.float64))
    assert k == -math.inf and torch.allclose(equal.exp(), torch.tensor(1 / 50, dtype=torch.float64))
    some = torch.tensor([0.0, -1.0, -math.inf, -2.0], dtype=torch.float64)
    few, k = psis(some)
    assert math.isnan(k) and float(few[2]) == -math.inf
    torch.testing.assert_close(few, some - some.logsumexp(0))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 2), torch.zeros(0), torch.tensor([0.0, math.nan]), torch.tensor([-math.inf])]
)
def test_what_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="log_weights"):
        psis(bad)
