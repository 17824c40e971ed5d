"""Which tasks of very different size go together, so that little of a rectangle is padding.

One task of 765 rows among 386 makes a rectangle of which 4 % is data.  A group's rectangle is as
wide as its own largest task, and at most a third of it is padding, or few rows are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def alike(sizes: Sequence[Tensor], worth: int) -> list[Tensor]:
    """The positions of tasks of alike size, int64 `(n,)`, group by group from the largest down.

    sizes: of each task, `(tasks,)`: rows of support, and of query where there are any.
    worth: rows of padding for which no further group is made.

    >>> [group.tolist() for group in alike([torch.tensor([2, 9000, 1, 3])], worth=100)]
    [[1], [0, 2, 3]]
    """
    found = [torch.arange(len(sizes[0]), device=sizes[0].device)]
    for own in sizes:
        found = [part for group in found for part in _cut(own[group], group, worth)]
    return found


def _cut(sizes: Tensor, positions: Tensor, worth: int) -> list[Tensor]:
    """The positions, cut where from the largest down padding outgrows half of the data."""
    distinct, counts = sizes.unique(return_counts=True)
    # tasks below an edge belong to a later group
    edges: list[int] = []
    width = padding = rows = 0
    for size, count in zip(*(x.flip(0).tolist() for x in (distinct, counts)), strict=True):
        padding, rows = padding + count * (width - size), rows + count * size
        if not edges or padding > max(worth, rows // 2):
            edges.append(size)
            width, padding, rows = size, 0, count * size
    if len(edges) == 1:
        return [positions]
    # a group's tasks are larger than the next one's largest
    bounds = torch.tensor(edges[::-1], device=sizes.device)
    group = torch.searchsorted(bounds, sizes)
    return [positions[group == number] for number in reversed(range(len(edges)))]
