"""Many small data sets: `Task` is one, `TaskSet` all, `Batch` what a model sees."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import counted, kind_of
from varmeta.numerics.noise import task_id
from varmeta.tasks.arrays import Part, as_part
from varmeta.tasks.batch import Batch, Data, cast, pad
from varmeta.tasks.common import check_names, fit_to, in_dtypes, like_of
from varmeta.tasks.features import as_features, stacked
from varmeta.tasks.frame import Columns, features_of_frame, parts_of_frame
from varmeta.tasks.scaling import Reads, Scaling

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Batch", "Data", "Task", "TaskSet"]


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """The data of one task.

    It is checked, and turned into tensors, when it is put into a `TaskSet`.

    support: (x, y), arrays, tensors or lists with one row per point, to adapt with; None or empty:
        no data yet.
    query: (x, y) of the same shapes, to be judged on.
    name: unique in a set; unnamed tasks are called "task 0", "task 1", ... by their position.
    features: what is known of the task as a whole, numbers by name, the same names in every task of
        a set: what `GaussianPrior(covariates=...)` moves the prior by.
    """

    support: tuple[Any, Any] | None = None
    query: tuple[Any, Any] | None = None
    name: str | None = None
    features: Mapping[str, float] | None = None

    def __repr__(self) -> str:
        sizes = [
            f"{part}={_size(getattr(self, part))}"
            for part in ("support", "query")
            if getattr(self, part) is not None
        ]
        return f"Task({', '.join([repr(self.name), *sizes])})"


def _size(part: Any) -> str:
    try:
        return f"{len(part[1])} points"
    except (TypeError, IndexError):  # not checked yet
        return type(part).__name__


class TaskSet:
    """Tasks of different sizes with one kind of data.

    x becomes floating: whole numbers and booleans are converted to the dtype of the floating data
    in the set, or where there are none to float64; if all x is uint8, as images are, to torch's
    default dtype.  y keeps its kind: all-integer y stays int64 (classes, counts), but if any task's
    y is floating all are.  Floating data keep their precision (numpy float64 stays float64); Python
    lists take torch's default.  All data are copied.

    tasks: `Task`s, in a fixed order.
    dtype: cast floating data to it; by default all must share one dtype.
    x_names: what the columns of x are called, for printing; `from_frame` knows them.

    Raises ValueError, naming the task and row: no tasks, a name used twice, x and y of different
    lengths, NaN or infinity, masked entries, integers beyond int64, numbers that the dtype cannot
    hold, shapes that differ between tasks or between support and query, different dtypes or
    devices, x_names of another number, features that some tasks lack.
    TypeError: what is not made of real numbers.

    >>> first, late = Task(([0.0, 1.0], [0.5, 1.5])), Task(support=([2.0], [2.5]), name="late")
    >>> tasks = TaskSet([first, late])
    >>> tasks
    TaskSet(2 tasks, 3 support points (1 to 2 per task), no query, x (), float32)
    >>> tasks.batch().support.mask.tolist()
    [[True, True], [True, False]]
    """

    x_names: tuple[str, ...] | None
    # whether a scaling that was told of no likelihood left whole numbers in y as they were
    left_raw = False

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        dtype: torch.dtype | None = None,
        x_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(tasks, Task):
            raise TypeError("expected a list of tasks, got a single Task: write TaskSet([task])")
        if hasattr(tasks, "columns"):
            raise TypeError(f"expected a list of tasks, got {no_tasks(tasks)}")
        given = list(tasks)
        for i, task in enumerate(given):
            if not isinstance(task, Task):
                raise TypeError(
                    f"entry {i} is a {type(task).__name__}, expected a Task: write "
                    "Task(support=(x, y))"
                )
        names = [
            f"task {i}" if task.name is None else str(task.name) for i, task in enumerate(given)
        ]
        supports = [
            as_part(t.support, f"task {name!r}: support")
            for t, name in zip(given, names, strict=True)
        ]
        queries = [
            as_part(t.query, f"task {name!r}: query") for t, name in zip(given, names, strict=True)
        ]
        like = like_of(names, supports, queries, dtype)
        features = as_features([task.features for task in given], names)
        parts = fit_to(supports, like, names, "support"), fit_to(queries, like, names, "query")
        checked = [Task(*ts) for ts in zip(*parts, names, features, strict=True)]
        some = any(part is not None for part in (*supports, *queries))
        self._set(checked, like, check_names(x_names, like[0] if some else None))

    def _set(self, tasks: list[Task], like: Part, x_names: tuple[str, ...] | None) -> None:
        if not tasks:
            raise ValueError("no tasks: a TaskSet needs at least one Task (it may have no data)")
        self.names = tuple(str(task.name) for task in tasks)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(
                f"{counted(len(twice), 'task name')} {'is' if len(twice) == 1 else 'are'} used "
                f"more than once, {twice[0]!r} first: names tell tasks apart, so give each its own "
                "with Task(name=...)"
            )
        self._tasks, self._like, self.x_names = tasks, like, x_names

    def _derived(self, tasks: list[Task], like: Part | None = None) -> TaskSet:
        """The same columns with other tasks, which have been checked already."""
        new = TaskSet.__new__(TaskSet)
        new._set(tasks, self._like if like is None else like, self.x_names)
        new.left_raw = self.left_raw
        return new

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        task: str,
        x: Columns,
        y: Columns,
        query: str | None = None,
        *,
        features: Sequence[str] = (),
    ) -> TaskSet:
        """One task per group of a long table, which has one row per observation.

        Tasks stand in order of first appearance and are named `str(value)`; rows keep the table's
        order.

        task: the column that says which task a row belongs to.
        x: the predictors: "a" gives x of shape `(points,)`, ["a", "b"] `(points, 2)`, [] `(points,
            0)`.
        y: the response, a column or several.
        query: a column of booleans or 0 and 1 that marks the query rows; None: all rows are
            support.
        features: columns that say something of the whole task (a county's uranium), each with one
            value per task.

        Raises ValueError for missing columns, values or task labels (with the row's label in the
        table), and for a feature that differs within a task; TypeError for columns that are not
        numbers.

        >>> import pandas
        >>> columns = {"school": ["b", "b", "a"], "hours": [1, 2, 3], "score": [0.5, 1.0, 2.0]}
        >>> frame = pandas.DataFrame(columns)
        >>> tasks = TaskSet.from_frame(frame, task="school", x=["hours"], y="score")
        >>> tasks.names, tuple(tasks.batch().support.x.shape)
        (('b', 'a'), (2, 2, 1))
        """
        parts = parts_of_frame(frame, task, x, y, query)
        known = features_of_frame(frame, task, features)
        # one table, so its columns are brought to their common precision instead of refused
        kinds = {a.dtype for a in parts[0][1] if a.dtype.kind == "f"}
        common = torch.from_numpy(np.zeros(0, np.result_type(*kinds))).dtype if kinds else None
        x_names = [x] if isinstance(x, str) else x
        tasks = [
            Task(support, asked, name, own)
            for (name, support, asked), own in zip(parts, known, strict=True)
        ]
        return cls(tasks, dtype=common, x_names=x_names)

    # -- the tasks ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    @overload
    def __getitem__(self, index: int | str) -> Task: ...
    @overload
    def __getitem__(
        self, index: slice | Sequence[int] | Sequence[bool] | np.ndarray | Tensor
    ) -> TaskSet: ...
    def __getitem__(self, index: Any) -> Task | TaskSet:
        """A position or a name gives a `Task`; a slice, positions or a boolean mask a `TaskSet`."""
        if isinstance(index, str):
            if index not in self.names:
                raise KeyError(
                    f"no task is called {index!r}; the first names are {list(self.names[:5])}"
                )
            return self._tasks[self.names.index(index)]
        if isinstance(index, slice):
            return self._derived(self._tasks[index])
        if np.ndim(index.cpu() if isinstance(index, Tensor) else index) == 0:
            return self._tasks[self._position(index)]
        return self._derived([self._tasks[i] for i in self._positions(index)])

    def _position(self, index: Any) -> int:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there is no task at position {i}: the set has {len(self)} tasks")
        return i % len(self)

    def _positions(self, index: Any) -> list[int]:
        array = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
            raise TypeError(f"expected a list of positions or a mask, got {index!r}")
        if array.dtype.kind == "b":
            if len(array) != len(self):
                raise IndexError(
                    f"the mask has {len(array)} entries but the set has {len(self)} tasks"
                )
            array = np.flatnonzero(array)
        outside = array[(array < -len(self)) | (array >= len(self))]
        if len(outside):
            self._position(outside[0])  # says so
        # not one by one: a landscape asks for 100,000 rows
        positions: list[int] = (array % len(self)).tolist()
        return positions

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x, and of y where it is floating."""
        return self._like[0].dtype

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of a row of x; `()` where no task has data."""
        return tuple(self._like[0].shape[1:])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What is known of every task as a whole, by name."""
        return tuple(self._tasks[0].features or ())

    @property
    def device(self) -> torch.device:
        return self._like[0].device

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TaskSet:
        """The same tasks in another precision or place; integer y stays int64.

        Raises ValueError, naming the task and row, for numbers that the dtype cannot hold.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"dtype must be a floating torch.dtype, e.g. torch.float64, not {dtype!r}; see "
                "device="
            )

        def move(part: Part | None, name: str | None, what: str) -> Part | None:
            if part is None:
                return None
            x, y = in_dtypes(
                part, (dtype, dtype if part[1].is_floating_point() else None), name, what
            )
            return x.to(device=device), y.to(device=device)

        like = cast(self._like[0], dtype, device), cast(self._like[1], dtype, device)
        return self._derived(
            [
                replace(
                    t,
                    support=move(t.support, t.name, "support"),
                    query=move(t.query, t.name, "query"),
                )
                for t in self
            ],
            like,
        )

    def __repr__(self) -> str:
        count = counted(len(self), "task")
        parts = [_describe(what, [getattr(t, what) for t in self]) for what in ("support", "query")]
        kind = str(self.dtype).removeprefix("torch.") + (
            "" if self._like[1].is_floating_point() else ", y int64"
        )
        known = f", features {', '.join(self.feature_names)}" if self.feature_names else ""
        return f"TaskSet({count}, {', '.join(parts)}, x {self.x_shape}{known}, {kind})"

    # -- what a model sees -------------------------------------------------------------------------

    @cached_property
    def _support(self) -> Data:
        return replace(pad([task.support for task in self], self._like), features=self._features)

    @cached_property
    def _query(self) -> Data | None:
        queries = [task.query for task in self]
        if all(query is None for query in queries):
            return None
        return replace(pad(queries, self._like), features=self._features)

    @cached_property
    def _features(self) -> dict[str, Tensor]:
        return stacked([task.features or {} for task in self], self._like[0])

    @cached_property
    def _ids(self) -> Tensor:

        return torch.tensor(
            [task_id(name) for name in self.names], dtype=torch.int64, device=self.device
        )

    def batch(self, rows: Sequence[int] | np.ndarray | Tensor | None = None) -> Batch:
        """The tasks at the positions `rows` (None: all), padded to the set's largest task.

        The tensors may share memory with the set: do not write into them.
        """
        if rows is None:
            everyone = torch.arange(len(self), device=self.device)
            return Batch(
                self._support, self._query, self._ids, self.names, everyone, len(self), whole=True
            )
        positions = self._positions(rows)
        if not positions:
            raise ValueError("rows is empty: a batch needs at least one task")
        at = torch.tensor(positions, device=self.device)
        query = None if self._query is None else self._query.take(at)
        names = tuple(self.names[i] for i in positions)
        return Batch(self._support.take(at), query, self._ids[at], names, at, len(self))

    def first_difference(self, other: TaskSet) -> str | None:
        """Where another set differs from this one, in a few words.

        None where every name and number is the same.
        """
        if len(self) != len(other):
            return f"{len(other)} tasks instead of {len(self)}"
        for mine, its in zip(self, other, strict=True):
            if mine.name != its.name:
                return f"{its.name!r} where it had {mine.name!r}"
            for what in ("support", "query"):
                parts = getattr(mine, what), getattr(its, what)
                if (parts[0] is None) != (parts[1] is None) or (
                    parts[0] is not None
                    and not all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*parts, strict=True))
                ):
                    return f"the {what} of {mine.name!r} has other numbers"
            if mine.features != its.features:
                return (
                    f"the features of {mine.name!r} are {its.features} instead of {mine.features}"
                )
        return None

    # -- new sets from old -------------------------------------------------------------------------

    def split(self, num_support: int | float, seed: int = 0) -> TaskSet:
        """Keep some of each task's support rows, chosen at random, and move the rest to its query.

        num_support: an int keeps that many rows, and a task that has no more keeps them all and
            gains no query; a float between 0 and 1 keeps that fraction, rounded, but at least one
            row on either side where there are two.
        seed: rows are chosen by (seed, task name), so a task is split alike whichever tasks stand
            beside it.

        Rows keep their order; query rows that a task has already come first.
        Raises ValueError for a negative count, or a fraction that is not between 0 and 1.

        >>> TaskSet([Task(support=([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]))]).split(2)
        TaskSet(1 task, 2 support points (2 to 2 per task),
                1 query points (1 to 1 per task), x (), float32)
        """
        is_count = isinstance(num_support, (int, np.integer)) and not isinstance(num_support, bool)
        if not (
            num_support >= 0 if is_count else isinstance(num_support, float) and 0 < num_support < 1
        ):
            raise ValueError(
                f"num_support is {num_support!r}, expected a count 0, 1, 2, ... or a fraction like "
                "0.5"
            )
        if operator.index(seed) < 0:
            raise ValueError(f"seed is {seed}, expected 0, 1, 2, ...")
        ids = self._ids.tolist()
        return self._derived(
            [_split(t, num_support, (seed, i)) for t, i in zip(self, ids, strict=True)]
        )

    def with_query(self) -> TaskSet:
        """The tasks that have query data: `split` gives a task of one row none.

        Raises ValueError where no task has any.

        >>> tasks = TaskSet([Task(([0.0], [1.0])), Task(([0.0, 1.0], [1.0, 2.0]))])
        >>> tasks.split(0.5).with_query().names
        ('task 1',)
        """
        rows = [
            row for row, task in enumerate(self) if task.query is not None and len(task.query[1])
        ]
        if not rows:
            raise ValueError(
                "none of these tasks has query data: give Task(query=(x, y)), or split the support"
            )
        return self[rows]

    def merged(self) -> TaskSet:
        """Each task's query data joined to its support.

        The inverse of `split`, up to the order of rows.

        >>> TaskSet([Task(([1.0], [2.0]), query=([3.0], [4.0]))]).merged()[0].support
        (tensor([1., 3.]), tensor([2., 4.]))
        """

        def joined(task: Task) -> Part | None:
            parts = [part for part in (task.support, task.query) if part is not None]
            return (
                (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
                if parts
                else None
            )

        return self._derived([replace(task, support=joined(task), query=None) for task in self])

    def standardized(self, likelihood: Reads | None = None) -> tuple[TaskSet, Scaling]:
        """Every x column and y with mean 0 and sd 1 over all tasks' support rows pooled.

        Features over tasks.

        likelihood: says what y is.  Of Gaussian and StudentT (and a likelihood of one's own whose
            kind is "regression") integers are numbers and are scaled too; classes, counts,
            log-normal responses and the weights of `Weighted` stay as they are. None: floating y is
            scaled, all of its columns, and integers stay, of which `fit` warns where the model
            takes them for numbers.

        The sd divides by the number of rows; a constant column is centred only.  Query rows are
        scaled with the support's numbers; further tasks with `Scaling.apply`.  Raises ValueError
        where no task has support data.

        >>> tasks, scaling = TaskSet([Task(support=([1.0, 3.0], [10.0, 10.0]))]).standardized()
        >>> tasks[0].support[0].tolist(), scaling.y_loc.item(), scaling.y_scale.item()
        ([-1.0, 1.0], 10.0, 1.0)
        >>> from varmeta import likelihoods
        >>> raw = TaskSet([Task(support=([1.0, 3.0], [10, 14]))])
        >>> tasks, scaling = raw.standardized(likelihoods.Gaussian())
        >>> tasks[0].support[1].tolist()
        [-1.0, 1.0]
        """
        supports = [task.support for task in self if task.support is not None]
        if not supports:
            raise ValueError(
                "no task has support data, so there is nothing to take a mean of: standardize with "
                "others"
            )
        x, y = (torch.cat([support[i] for support in supports]) for i in (0, 1))
        scaling = Scaling.of(x, y, self.batch().support.features, likelihood)
        return scaling.apply(self), scaling

    def mapped(
        self,
        rows: Callable[[Part, str | None], Part],
        features: Callable[[Mapping[str, float]], dict[str, float]],
        left_raw: bool,
    ) -> Self:
        """The tasks with every (x, y), support and query, replaced by `rows((x, y), name)`, and
        their features likewise.

        left_raw: whether whole numbers in y were left as they were for want of a likelihood.
        """

        def one(task: Task) -> Task:
            support, query = (
                None if p is None else rows(p, task.name) for p in (task.support, task.query)
            )
            return replace(
                task, support=support, query=query, features=features(task.features or {})
            )

        new = type(self)([one(task) for task in self], dtype=self.dtype, x_names=self.x_names)
        new.left_raw = left_raw
        return new


def no_tasks(value: object) -> str:
    """What came instead of a TaskSet, and how to make one of it."""
    if hasattr(value, "columns"):
        return (
            "a table: make tasks of it, TaskSet.from_frame(table, task='...', x=['...'], y='...')"
        )
    if isinstance(value, tuple) and value and isinstance(value[0], TaskSet):
        return "a tuple: standardized() returns (tasks, scaling), so take its first"
    return f"{kind_of(value)}: write TaskSet([Task(support=(x, y)), ...])"


def _split(task: Task, num_support: int | float, seed: tuple[int, int]) -> Task:
    if task.support is None:
        return task
    x, y = task.support
    keep = min(int(num_support), len(y))
    if isinstance(num_support, float):
        keep = min(max(round(num_support * len(y)), 1), max(len(y) - 1, 1))
    chosen = np.random.default_rng(seed).permutation(len(y))[:keep]
    kept = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    kept[torch.from_numpy(chosen)] = True
    x_rest, y_rest = (
        torch.cat([*([task.query[i]] if task.query else []), task.support[i][~kept]])
        for i in (0, 1)
    )
    return replace(
        task,
        support=(x[kept], y[kept]) if keep else None,
        query=(x_rest, y_rest) if len(y_rest) else None,
    )


def _describe(what: str, parts: list[Part | None]) -> str:
    sizes = [0 if part is None else len(part[1]) for part in parts]
    return (
        f"{sum(sizes)} {what} points ({min(sizes)} to {max(sizes)} per task)"
        if any(sizes)
        else f"no {what}"
    )
