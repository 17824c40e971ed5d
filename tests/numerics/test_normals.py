"""Quantiles, moments and distances of mixtures of normals against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from varmeta.numerics import normals
from varmeta.numerics.normals import absolute, moments, quantiles

F64 = torch.float64
MIXTURES = {
    "alike": ([0.5, 0.3, 0.2], [0.0, 0.1, -0.1], [1.0, 1.1, 0.9]),
    "far apart": ([0.6, 0.4], [-50.0, 50.0], [1.0, 0.1]),
    "one spike": ([0.7, 0.3], [0.0, 0.0], [1e-4, 1.0]),
    "a long tail": ([0.98, 0.01, 0.01], [0.0, 30.0, -1e3], [1.0, 5.0, 100.0]),
    "huge": ([0.5, 0.5], [1e8, 1e8 + 1.0], [1.0, 2.0]),
}


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_quantile_is_that_of_the_mixture(name: str, p: float) -> None:
    share, mean, sd = (np.array(values) for values in MIXTURES[name])
    columns = [torch.from_numpy(values)[:, None] for values in (mean, sd)]
    found = float(quantiles(torch.from_numpy(share), *columns, (0.3, p))[1, 0])
    ends = stats.norm.ppf(p, mean, sd)
    root = optimize.brentq(
        lambda y: share @ stats.norm.cdf(y, mean, sd) - p, ends.min(), ends.max(), xtol=1e-14
    )
    assert found == pytest.approx(root, abs=1e-9 * sd.max(), rel=1e-14)


def test_quantiles_of_many_are_each_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(5, generator=generator, dtype=F64)
    share, mean = share / share.sum(), 3 * torch.randn(5, 40, generator=generator, dtype=F64)
    sd = torch.rand(5, 40, generator=generator, dtype=F64)
    each = [quantiles(share, mean[:, [k]], sd[:, [k]], (0.1, 0.9)) for k in range(40)]
    monkeypatch.setattr(normals, "CELLS", 100)
    found = quantiles(share, mean, sd, (0.1, 0.9))
    torch.testing.assert_close(found, torch.cat(each, 1), atol=1e-9, rtol=0)
    same = quantiles(share.float(), mean.float(), sd.float(), (0.1, 0.9))
    torch.testing.assert_close(same, found.float(), atol=1e-5, rtol=1e-5)


def test_of_points_it_is_one_of_them() -> None:
    """sds of 0: the distribution function is a staircase; equal points have no width at all."""
    share, mean = torch.tensor([0.25, 0.5, 0.25], dtype=F64), torch.tensor([1.0, 2.0, 4.0])
    columns = torch.stack([mean.double(), torch.full((3,), 7.0, dtype=F64)], 1)
    found = quantiles(share, columns, torch.zeros(3, 2, dtype=F64), (0.1, 0.6, 0.9))
    steps = torch.tensor([[1.0, 7.0], [2.0, 7.0], [4.0, 7.0]], dtype=F64)
    torch.testing.assert_close(found, steps, atol=1e-7, rtol=0)


def test_moments_and_mean_distances() -> None:
    share, mean, sd = (torch.tensor(values, dtype=F64) for values in MIXTURES["a long tail"])
    centre, spread = moments(share, mean, sd.square())
    second = (share * (sd.square() + mean.square())).sum()
    assert float(spread**2) == pytest.approx(float(second - centre**2))
    for value in (-3.0, 0.0, 0.5):
        folded = stats.foldnorm(abs(value) / 2.0, scale=2.0).mean()
        assert float(absolute(torch.tensor(value).double(), torch.tensor(4.0).double())) == (
            pytest.approx(folded)
        )
