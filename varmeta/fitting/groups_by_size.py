"""Tasks of very different size, grouped by size so that little of what is computed is padding.

One task of 765 rows among 386 makes a rectangle of which 4 % is data.  Where nothing asks for one
rectangle (joint Newton, posteriors of eta), tasks of about the same size are taken together
instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from varmeta.guides.pyro_guide import PyroGuide
from varmeta.numerics.tree import Tree, take
from varmeta.strategies.problem import Losses, Problem
from varmeta.tasks import Batch

# Cells of padding that one more run of the program is worth.
_WORTH = 4_000


def buckets(batch: Batch) -> list[tuple[Tensor, Batch]]:
    """Groups of tasks of a like size: their positions in `batch`, and their batch.

    Each group's support is padded to its own largest task only.

    The query is left out.  Every task is in one group; a single group where more would not save
    work.
    """
    sizes = batch.support.num_points
    order = sizes.argsort(stable=True)
    ordered = sizes[order].tolist()
    # from the largest down: a group goes on as long as its padding costs less than one more run of
    # the program
    groups: list[list[int]] = []
    width = padding = 0
    for position in reversed(range(len(ordered))):
        padding += width - ordered[position]
        if not groups or padding > _WORTH:
            groups.append([])
            width, padding = ordered[position], 0
        groups[-1].append(position)
    if len(groups) == 1:
        return [(torch.arange(len(batch), device=order.device), replace(batch, query=None))]
    found = []
    for group in groups:
        rows = order[torch.tensor(group, device=order.device)]
        wide = int(sizes[rows].max())
        data = batch.support.take(rows).first_points(wide)
        names = tuple(batch.names[i] for i in rows.tolist())
        found.append(
            (rows, Batch(data, None, batch.ids[rows], names, batch.rows[rows], batch.total))
        )
    return found


def elbo_losses(problem: Problem, batch: Batch) -> Losses:
    """F_i `(tasks,)`, as `problem.losses("elbo", batch, 0)` gives them, group by group."""
    groups = buckets(batch)
    # a user's guide makes its module for one number of tasks
    if len(groups) == 1 or isinstance(problem.guide, PyroGuide):
        return problem.losses("elbo", batch, 0)
    parts = [(rows, problem.losses("elbo", group, 0)) for rows, group in groups]
    back = torch.cat([rows for rows, _ in parts]).argsort()

    def fn(phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([losses(take(phi, rows), eta) for rows, losses in parts])[back]

    return fn
