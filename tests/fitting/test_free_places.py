"""Generalised least squares of the places against `lstsq`, with and without one that is held."""

from __future__ import annotations

import math

import pytest
import torch

from varmeta.fitting.free_places import FreePlaces
from varmeta.numerics.triangular import whitened_columns


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_best_places_are_those_of_least_squares(held: bool, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    columns[:, 1] += 10.0
    y = columns @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    y = y + noise * torch.randn(12, generator=generator, dtype=torch.float64)
    free, values = torch.tensor([True, not held, True]), torch.tensor([0.0, -2.0, 0.0]).double()
    known = whitened_columns(columns)
    assert known is not None
    q, r = known
    origin = q.mT @ y
    rows = torch.cat([q, (y - q @ origin).unsqueeze(-1)], -1)
    if not noise:  # exactly, so that H is singular
        rows[:, -1] = 0.0
    places, quadratic = FreePlaces.of(r, origin, free, values), rows.mT @ rows
    rest = y - columns[:, ~free] @ values[~free]
    expected = torch.linalg.lstsq(columns[:, free], rest.unsqueeze(-1)).solution[:, 0]
    torch.testing.assert_close(places.best_values(quadratic), expected)
    v = places.best(quadratic)
    left = (rest - columns[:, free] @ expected).square().sum()
    torch.testing.assert_close(v @ quadratic @ v, left, atol=1e-12, rtol=1e-9)
    if noise:
        least = places.root(quadratic)[-1, -1].square()
        torch.testing.assert_close(least, left)
    gram = columns[:, free].mT @ columns[:, free]
    scale = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(places.covariance(quadratic, scale), 0.25 * gram.inverse())
    # the integral over the parameters has their own units
    volume = places.log_volume(_root(places, quadratic))
    assert float(volume) == pytest.approx(0.5 * math.log(float(gram.det())), abs=1e-9)


def _root(places: FreePlaces, quadratic: torch.Tensor) -> torch.Tensor:
    inner = torch.linalg.cholesky(places.quadratic(quadratic)[:-1, :-1])
    return torch.nn.functional.pad(inner, (0, 1, 0, 1))
