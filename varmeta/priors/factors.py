"""Factors of a covariance between vectors of free numbers and matrices, and their names in eta."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from varmeta.priors.check import Blocks
from varmeta.priors.weights import Weights

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


def block_of(blocks: Blocks, weights: Weights) -> Tensor:
    """The number of each weight's block, `(D,)`; a parameter in none is one by itself.

    Raises ValueError for a name that no parameter has.

    >>> weights = Weights({"a": torch.Size([]), "b": torch.Size([2]), "c": torch.Size([])})
    >>> block_of((("a", "c"),), weights).tolist()
    [0, 2, 2, 0]
    """
    unknown = [name for names in blocks for name in names if name not in weights.shapes]
    if unknown:
        raise ValueError(
            f"blocks name {unknown}, but the weights that vary between tasks are "
            f"{list(weights.names)}"
        )
    number = {name: index for index, names in enumerate(blocks) for name in names}
    parts = [
        torch.full((size,), number.get(name, len(blocks) + index))
        for index, (name, size) in enumerate(zip(weights.names, weights.sizes, strict=True))
    ]
    return torch.cat(parts)


def together(blocks: Blocks, weights: Weights) -> Tensor:
    """Whether two weights are in one block, `(D, D)`, bool."""
    number = block_of(blocks, weights)
    return number.unsqueeze(-1) == number


def kept(blocks: Blocks, weights: Weights) -> Tensor:
    """Which entries below the diagonal, row by row, are within a block, `(D (D - 1) / 2,)`."""
    rows, columns = torch.tril_indices(weights.size, weights.size, -1)
    return together(blocks, weights)[rows, columns]


def in_place(entries: Tensor, blocks: Blocks, weights: Weights) -> Tensor:
    """All entries below the diagonal, `(..., D (D - 1) / 2)`, from those within blocks; 0 between.

    Differentiable twice, and under vmap.
    """
    within = kept(blocks, weights).to(entries.device)
    index = within.nonzero()[:, 0].expand(entries.shape)
    full = entries.new_zeros(*entries.shape[:-1], len(within))
    return full.scatter(-1, index, entries)
