"""Lower triangular roots of positive definite matrices, losing no digits by squaring."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """Lower triangular L `(..., D, D)` with L L' = matrix.

    NaN where it is not positive definite, or not finite, so that one of a batch does not end all.
    """
    root, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where((failed != 0)[..., None, None], math.nan, root)


# Factors of matrices up to this size are written out entry by entry where there are so many: for
# their second derivatives that takes a tenth of the time of one call of LAPACK after another.
WRITTEN_OUT, MANY = 3, 1_000


def whitened(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 rows `(n, D, P)` and half of log det `(n,)`, with L L' = matrix `(n, D, D)`.

    NaN where it is not positive definite, or not finite.

    >>> half = torch.tensor([[[0.25]]])
    >>> whitened(half, torch.ones(1, 1, 1))[0], whitened(half, torch.ones(1, 1, 1))[1].exp()
    (tensor([[[2.]]]), tensor([0.5000]))
    """
    size = matrix.shape[-1]
    if size > WRITTEN_OUT or len(matrix) < MANY:
        root = cholesky(matrix)
        white: Tensor = torch.linalg.solve_triangular(root, rows, upper=False)
        return white, root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    below: list[list[Tensor]] = []
    known: list[Tensor] = []
    log_det = matrix.new_zeros(len(matrix))
    for i in range(size):
        entries: list[Tensor] = []
        for j in range(i + 1):
            left = matrix[:, i, j]
            for k in range(j):
                left = left - entries[k] * (below[j][k] if j < i else entries[k])
            entries.append(left.sqrt() if i == j else left / below[j][j])
        below.append(entries)
        row = rows[:, i]
        for k in range(i):
            row = row - entries[k].unsqueeze(-1) * known[k]
        known.append(row / entries[i].unsqueeze(-1))
        log_det = log_det + entries[i].log()
    return torch.stack(known, 1), log_det


# A column that its predecessors leave less than this share of is a combination of them as far as
# its numbers tell.
_RANK = 1e-12


def whitened_columns(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Q `(n, k)` with orthonormal columns and R `(k, k)` with rows = Q R; R's diagonal is positive.

    None where a column is a combination of those before it, or a number is not finite.
    """
    if len(rows) < rows.shape[1] or not bool(rows.isfinite().all()):
        return None
    # columns of very different size, as units make them, are no sign of collinear ones
    scale = rows.abs().amax(0)
    if bool((scale == 0).any()):
        return None
    q, r = torch.linalg.qr(rows / scale)
    if bool((r.diagonal().abs() <= _RANK * r.norm(dim=0)).any()):
        return None
    signs = r.diagonal().sign()
    return q * signs, signs.unsqueeze(-1) * r * scale


def lower_root(root: Tensor) -> Tensor:
    """The lower triangle `(..., D, D)` with the same product with its transpose as `root`.

    Its diagonal is positive.

    By QR: `root @ root.mT`, whose condition is the square, need be no positive definite matrix any
        more.
    """
    upper: Tensor = torch.linalg.qr(root.mT).R
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return (signs.unsqueeze(-1) * upper).mT


def held_off_zero(triangle: Tensor, least: Tensor) -> Tensor:
    """The triangles `(..., D, D)` with no diagonal entry smaller in size than `least` `(..., D)`.

    Signs stay as they are; of 0 it is positive.

    >>> held_off_zero(torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), torch.tensor([0.1, 0.1]))
    tensor([[-1.0000,  0.0000],
            [ 2.0000,  0.1000]])
    """
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    held = torch.where(diagonal < 0, -1.0, 1.0) * torch.maximum(diagonal.abs(), least)
    return triangle + torch.diag_embed(held - diagonal)


def root_of_inverse(matrix: Tensor, least: float, convex: bool = False) -> Tensor:
    """Lower triangular L `(rows, D, D)` with L L' = H^-1 for symmetric H `(rows, D, D)`.

    NaN where H is not finite.

    An H with an eigenvalue below `least` is given absolute ones, at least that.  Any other is taken
    as it is: Cholesky's factor of H with both axes reversed keeps the digits of a flat direction
    beside one that is many orders of magnitude steeper, which eigenvalues lose.

    convex: H = I + A'A by how it was made, so that only rounding can have taken its identity: where
    an eigenvalue, in units of H's diagonal, is no more than rounding, the identity is all that
    there is.

    >>> root_of_inverse(torch.tensor([[[4.0, 0.0], [0.0, 0.25]]]), least=0.01)
    tensor([[[0.5000, 0.0000],
             [0.0000, 2.0000]]])
    """
    finite = matrix.isfinite().all(-1).all(-1)
    identity = torch.eye(matrix.shape[-1]).to(matrix)
    # LAPACK raises on NaN, for all rows at once
    matrix = torch.where(finite[:, None, None], matrix, identity)
    reverse, failed = torch.linalg.cholesky_ex(matrix.flip(-1, -2))
    flat = failed != 0
    if not convex:
        flat = flat | (torch.linalg.cholesky_ex(matrix - least * identity).info != 0)
    else:  # a pivot that rounding made
        flat = flat | (reverse.square() <= _rounding(matrix) * matrix.flip(-1, -2)).diagonal(
            dim1=-2, dim2=-1
        ).any(-1)
    upper = torch.where(flat[:, None, None], identity, reverse.flip(-1, -2).mT)
    factor = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=False)
    if bool(flat.any()):
        factor[flat] = (_of_identity_and_more if convex else _of_absolute)(matrix[flat], least)
    return torch.where(finite[:, None, None], factor, math.nan)


def _rounding(matrix: Tensor) -> float:
    """Up to where an eigenvalue, or a squared pivot, in units of the diagonal may be made by
    rounding alone.
    """
    return 10 * matrix.shape[-1] * torch.finfo(matrix.dtype).eps


def _of_absolute(matrix: Tensor, least: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return lower_root(vectors / values.abs().clamp(min=least).sqrt().unsqueeze(-2))


def _of_identity_and_more(matrix: Tensor, least: float) -> Tensor:
    unit = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=least).rsqrt().unsqueeze(-1)
    values, vectors = torch.linalg.eigh(unit * matrix * unit.mT)
    identity = (unit * vectors).square().sum(-2)  # v' (unit I unit) v
    values = torch.where(values > _rounding(matrix), values, identity)
    return lower_root(unit * vectors / values.sqrt().unsqueeze(-2))


def root_of_covariance(matrix: Tensor) -> Tensor:
    """Lower triangular L `(..., D, D)` with L L' = S for a covariance S.

    Also for one that rounding has left without a direction.

    Such a direction gets the variance that rounding leaves room for, in units of the sds.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return factor
    sd = (
        matrix.diagonal(dim1=-2, dim2=-1)
        .clamp(min=torch.finfo(matrix.dtype).tiny)
        .sqrt()
        .unsqueeze(-1)
    )
    correlation = matrix / sd / sd.mT
    finite = correlation.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, correlation, 0.0))
    least = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    root = sd * lower_root(vectors * values.clamp(min=least).sqrt().unsqueeze(-2))
    return torch.where((failed != 0)[..., None, None], torch.where(finite, root, math.nan), factor)
