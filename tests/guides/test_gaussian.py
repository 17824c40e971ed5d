"""Structured Gaussians against the dense ones that they are."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from tests.common import F64, randn
from varmeta.guides.gaussian import BlockNormal, LowRankNormal
from varmeta.guides.kl import kl, move
from varmeta.numerics.roots import DiagonalRoot, LowRankRoot, Root, TriangularRoot
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.factors import unit_lower
from varmeta.priors.structured_normal import StructuredNormal

SIZE = 6
BATCH = (3, 1)


ROOTS: dict[str, Root] = {
    "diagonal": DiagonalRoot(randn(SIZE, seed=10).exp()),
    "dense": TriangularRoot(torch.eye(SIZE, dtype=F64) + 0.4 * randn(SIZE, SIZE, seed=10).tril(-1)),
    "low rank": LowRankRoot(randn(SIZE, seed=10).exp(), randn(SIZE, 2, seed=11)),
}


def low_rank(rank: int = 2, length: float = 1.0, root: str = "diagonal") -> LowRankNormal:
    spread = (0.5 * randn(*BATCH, SIZE, seed=1)).exp()
    parts = spread, length * randn(*BATCH, SIZE, rank, seed=3)
    return LowRankNormal(randn(*BATCH, SIZE, seed=2), parts, ROOTS[root])


def block(positions: tuple[int, ...] = (4, 1, 2)) -> BlockNormal:
    size = len(positions)
    triangle = unit_lower(randn(*BATCH, size * (size - 1) // 2, seed=4), size)
    return BlockNormal(low_rank().loc, (low_rank().spread, triangle), torch.tensor(positions))


CASES = {
    "rank 1": lambda: low_rank(1),
    "rank 2": low_rank,
    "rank D": lambda: low_rank(SIZE),
    "dense root": lambda: low_rank(2, root="dense"),
    "low-rank root": lambda: low_rank(2, root="low rank"),
    "W = 0": lambda: low_rank(2, 0.0),
    "long W": lambda: low_rank(2, 30.0),
    "block": block,
    "block of one": lambda: block((3,)),
    "block of all": lambda: block((0, 1, 2, 3, 4, 5)),
}
PRIORS = {
    "diagonal": dist.Normal(randn(SIZE, seed=5), (0.3 * randn(SIZE, seed=6)).exp()).to_event(1),
    "dense": dist.MultivariateNormal(
        randn(SIZE, seed=5), scale_tril=torch.eye(SIZE, dtype=F64) + 0.3 * randn(SIZE, SIZE).tril()
    ),
    "low rank": FactorNormal(
        randn(SIZE, seed=5), LowRankRoot(randn(SIZE, seed=6).exp(), randn(SIZE, 2, seed=12))
    ),
}


def dense(q: StructuredNormal) -> dist.MultivariateNormal:
    """From the definition of the family, by inverting matrices."""
    if isinstance(q, LowRankNormal):
        eye = torch.eye(SIZE, dtype=F64)
        precision = (eye + q.factor @ q.factor.mT) / (
            q.spread.unsqueeze(-1) * q.spread.unsqueeze(-2)
        )
        root = q.root.matrix
        return dist.MultivariateNormal(
            q.loc, covariance_matrix=root @ precision.inverse() @ root.mT
        )
    assert isinstance(q, BlockNormal)
    a = torch.eye(SIZE, dtype=F64).expand(*BATCH, SIZE, SIZE).clone()
    for i, row in enumerate(q.block.tolist()):
        for j, column in enumerate(q.block.tolist()):
            a[..., row, column] = q.triangle[..., i, j]
    a = q.spread.unsqueeze(-1) * a
    return dist.MultivariateNormal(q.loc, covariance_matrix=a @ a.mT)


@pytest.mark.parametrize("name", CASES)
def test_moments_density_and_products(name: str) -> None:
    q = CASES[name]()
    known = dense(q)
    close = torch.testing.assert_close
    close(q.covariance_matrix, known.covariance_matrix)
    close(q.variance, known.variance)
    close(q.stddev, known.stddev)
    close(q.mean, known.mean)
    value = randn(5, *BATCH, SIZE, seed=7)
    close(q.log_prob(value), known.log_prob(value))
    close(q.whitened(q.scaled(value)), value)
    close(q.transposed(value), (q.scale_matrix.mT @ value.unsqueeze(-1)).squeeze(-1))
    close((q.scale_matrix @ value.unsqueeze(-1)).squeeze(-1), q.scaled(value))
    close(move(q, value), q.loc + q.scaled(value))
    close(2.0 * q.log_det, known.covariance_matrix.logdet())


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", CASES)
def test_divergence_from_the_prior(name: str, prior: str) -> None:
    q, p = CASES[name](), PRIORS[prior]
    gaussian = (
        dist.MultivariateNormal(p.mean, scale_tril=torch.diag(p.stddev))
        if prior == "diagonal"
        else dist.MultivariateNormal(p.mean, covariance_matrix=p.covariance_matrix)
    )
    torch.testing.assert_close(kl(q, p), kl_divergence(dense(q), gaussian.expand(BATCH)))


@pytest.mark.parametrize("prior", ["dense", "low rank"])
@pytest.mark.parametrize("name", ["rank 2", "dense root", "low-rank root", "W = 0", "block"])
def test_draws_and_divergence_are_differentiable_twice(name: str, prior: str) -> None:
    """Also where W loses rank, at which a matrix root by eigenvalues has no derivative."""
    q = CASES[name]()
    noise = randn(2, *BATCH, SIZE, seed=8)

    def function(loc: Tensor, *parts: Tensor) -> Tensor:
        now = q._like(loc, parts)
        return kl(now, PRIORS[prior]).sum() + move(now, noise).sin().sum()

    parts = [q.loc, *q._parts]
    if isinstance(q, BlockNormal):  # its ones and zeros are no parameters
        parts = parts[:2]
        inputs = [part.detach().clone().requires_grad_() for part in parts]
        assert torch.autograd.gradgradcheck(
            lambda loc, spread: function(loc, spread, q.triangle), inputs
        )
        return
    assert torch.autograd.gradgradcheck(
        function, [part.detach().clone().requires_grad_() for part in parts]
    )


def test_draws_have_the_covariance() -> None:
    q = low_rank()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = q.rsample((200_000,)).squeeze(-2)
    known = q.covariance_matrix.squeeze(-3)
    for task in range(3):
        spread = known[task].diagonal().sqrt()
        error = (torch.cov(draws[:, task].T) - known[task]) / torch.outer(spread, spread)
        assert float(error.abs().max()) < 5 / 200_000**0.5


@pytest.mark.parametrize("name", ["rank 2", "block"])
def test_expand_repeats_the_batch(name: str) -> None:
    q = CASES[name]()
    value = randn(4, *BATCH, SIZE, seed=9)
    wide = q.expand((4, *BATCH))
    assert wide.batch_shape == (4, *BATCH)
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
