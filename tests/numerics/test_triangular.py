"""Triangular roots against fifty digits, where eigenvalues or a squared root have lost them."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from torch import Tensor

from varmeta.numerics.triangular import lower_root, root_of_covariance, root_of_inverse, whitened

F64 = torch.float64


def far_columns(offset: float) -> Tensor:
    """I + A'A of a column far from 0 beside the intercept: curvatures from about 1 to about
    offset^2.
    """
    a = torch.tensor([[offset - 1.0, 1.0], [offset, 1.0], [offset + 2.0, 1.0]], dtype=F64)
    return torch.eye(2, dtype=F64) + a.mT @ a


@pytest.mark.parametrize("offset", [1.0, 1e4, 1e8, 1e12])
def test_the_root_of_an_inverse_keeps_flat_directions_beside_steep_ones(offset: float) -> None:
    h = far_columns(offset)
    with mp.workdps(50):
        inverse = mp.matrix(h.tolist()) ** -1
        sds = [float(mp.sqrt(inverse[i, i])) for i in range(2)]
    factor = root_of_inverse(h[None], 0.01)[0]
    assert factor[0, 1] == 0
    # what rounding of H itself allows: the columns' correlation is 1 - 1 / offset^2
    torch.testing.assert_close(
        factor.norm(dim=-1), torch.tensor(sds, dtype=F64), rtol=1e-6, atol=0.0
    )


def test_a_saddle_gets_absolute_curvatures_and_what_is_not_finite_nan() -> None:
    rising = torch.tensor([[2.0, 3.0], [3.0, 2.0]], dtype=F64)  # eigenvalues 5 and -1
    lost = torch.full((2, 2), torch.nan, dtype=F64)
    factor = root_of_inverse(torch.stack([rising, lost, 4.0 * torch.eye(2, dtype=F64)]), 0.01)
    made = torch.tensor([[0.6, -0.4], [-0.4, 0.6]], dtype=F64)  # eigenvalues 1/5 and 1
    torch.testing.assert_close(factor[0] @ factor[0].mT, made)
    assert bool(factor[1].isnan().all())
    torch.testing.assert_close(factor[2], 0.5 * torch.eye(2, dtype=F64))


def test_curvatures_too_far_apart_for_a_double_still_have_a_root() -> None:
    """Twice the same column in units of 1e10: rounding has lost the prior's part, and the product
    was no covariance.
    """
    a = torch.tensor([[1e10, 1e10, 1.0], [-3e10, -3e10, 1.0]], dtype=F64)
    factor = root_of_inverse((torch.eye(3, dtype=F64) + a.mT @ a)[None], 0.01)
    assert bool(factor.isfinite().all()) and bool((factor.diagonal(dim1=-2, dim2=-1) > 0).all())


def test_a_lower_root_has_the_same_product() -> None:
    root = torch.randn(4, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    lower = lower_root(root)
    torch.testing.assert_close(lower @ lower.mT, root @ root.mT)
    torch.testing.assert_close(lower, torch.linalg.cholesky(root @ root.mT))


def test_a_covariance_without_a_direction_has_a_root() -> None:
    sd = torch.tensor([1e-6, 1e3], dtype=F64)
    whole, one = torch.diag(sd.square()), torch.outer(sd, sd)
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(one - torch.diag(1e-16 * sd.square()))
    factor = root_of_covariance(torch.stack([whole, one - torch.diag(1e-16 * sd.square())]))
    torch.testing.assert_close(factor[0], torch.diag(sd))
    torch.testing.assert_close(factor[1] @ factor[1].mT, one, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("many", [5, 2_000])
def test_whitened_rows_are_those_of_a_solve(size: int, many: int) -> None:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(many, size, size + 2, generator=generator, dtype=torch.float64)
    rows = torch.randn(many, size, 4, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT
    white, log_det = whitened(matrix, rows)
    lower = torch.linalg.cholesky(matrix)
    torch.testing.assert_close(white, torch.linalg.solve_triangular(lower, rows, upper=False))
    torch.testing.assert_close(log_det, 0.5 * torch.logdet(matrix))
    matrix[0] = -matrix[0]
    white, log_det = whitened(matrix, rows)
    assert bool(white[0].isnan().any()) and bool(log_det[0].isnan())
    assert bool(white[1:].isfinite().all())
