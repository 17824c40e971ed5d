"""Tasks of different sizes as one rectangle: rows padded with 0, and a mask of the data.

A rectangle is made of the set's flat rows when somebody looks at it, so that what only counts
tasks, or cuts them into groups of alike size first, holds every datum once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta.tasks.groups import alike
from varmeta.tasks.rows import Rows

# Rows of padding that one more run of the program is worth.
WORTH = 4_000


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

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        features: dict[str, Tensor],
        dtype: torch.dtype,
        width: int | None = None,
        widest: int | None = None,
    ) -> Data:
        """The tasks' rows, padded when they are looked at.

        dtype: of x as a model sees it; images are kept as bytes until then.
        width: of the rectangle; None: the largest of these tasks'.  widest: of the whole set.
        """
        self = object.__new__(cls)
        width = rows.largest if width is None else width
        # past the frozen fields: x, y and mask are missing until they are asked for
        self.__dict__.update(
            features=features,
            _rows=rows,
            like=torch.zeros((), dtype=dtype, device=rows.x.device),
            width=width,
            widest=width if widest is None else widest,
        )
        return self

    def __getattr__(self, name: str) -> Any:
        """x, y and mask of what was made `of_rows`, which are made when first asked for."""
        if name not in ("x", "y", "mask") or "_rows" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        x, y, mask = self._rows.padded(self.width)
        self.__dict__.update(x=x.to(self.like.dtype), y=y, mask=mask)
        return self.__dict__[name]

    def __len__(self) -> int:
        """The number of tasks."""
        return len(self._rows.counts if self._is_flat else self.mask)

    @cached_property
    def num_points(self) -> Tensor:
        """The number of data rows of each task, `(tasks,)`, int64."""
        return self._rows.counts if self._is_flat else self.mask.sum(-1)

    @cached_property
    def width(self) -> int:
        """Rows of the rectangle, padding included."""
        return self.mask.shape[1]

    @cached_property
    def widest(self) -> int:
        """Rows of the largest task of the set that these are of."""
        return self.width

    @property
    def cells(self) -> int:
        """Rows of all tasks, padding included."""
        return len(self) * self.width

    @cached_property
    def like(self) -> Tensor:
        """A zero in the dtype and on the device of x, `()`."""
        return self.x.new_zeros(())

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of a row of x."""
        return tuple(self._rows.x.shape[1:] if self._is_flat else self.x.shape[2:])

    @property
    def y_shape(self) -> tuple[int, ...]:
        """The shape of a row of y."""
        return tuple(self._rows.y.shape[1:] if self._is_flat else self.y.shape[2:])

    @property
    def _is_flat(self) -> bool:
        return "_rows" in self.__dict__

    @cached_property
    def filled(self) -> tuple[Tensor, Tensor]:
        """x and y with a row of real data wherever there is padding.

        It is the task's first row, or where it has none another task's.

        The mask makes padding count for nothing, but a density or network that is infinite at 0 (a
        Gamma, a logarithm of x) would still send 0 * inf = NaN back through it.
        """
        return _fill(self.x, self.mask), _fill(self.y, self.mask)

    def flat(self) -> tuple[Tensor, Tensor]:
        """x `(rows, *features)` and y `(rows, *event)` of all tasks, one after another."""
        if self._is_flat:
            return self._rows.x.to(self.like.dtype), self._rows.y
        return self.x[self.mask], self.y[self.mask]

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Data:
        """On another device.

        `dtype` is given to floating tensors only, so class labels stay int64.
        """
        features = {name: cast(value, dtype, device) for name, value in self.features.items()}
        if self._is_flat:
            rows, kind = self._rows, dtype or self.like.dtype
            y = cast(rows.y, dtype, device)
            moved = Rows(rows.x.to(dtype=kind, device=device), y, rows.counts.to(device=device))
            return Data.of_rows(moved, features, kind, self.width, self.widest)
        x, y = cast(self.x, dtype, device), cast(self.y, dtype, device)
        found = Data(x, y, self.mask.to(device=device), features)
        found.__dict__["widest"] = self.widest
        return found

    def take(self, rows: Tensor | slice, width: int | None = None) -> Data:
        """The tasks at the positions `rows`, int64 `(n,)`, or views of those in a slice.

        width: of their rectangle; None: that of the largest of them, in a slice still as before.
        """
        features = {name: value[rows] for name, value in self.features.items()}
        is_slice = isinstance(rows, slice)
        if self._is_flat and not (is_slice and "mask" in self.__dict__):
            some = self._rows.between(rows) if is_slice else self._rows.take(rows)
            if width is None and is_slice:
                width = self.width
            # without any rows there is none to fill a rectangle with
            wide = width if len(some.x) else 0
            return Data.of_rows(some, features, self.like.dtype, wide, self.widest)
        wide = self.width if width is None else width
        found = Data(self.x[rows, :wide], self.y[rows, :wide], self.mask[rows, :wide], features)
        found.__dict__["widest"] = self.widest
        return found

    def widened(self) -> Data:
        """As wide as the largest task of the whole set, as other batches of it are."""
        if self.width == self.widest or not self._is_flat:
            return self
        return self.take(slice(0, len(self)), self.widest)

    def first_points(self, number: int) -> Data:
        """Of every task the first `number` rows, padding included."""
        if number >= self.width:
            return self
        if self._is_flat:
            head = self._rows.head(number)
            return Data.of_rows(head, self.features, self.like.dtype, number)
        return replace(self, x=self.x[:, :number], y=self.y[:, :number], mask=self.mask[:, :number])

    def part(self, begin: int, end: int) -> Data:
        """The tasks from `begin` up to `end`, as views, their padding filled as it is here."""
        rows = slice(begin, end)
        data = self.take(rows)
        if "filled" in self.__dict__ or "mask" in self.__dict__:
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
    """Some tasks of a set, padded to the largest of them when they are looked at.

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

    def take(self, positions: Tensor) -> Batch:
        """The tasks at these positions, int64 `(n,)`, padded to the largest of them.

        A batch by itself, as a `part` is.
        """
        share = len(positions) / len(self)
        support, query = (
            None if data is None else data.take(positions) for data in (self.support, self.query)
        )
        assert support is not None
        names = tuple(self.names[i] for i in positions.tolist())
        ids, rows = self.ids[positions], self.rows[positions]
        return Batch(support, query, ids, names, rows, self.total * share, True, self.share * share)

    def widened(self) -> Batch:
        """Padded to the largest task of the set, so that shapes do not change between batches."""
        query = None if self.query is None else self.query.widened()
        return replace(self, support=self.support.widened(), query=query)

    def by_size(self, worth: int | None = None) -> list[Group]:
        """The tasks in groups of alike size; each is in one, and keeps its place among others.

        The batch itself, as it is, where more groups would not save work.

        worth: rows of padding for which no further group is made; None: `WORTH`.

        >>> from varmeta.tasks import Task, TaskSet
        >>> small = [Task(([0.0], [0.0]), name=f"{i}") for i in range(5)]
        >>> large = Task((torch.zeros(9000), torch.zeros(9000)), name="large")
        >>> found = TaskSet([*small[:2], large, *small[2:]]).batch().by_size()
        >>> [(positions.tolist(), group.support.width) for positions, group in found]
        [([2], 9000), ([0, 1, 3, 4, 5], 1)]
        """
        worth = WORTH if worth is None else worth
        kept: dict[int, list[Group]] = self.__dict__.setdefault("_groups", {})
        if worth not in kept:
            parts = [data for data in (self.support, self.query) if data is not None]
            rows = [data.num_points for data in parts]
            pairs = zip(parts, rows, strict=True)
            few = sum(data.cells - int(own.sum()) for data, own in pairs) <= worth
            found = [] if few else alike(rows, worth)
            # a batch that kept itself would be freed late
            several = found if len(found) > 1 else []
            kept[worth] = [Group(positions, self.take(positions)) for positions in several]
        everyone = torch.arange(len(self), device=self.rows.device)
        return kept[worth] or [Group(everyone, self)]

    @property
    def cells(self) -> int:
        """Rows of support that are worked on, padding included."""
        return sum(group.support.cells for _, group in self.by_size())

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
        query = None if self.query is None else self.query.take(again, self.query.width)
        support, names = self.support.take(again, self.support.width), self.names * number
        return Batch(support, query, self.ids[again], names, self.rows[again], self.total)

    def require_query(self) -> Data:
        if self.query is None:
            raise ValueError(
                "these tasks have no query data: give Task(query=(x, y)), from_frame(query=...), "
                "or split the support with tasks.split(...)"
            )
        return self.query


class Group(NamedTuple):
    """Some tasks of a batch.

    positions: where they stand in it, int64 `(n,)`.
    """

    positions: Tensor
    batch: Batch


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
