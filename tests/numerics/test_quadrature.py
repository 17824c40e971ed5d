"""The rules for expectations: what they are exact for, and integrals around a mode."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from varmeta.numerics.quadrature import EVIDENCE, EXPECTATION, NODES, nodes, placed, sphere

MOMENTS = {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0, 5: 0.0, 6: 15.0}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_products_of_gauss_hermite_have_the_moments_of_independent_normals(size: int) -> None:
    for number in (4, EXPECTATION[size], EVIDENCE[size], NODES[size]):
        z, log_weight = nodes(size, number)
        assert z.shape == (number**size, size)
        for powers in product(range(7), repeat=size):
            expected = math.prod(MOMENTS[k] for k in powers)
            found = (log_weight.exp() * (z ** torch.tensor(powers)).prod(-1)).sum()
            assert float(found) == pytest.approx(expected, abs=1e-10 * 15**size)


def test_an_exponential_is_no_matter_of_luck() -> None:
    """E exp(2 z) = e^2: the 64 equal points that were here before are 12 % short of it."""
    for size in (1, 2, 3):
        z, log_weight = nodes(size, EXPECTATION[size])
        found = (log_weight + 2.0 * z.sum(-1) / size**0.5).logsumexp(0)
        assert float(found) == pytest.approx(2.0, abs={1: 1e-11, 2: 1e-6, 3: 1e-4}[size])


@pytest.mark.parametrize(("size", "rotations"), [(1, 0), (5, 0), (3, 4)])
def test_the_sphere_is_exact_for_quadratics(size: int, rotations: int) -> None:
    points = sphere(size, rotations)
    assert points.shape == (2 * size * max(1, rotations), size)
    torch.testing.assert_close(points.mean(0), torch.zeros(size, dtype=torch.float64))
    second = points.mT @ points / len(points)
    torch.testing.assert_close(second, torch.eye(size, dtype=torch.float64))


def test_nodes_around_a_mode_integrate_what_is_nearly_gaussian_there() -> None:
    """A Gaussian times a square, in two numbers, at two places: its integral by the moments."""
    generator = torch.Generator().manual_seed(0)
    mode = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    factor = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64).tril()
    factor.diagonal(dim1=-2, dim2=-1).abs_()
    points, log_weight = placed(mode, factor, 5)
    assert points.shape == (25, 3, 4, 2) and log_weight.shape == (25, 3, 4)
    density = torch.distributions.MultivariateNormal(mode, scale_tril=factor)
    found = (log_weight.exp() * density.log_prob(points).exp() * points[..., 1] ** 2).sum(0)
    expected = mode[..., 1] ** 2 + factor[..., 1, :].square().sum(-1)
    torch.testing.assert_close(found, expected)
