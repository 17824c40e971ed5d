"""Square roots of covariances by their products: against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.common import F64, randn
from varmeta.numerics.roots import DiagonalRoot, LowRankRoot, Root, TriangularRoot

SIZE = 6


def low_rank(rank: int = 2, length: float = 1.0) -> LowRankRoot:
    return LowRankRoot(randn(SIZE, seed=1).exp(), length * randn(SIZE, rank, seed=2))


def covariance_of(root: LowRankRoot) -> Tensor:
    return torch.diag(root.spread.square()) + root.columns @ root.columns.T


ROOTS = {
    "diagonal": lambda: DiagonalRoot(randn(SIZE, seed=1).exp()),
    "triangular": lambda: TriangularRoot(randn(SIZE, SIZE).tril() + 3.0 * torch.eye(SIZE).double()),
    "low rank": low_rank,
    "one column": lambda: low_rank(1),
    "nothing shared": lambda: low_rank(2, 0.0),
    "nearly all shared": lambda: low_rank(3, 1e4),
    "a column lost": lambda: LowRankRoot(
        torch.ones(SIZE, dtype=F64), torch.ones(SIZE, 2, dtype=F64)
    ),
}


@pytest.mark.parametrize("case", ROOTS)
def test_products_are_those_of_the_matrix(case: str) -> None:
    root: Root = ROOTS[case]()
    a, v, of = root.matrix, randn(3, 4, SIZE, seed=3), randn(3, SIZE, seed=4).exp()
    if isinstance(root, LowRankRoot):
        wanted = covariance_of(root)
        torch.testing.assert_close(a @ a.T, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(root.lower @ root.lower.T, wanted, rtol=1e-10, atol=1e-10)
        assert not bool(root.lower.triu(1).any())
        torch.testing.assert_close(root.variances, wanted.diagonal())
        inverse = torch.linalg.inv(wanted)
        own = root.spread**-2
        torch.testing.assert_close(
            root.precisions / own, inverse.diagonal() / own, atol=1e-7, rtol=0
        )
        taken = torch.diag(own) - root.taken.T @ root.taken
        scale = root.spread[:, None] * root.spread
        torch.testing.assert_close(taken * scale, inverse * scale, atol=1e-7, rtol=0)
    below = randn(2, SIZE, SIZE, seed=5).tril()
    found, wide = root.lower_times(below), a @ below
    assert not bool(found.triu(1).any())
    torch.testing.assert_close(found @ found.mT, wide @ wide.mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(root.times(v), v @ a.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(root.transposed(v), v @ a, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(root.solve(root.times(v)), v, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(root.log_det, torch.linalg.slogdet(a)[1], rtol=1e-8, atol=1e-8)
    wide = torch.stack([(a @ torch.diag(one) @ a.T).diagonal() for one in of])
    torch.testing.assert_close(root.variance(of), wide, rtol=1e-10, atol=1e-10)


def test_a_low_rank_root_is_smooth_and_may_be_mapped() -> None:
    spread, factor = randn(SIZE, seed=1).exp(), randn(SIZE, 2, seed=2)

    def density(spread: Tensor, factor: Tensor) -> Tensor:
        root = LowRankRoot(spread, factor)
        return root.solve(torch.ones(SIZE, dtype=F64)).square().sum() + root.log_det

    for one in (factor, torch.zeros_like(factor)):  # at 0 too
        leaves = spread.clone().requires_grad_(), one.clone().requires_grad_()
        assert torch.autograd.gradcheck(density, leaves)
        assert torch.autograd.gradgradcheck(density, leaves)
    many = torch.stack([factor, 2.0 * factor])
    found = torch.func.vmap(density, in_dims=(None, 0))(spread, many)
    torch.testing.assert_close(found, torch.stack([density(spread, one) for one in many]))
