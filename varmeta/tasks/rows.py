"""The rows of many tasks, one task after another: no padding, however much their sizes differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from varmeta.tasks.arrays import Part


@dataclass(frozen=True, eq=False)
class Rows:
    """The support, or the query, of all tasks of a set.

    x: `(rows, *features)`, floating.
    y: `(rows, *event)`, floating or int64.
    counts: how many of these rows are each task's, in order, `(tasks,)`, int64; they sum to `rows`.

    >>> rows = Rows.of([(torch.ones(1), torch.ones(1)), None, (torch.ones(2), torch.ones(2))])
    >>> rows.counts.tolist(), rows.offsets.tolist(), rows.owner.tolist()
    ([1, 0, 2], [0, 1, 1, 3], [0, 2, 2])
    >>> x, y, mask = rows.padded()
    >>> x.tolist(), mask.sum(-1).tolist()
    ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [1, 0, 2])
    """

    x: Tensor
    y: Tensor
    counts: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part | None], like: Part | None = None) -> Rows:
        """Copies of ragged parts, None for a task without data.

        like: an empty part that gives shapes, dtypes and device, needed where no task has data.
        """
        known = [part for part in (like, *parts) if part is not None]
        x, y = (torch.cat([part[i] for part in known]) for i in (0, 1))
        counts = [0 if part is None else len(part[0]) for part in parts]
        return cls(x, y, torch.tensor(counts, dtype=torch.int64, device=x.device))

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.counts)

    @cached_property
    def offsets(self) -> Tensor:
        """Where each task's rows begin, and where the last one's end, `(tasks + 1,)`, int64."""
        return torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))

    @cached_property
    def owner(self) -> Tensor:
        """The position of the task that each row belongs to, `(rows,)`, int64."""
        return torch.repeat_interleave(self.counts, output_size=len(self.x))

    def place(self, row: int) -> tuple[int, int]:
        """The task that a row belongs to, and which of its rows it is, both from 0."""
        task = int(self.owner[row])
        return task, row - int(self.offsets[task])

    @cached_property
    def _bounds(self) -> list[int]:
        return list(accumulate(self.counts.tolist(), initial=0))

    def part(self, position: int) -> Part | None:
        """One task's rows, as views; None where it has none."""
        begin, end = self._bounds[position], self._bounds[position + 1]
        return (self.x[begin:end], self.y[begin:end]) if begin < end else None

    def bare(self, names: Sequence[str]) -> list[str]:
        """Of the tasks' names, those of tasks that have none of these rows."""
        return [n for n, count in zip(names, self.counts.tolist(), strict=True) if not count]

    def same(self, other: Rows) -> bool:
        """Whether every number is the same."""
        mine, its = (self.x, self.y, self.counts), (other.x, other.y, other.counts)
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(mine, its, strict=True))

    def take(self, positions: Tensor) -> Rows:
        """The rows of the tasks at the positions, int64 `(n,)`, in that order."""
        counts = self.counts[positions]
        # each row moves as far as its task's first row does
        moved = self.offsets[positions] - (counts.cumsum(0) - counts)
        index = moved.repeat_interleave(counts)
        index += torch.arange(len(index), device=index.device)
        return Rows(self.x[index], self.y[index], counts)

    def where(self, mask: Tensor) -> Rows:
        """The rows at which `mask`, `(rows,)`, is True, of the same tasks."""
        counts = torch.zeros_like(self.counts).index_add_(0, self.owner, mask.long())
        return Rows(self.x[mask], self.y[mask], counts)

    def joined(self, other: Rows) -> Rows:
        """Each task's rows, and after them its rows in `other`."""
        order = torch.cat([self.owner, other.owner]).argsort(stable=True)
        x, y = torch.cat([self.x, other.x])[order], torch.cat([self.y, other.y])[order]
        return Rows(x, y, self.counts + other.counts)

    def mapped(self, change: Callable[[Part, str | None], Part], names: Sequence[str]) -> Rows:
        """`change((x, y), None)` of all rows at once, which gives one row for each.

        What it refuses (ValueError, TypeError) it is given again as `change((x, y), name)`, task by
        task, so that it names the task and counts its rows.
        """
        try:
            x, y = change((self.x, self.y), None)
            if not len(x) == len(y) == len(self.x):
                raise ValueError(
                    f"a change of rows must give one of x and y for each: of {len(self.x)} came "
                    f"{len(x)} and {len(y)}"
                )
        except (ValueError, TypeError) as error:
            whole = error
        else:
            return Rows(x, y, self.counts.to(x.device))
        for position, name in enumerate(names):
            part = self.part(position)
            if part is not None:
                change(part, name)
        raise whole

    def head(self, number: int) -> Rows:
        """The first `number` rows of every task."""
        begins = self.offsets[:-1].repeat_interleave(self.counts)
        return self.where(torch.arange(len(self.x), device=self.x.device) - begins < number)

    def between(self, tasks: slice) -> Rows:
        """The rows of the tasks in a slice without a step, as views."""
        begin, end, _ = tasks.indices(len(self))
        first, last = int(self.offsets[begin]), int(self.offsets[max(begin, end)])
        return Rows(self.x[first:last], self.y[first:last], self.counts[begin:end])

    @cached_property
    def largest(self) -> int:
        """Rows of the largest task."""
        return int(self.counts.max()) if len(self) else 0

    def padded(self, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and the mask of one rectangle `(tasks, width)`, padded with 0.

        width: None: as wide as the largest task, which a single large task makes large.
        """
        width = self.largest if width is None else width
        if len(self.x) == len(self) * width:  # no padding, and so no copy either
            mask = torch.ones(len(self), width, dtype=torch.bool, device=self.x.device)
            x, y = (part.reshape(*mask.shape, *part.shape[1:]) for part in (self.x, self.y))
            return x, y, mask
        mask = torch.arange(width, device=self.x.device) < self.counts[:, None]
        # the mask reads row by row, which is the order of the rows
        x, y = (
            part.new_zeros(*mask.shape, *part.shape[1:]).masked_scatter_(
                mask.reshape(*mask.shape, *[1] * (part.dim() - 1)), part
            )
            for part in (self.x, self.y)
        )
        return x, y, mask
