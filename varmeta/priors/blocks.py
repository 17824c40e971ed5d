"""Which weights a dense prior correlates: all of them, or some with each other alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from varmeta.priors.check import LearnPrecision
from varmeta.priors.weights import Weights

Blocks = tuple[tuple[str, ...], ...]


def checked_blocks(
    blocks: Sequence[Sequence[str]] | None,
    learn_precision: LearnPrecision | None,
    covariance: Tensor | None,
) -> Blocks | None:
    """The blocks as tuples of names; see `GaussianPrior`.

    Raises TypeError for what lists no lists of names; ValueError for a name in two blocks, and
    where no covariance of blocks is learned.
    """
    if blocks is None:
        return None
    if isinstance(blocks, str) or any(isinstance(names, str) for names in blocks):
        raise TypeError(f"blocks must be a list of lists of parameter names, not {blocks!r}")
    if learn_precision != "full" or covariance is not None:
        raise ValueError(
            "blocks divide a covariance that is learned: set learn_precision='full', and give no "
            "covariance"
        )
    found = tuple(tuple(map(str, names)) for names in blocks)
    every = [name for names in found for name in names]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(f"blocks name {twice} more than once: a weight is in one block")
    return found


def block_of(blocks: Blocks | None, weights: Weights) -> Tensor:
    """The number of each weight's block, `(D,)`; a parameter in none is one by itself.

    Raises ValueError for a name that no parameter has.

    >>> weights = Weights({"a": torch.Size([]), "b": torch.Size([2]), "c": torch.Size([])})
    >>> block_of((("a", "c"),), weights).tolist()
    [0, 2, 2, 0]
    """
    if blocks is None:
        return torch.zeros(weights.size, dtype=torch.int64)
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


def together(blocks: Blocks | None, weights: Weights) -> Tensor:
    """Whether two weights are in one block, `(D, D)`, bool."""
    number = block_of(blocks, weights)
    return number.unsqueeze(-1) == number


def kept(blocks: Blocks | None, weights: Weights) -> Tensor:
    """Which entries below the diagonal, row by row, are within a block, `(D (D - 1) / 2,)`."""
    rows, columns = torch.tril_indices(weights.size, weights.size, -1)
    return together(blocks, weights)[rows, columns]


def in_place(entries: Tensor, blocks: Blocks | None, weights: Weights) -> Tensor:
    """All entries below the diagonal, `(..., D (D - 1) / 2)`, from those within blocks; 0 between.

    Differentiable twice, and under vmap.
    """
    if blocks is None:
        return entries
    within = kept(blocks, weights).to(entries.device)
    index = within.nonzero()[:, 0].expand(entries.shape)
    full = entries.new_zeros(*entries.shape[:-1], len(within))
    return full.scatter(-1, index, entries)
