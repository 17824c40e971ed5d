"""Functions of one number on a grid: where the lowest minimum can be, and where it jumps.

It jumps as a parabola moves over them.

The grid is the only thing here that is not exact: what is narrower than two of its steps is not
seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lowest_wells(values: Tensor) -> tuple[Tensor, Tensor]:
    """Every local minimum whose bottom may be the lowest of its row.

    Its rows and grid points, `(starts,)` each.

    values: `(rows, points)` on an even grid, at least three points.  Each row has one start or
    more: a well of the second difference d has its bottom at most d / 8 below its lowest grid
    point, and four times that is allowed for.

    >>> lowest_wells(torch.tensor([[3.0, 1.0, 2.0, 1.1, 3.0], [3.0, 0.0, 9.0, 8.0, 9.0]]))
    (tensor([0, 0, 1]), tensor([1, 3, 1]))
    """
    inner, left, right = values[:, 1:-1], values[:, :-2], values[:, 2:]
    well = (inner <= left) & (inner < right)
    bend = (left - 2 * inner + right).clamp(min=0)
    lowest = inner.amin(1, keepdim=True)
    kept = well & (inner - 0.5 * bend <= lowest)
    # a level stretch has no strict minimum, and a row must not be lost
    kept.scatter_(1, inner.argmin(1, keepdim=True), True)
    row, point = kept.nonzero(as_tuple=True)
    return row, point + 1


def lowest_of(row: Tensor, values: Tensor, points: Tensor, num_rows: int) -> Tensor:
    """The point with the lowest value of each row, `(num_rows,)`.

    rows, values and points are `(starts,)` each.

    >>> values, at = torch.tensor([2.0, 1.0, 5.0]), torch.tensor([10.0, 20.0, 30.0])
    >>> lowest_of(torch.tensor([0, 0, 1]), values, at, 2)
    tensor([20., 30.])
    """
    lowest = values.new_full((num_rows,), torch.inf).scatter_reduce(0, row, values, "amin")
    best = values == lowest[row]
    return points.new_zeros(num_rows).index_copy(0, row[best], points[best])


def locate_jumps(
    minimum: Callable[[Tensor, Tensor], Tensor],
    grid: Tensor,
    stationary: Tensor,
    anchors: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the global minimum theta*(anchor) of f_i(theta) + lambda/2 (theta - anchor)^2 jumps.

    theta* never falls as the anchor rises.  Where it is continuous it is the inverse of the
    stationary anchor theta + f'(theta) / lambda, which rises there; across a jump that falls
    somewhere.  So an interval of anchors holds a jump if and only if it falls between the minima at
    the two ends, and such intervals are halved until they are narrow.  Two jumps in one interval
    part on the way.

    minimum: (anchors, tasks) `(rows,)` each -> theta* `(rows,)`.
    grid, stationary: theta `(points,)`, and the stationary anchor there, `(points, tasks)`.
    anchors: `(cells + 1,)`, rising: the first intervals.

    Returns anchors, tasks, and theta* to the left and right, `(jumps,)` each, by task and anchor.
    """
    num_tasks = stationary.shape[1]
    falls = torch.zeros_like(stationary, dtype=torch.int64)
    falls[1:] = stationary.diff(dim=0) <= 0
    before = falls.cumsum(0)  # falls up to each point of the grid
    task = torch.arange(num_tasks).repeat_interleave(len(anchors))
    theta = minimum(anchors.repeat(num_tasks), task).reshape(num_tasks, -1)
    task = torch.arange(num_tasks).repeat_interleave(len(anchors) - 1)
    low, high = (part.repeat(num_tasks) for part in (anchors[:-1], anchors[1:]))
    left, right = theta[:, :-1].flatten(), theta[:, 1:].flatten()

    def jumping() -> Tensor:
        first = torch.searchsorted(grid, left)
        last = torch.searchsorted(grid, right, right=True) - 1
        return (last > first) & (
            before[last.clamp(min=0), task] > before[first.clamp(max=len(grid) - 1), task]
        )

    while True:
        keep = jumping()
        low, high, left, right, task = (part[keep] for part in (low, high, left, right, task))
        if not len(low) or float((high - low).max()) <= tolerance:
            return 0.5 * (low + high), task, left, right
        middle = 0.5 * (low + high)
        theta = minimum(middle, task)
        low, high = (
            torch.stack([low, middle], 1).flatten(),
            torch.stack([middle, high], 1).flatten(),
        )
        left, right = (
            torch.stack([left, theta], 1).flatten(),
            torch.stack([theta, right], 1).flatten(),
        )
        task = task.repeat_interleave(2)
