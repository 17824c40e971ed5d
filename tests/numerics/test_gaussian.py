"""Linear Gaussian tasks: against dense covariances, with more rows than weights and fewer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from varmeta.numerics.gaussian import Standardised, log_evidence, posterior


def make(rows: int, size: int, scale: float = 0.3) -> tuple[Standardised, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rows * 10 + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y, loc, factor = (
        normal(4, rows, size),
        normal(4, rows),
        normal(size),
        normal(size, size).tril(),
    )
    count = torch.full((4,), float(rows), dtype=torch.float64)
    tasks = Standardised(x @ factor / scale, (y - x @ loc) / scale, count * math.log(scale), count)
    return tasks, {"x": x, "y": y, "loc": loc, "factor": factor, "noise": torch.tensor(scale)}


@pytest.mark.parametrize(("rows", "size"), [(3, 5), (7, 4), (4, 4), (1, 1), (0, 2)])
def test_the_evidence_is_that_of_the_rows_covariance(rows: int, size: int) -> None:
    tasks, raw = make(rows, size)
    spread = raw["x"] @ raw["factor"]
    covariance = spread @ spread.mT + 0.3**2 * torch.eye(rows, dtype=torch.float64)
    want = torch.zeros(4, dtype=torch.float64)
    if rows:
        normal = torch.distributions.MultivariateNormal(raw["x"] @ raw["loc"], covariance)
        want = normal.log_prob(raw["y"])
    torch.testing.assert_close(log_evidence(tasks), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "size"), [(3, 5), (7, 4), (0, 2)])
def test_the_posterior_is_that_of_the_precisions(rows: int, size: int) -> None:
    tasks, raw = make(rows, size)
    prior = torch.linalg.inv(raw["factor"] @ raw["factor"].T)
    precision = prior + raw["x"].mT @ raw["x"] / 0.3**2
    pulled = prior @ raw["loc"] + (raw["x"].mT @ raw["y"][..., None])[..., 0] / 0.3**2
    found = posterior(tasks)
    mean = raw["loc"] + found.mean @ raw["factor"].T
    factor = raw["factor"] @ found.factor
    torch.testing.assert_close(mean, torch.linalg.solve(precision, pulled), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        factor @ factor.mT, torch.linalg.inv(precision), rtol=1e-9, atol=1e-9
    )
    assert not found.factor.triu(1).any()


def test_rows_of_padding_add_nothing() -> None:
    tasks, _ = make(5, 3)
    padded = tasks._replace(
        design=torch.cat([tasks.design, torch.zeros(4, 2, 3, dtype=torch.float64)], 1),
        residual=torch.cat([tasks.residual, torch.zeros(4, 2, dtype=torch.float64)], 1),
    )
    assert torch.equal(log_evidence(padded), log_evidence(tasks))
    assert torch.equal(posterior(padded).mean, posterior(tasks).mean)


@pytest.mark.parametrize("noise", [1e-6, 1e-8])
def test_a_nearly_exact_fit_keeps_its_digits(noise: float) -> None:
    """The residual is 1e-8 of the data: a difference of sums of squares would have lost it all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 2, generator=generator, dtype=torch.float64)
    y = x.sum(-1) + noise * torch.randn(1, 6, generator=generator, dtype=torch.float64)
    count = torch.tensor([6.0], dtype=torch.float64)
    found = log_evidence(Standardised(x / noise, y / noise, count * math.log(noise), count))
    # by the projection: with so little noise the prior's own pull is next to nothing
    q, r = torch.linalg.qr(x[0])
    left = y[0] - q @ (q.T @ y[0])
    mean = torch.linalg.solve(r, q.T @ y[0])
    squares = (left / noise).square().sum() + mean.square().sum()
    log_det = (x[0].T @ x[0] / noise**2).logdet()
    want = -0.5 * (squares + log_det + 6 * math.log(2 * math.pi * noise**2))
    assert abs(float(found - want)) < 1e-6


@pytest.mark.parametrize("size", [1e7, 3e7, 1e9])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (3, 3)])
def test_equal_rows_under_a_wide_prior_keep_the_noise(size: float, shape: tuple[int, int]) -> None:
    """B B' is singular to rounding: the noise between equal rows was lost with its square.

    Equal rows of norm b: the mean of sqrt(n) y has variance 1 + n b^2, what is across it has 1.
    """
    rows, weights = shape
    design = torch.full((1, rows, weights), size / math.sqrt(weights), dtype=torch.float64)
    residual = torch.arange(1.0, rows + 1, dtype=torch.float64).unsqueeze(0)
    along = residual.sum() / math.sqrt(rows)
    across = residual.square().sum() - along**2
    wide = 1 + rows * size**2
    want = -0.5 * (along**2 / wide + across + math.log(wide) + rows * math.log(2 * math.pi))
    count = torch.tensor([float(rows)], dtype=torch.float64)
    found = log_evidence(Standardised(design, residual, torch.zeros_like(count), count))
    assert abs(float(found - want)) < 1e-6
