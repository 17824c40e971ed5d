"""Tasks of different sizes as one rectangle: rows padded with 0, and a mask of the data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """The data of several tasks.

    x: `(tasks, points, *features)`, floating.
    y: `(tasks, points, *event)`, floating or int64.
    mask: `(tasks, points)`, True where a row is data.  Where it is False, x and y are 0 and mean
        nothing.
    features: what is known of each task as a whole, by name, `(tasks,)`, in the dtype of x.
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self.mask)

    @property
    def num_points(self) -> Tensor:
        """The number of data rows of each task, `(tasks,)`, int64."""
        return self.mask.sum(-1)

    @cached_property
    def filled(self) -> tuple[Tensor, Tensor]:
        """x and y with a row of real data wherever there is padding.

        It is the task's first row, or where it has none another task's.

        The mask makes padding count for nothing, but a density or network that is infinite at 0 (a
        Gamma, a logarithm of x) would still send 0 * inf = NaN back through it.
        """
        return _fill(self.x, self.mask), _fill(self.y, self.mask)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Data:
        """On another device.

        `dtype` is given to floating tensors only, so class labels stay int64.
        """
        features = {name: cast(value, dtype, device) for name, value in self.features.items()}
        return Data(
            cast(self.x, dtype, device),
            cast(self.y, dtype, device),
            self.mask.to(device=device),
            features,
        )

    def take(self, rows: Tensor | slice) -> Data:
        """The tasks at the positions `rows`, int64 `(n,)`, or views of those in a slice.

        Still as wide as before.
        """
        features = {name: value[rows] for name, value in self.features.items()}
        return Data(self.x[rows], self.y[rows], self.mask[rows], features)

    def first_points(self, number: int) -> Data:
        """Of every task the first `number` rows, padding included."""
        return replace(self, x=self.x[:, :number], y=self.y[:, :number], mask=self.mask[:, :number])

    def part(self, begin: int, end: int) -> Data:
        """The tasks from `begin` up to `end`, as views, their padding filled as it is here."""
        rows = slice(begin, end)
        data = self.take(rows)
        data.__dict__["filled"] = tuple(values[rows] for values in self.filled)
        return data

    def take_points(self, index: Tensor) -> Data:
        """Of every task the rows `index`, int64 `(tasks, n)`."""
        task = torch.arange(len(self), device=index.device).unsqueeze(-1)
        return replace(
            self, x=self.x[task, index], y=self.y[task, index], mask=self.mask[task, index]
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """Some tasks of a set, padded to the largest task of the whole set.

    So shapes do not change between batches.

    query: None where no task of the set has query data.
    ids: int64 `(tasks,)`, a fingerprint of the name: a task's random numbers follow it wherever it
        stands.
    rows: int64 `(tasks,)`, positions in the whole set.
    total: how many tasks these stand for: as many as the set has, less for a part of a batch.
    whole: whether trees that are stored have a row for each of these and no others, in order.
    share: how much of what does not belong to any task, the hyperprior, is counted with these.
    """

    support: Data
    query: Data | None
    ids: Tensor
    names: tuple[str, ...]
    rows: Tensor
    total: float
    whole: bool = False
    share: float = 1.0

    def part(self, begin: int, end: int) -> Batch:
        """The tasks from `begin` up to `end`, a batch by itself.

        Values of parts add up to that of the batch.
        """
        share = (end - begin) / len(self)
        query = None if self.query is None else self.query.part(begin, end)
        support, names, rows = (
            self.support.part(begin, end),
            self.names[begin:end],
            self.rows[begin:end],
        )
        return Batch(
            support,
            query,
            self.ids[begin:end],
            names,
            rows,
            self.total * share,
            True,
            self.share * share,
        )

    def of(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch's rows of what is stored for all tasks.

        All of it, and no copy, where the batch is everybody.
        """
        return stored if self.whole else {name: x[self.rows] for name, x in stored.items()}

    def into(self, stored: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """`stored` with the batch's rows replaced by `new`, as a new tree."""
        return {
            name: new[name] if self.whole else x.index_copy(0, self.rows, new[name])
            for name, x in stored.items()
        }

    def __len__(self) -> int:
        return len(self.names)

    def repeat(self, number: int) -> Batch:
        """All tasks `number` times, one whole batch after another."""
        if number == 1:
            return self
        again = torch.arange(len(self), device=self.rows.device).repeat(number)
        query = None if self.query is None else self.query.take(again)
        support, names = self.support.take(again), self.names * number
        return Batch(support, query, self.ids[again], names, self.rows[again], self.total)

    def require_query(self) -> Data:
        if self.query is None:
            raise ValueError(
                "these tasks have no query data: give Task(query=(x, y)), from_frame(query=...), "
                "or split the support with tasks.split(...)"
            )
        return self.query


def _fill(values: Tensor, mask: Tensor) -> Tensor:
    if not mask.shape[1]:
        return values
    first = values[torch.arange(len(mask), device=mask.device), mask.long().argmax(1)]
    some = mask.any(1)
    lender = first[some.long().argmax()] if len(first) else first
    shape = (-1,) + (1,) * (values.dim() - 2)
    first = torch.where(
        some.reshape(shape), first, torch.where(some.any(), lender, torch.zeros_like(lender))
    )
    return torch.where(mask.reshape(*mask.shape, *shape[1:]), values, first.unsqueeze(1))


def cast(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
