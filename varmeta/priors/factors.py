"""Factors of a covariance between vectors of free numbers and matrices, and their names in eta."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

PRECISION = "log_precision"
TRIL = "prior_tril"
FACTOR = "prior_factor"


def log_precision_and_tril(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Take a factor apart: diag(exp(-log_precision / 2)) times a unit lower triangle.

    The factor `(D, D)` is lower triangular.
    """
    sd = factor.diagonal()
    rows, columns = torch.tril_indices(len(sd), len(sd), -1)
    return -2.0 * sd.log(), (factor / sd.unsqueeze(-1))[rows, columns]


def unit_lower(entries: Tensor, size: int) -> Tensor:
    """Unit lower triangular matrices `(..., size, size)`, row by row.

    From their entries below the diagonal.
    """
    rows, columns = torch.tril_indices(size, size, -1, device=entries.device)
    # scatter out of place: differentiable twice, and nothing is written into
    eye = torch.eye(size, dtype=entries.dtype, device=entries.device).expand(
        *entries.shape[:-1], size, size
    )
    flat = eye.reshape(*entries.shape[:-1], size * size)
    index = (rows * size + columns).expand(entries.shape)
    return flat.scatter(-1, index, entries).reshape(*entries.shape[:-1], size, size)


def trapezoid(entries: Tensor, size: int, rank: int) -> Tensor:
    """`(..., size, rank)` from its entries on and below the diagonal, row by row; 0 above."""
    rows, columns = torch.tril_indices(size, rank, device=entries.device)
    flat = entries.new_zeros(*entries.shape[:-1], size * rank)
    index = (rows * rank + columns).expand(entries.shape)
    return flat.scatter(-1, index, entries).reshape(*entries.shape[:-1], size, rank)


def trapezoid_entries(size: int, rank: int) -> int:
    """How many they are."""
    return size * rank - rank * (rank - 1) // 2


@lru_cache(maxsize=32)
def first_trapezoid(size: int, rank: int) -> Tensor:
    """Entries of columns of length 1, the same always.

    They are random, since data may say nothing along directions chosen by a rule.
    """
    rows, columns = torch.tril_indices(size, rank)
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(size, rank, generator=generator, dtype=torch.float64).tril()
    length: Tensor = full.norm(dim=0)
    return (full / length)[rows, columns]
