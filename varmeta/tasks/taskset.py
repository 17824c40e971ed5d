"""Many small data sets: `Task` is one, `TaskSet` all, `Batch` what a model sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import counted, kind_of, no_task
from varmeta.display.shown import Shown
from varmeta.numerics.noise import task_id
from varmeta.tasks.arrays import Part, as_part, refuse_non_finite
from varmeta.tasks.batch import Batch, Data
from varmeta.tasks.common import check_device, check_names, fit_to, in_precision, like_of
from varmeta.tasks.features import as_features, in_dtype_of, refuse_infinite
from varmeta.tasks.frame import Columns, table_of_frame
from varmeta.tasks.positions import position_of, positions_of
from varmeta.tasks.rows import Rows
from varmeta.tasks.scaling import Reads, Scaling, common_scaling
from varmeta.tasks.split import kept_rows
from varmeta.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Batch", "Data", "Task", "TaskSet"]


class TaskSet(Shown):
    """Tasks of different sizes with one kind of data.

    x becomes floating: whole numbers and booleans are converted to the dtype of the floating data
    in the set, or where there are none to float64 (an `nn.Embedding` is given them as whole numbers
    again).  If all x is uint8, as images are, it is kept so, and cast where a batch is made, by
    default to torch's default dtype.  y keeps its kind: all-integer y stays int64 (classes,
    counts), but if any task's y is floating all are.  Floating data keep their precision (numpy
    float64 stays float64); Python lists take torch's default.  All data are copied.

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

    # without padding, which one large task among many makes much larger than the data
    support_rows: Rows
    query_rows: Rows
    names: tuple[str, ...]
    x_names: tuple[str, ...] | None
    # of x as a model sees it, and of y where it is floating: bytes are cast to it in a batch
    dtype: torch.dtype
    # what made these numbers of the raw ones; set it where you scaled them by its numbers yourself
    scaling: Scaling | None = None

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        dtype: torch.dtype | None = None,
        x_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(tasks, Task):
            raise TypeError("expected a list of tasks, got a single Task: write TaskSet([task])")
        if hasattr(tasks, "columns") or _has_no_end(tasks):
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
        supports, queries = (
            [
                as_part(getattr(t, what), f"task {name!r}: {what}")
                for t, name in zip(given, names, strict=True)
            ]
            for what in ("support", "query")
        )
        like, kind = like_of(names, supports, queries, dtype)
        features = as_features([task.features for task in given], names)
        support, query = (
            Rows.of(fit_to(parts, like, names, what), like)
            for parts, what in ((supports, "support"), (queries, "query"))
        )
        some = any(part is not None for part in (*supports, *queries))
        x_names = check_names(x_names, like[0] if some else None)
        self._set(names, support, query, features, x_names, kind)
        known = zip(given, supports, queries, strict=True)
        # a task without any data is in no units
        self.scaling = common_scaling(
            task.scaling for task, s, q in known if s is not None or q is not None
        )

    def _set(
        self,
        names: Sequence[str],
        support: Rows,
        query: Rows,
        features: dict[str, Tensor],
        x_names: tuple[str, ...] | None,
        dtype: torch.dtype,
    ) -> None:
        """dtype: x's own, but for bytes."""
        if not names:
            raise ValueError("no tasks: a TaskSet needs at least one Task (it may have no data)")
        if len(set(names)) < len(names):
            twice = [name for name, count in Counter(names).items() if count > 1]
            raise ValueError(
                f"{counted(len(twice), 'task name')} {'is' if len(twice) == 1 else 'are'} used "
                f"more than once, {twice[0]!r} first: names tell tasks apart, so give each its own "
                "with Task(name=...)"
            )
        self.names, self.x_names, self._known = tuple(names), x_names, features
        self.support_rows, self.query_rows = support, query
        self.dtype = support.x.dtype if support.x.is_floating_point() else dtype

    def _derived(
        self,
        support: Rows | None = None,
        query: Rows | None = None,
        names: Sequence[str] | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Self:
        """The same but for what is given, which has been checked already."""
        new = type(self).__new__(type(self))
        new._set(
            self.names if names is None else names,
            self.support_rows if support is None else support,
            self.query_rows if query is None else query,
            self._known if features is None else features,
            self.x_names,
            self.dtype,
        )
        new.scaling = self.scaling
        return new

    def _changed(
        self,
        change: Callable[[Part, str | None, str], Part],
        features: dict[str, Tensor] | None = None,
    ) -> Self:
        """With `change((x, y), name, what)` of all rows, `what` as in "support"."""
        return self._derived(
            self.support_rows.mapped(lambda part, name: change(part, name, "support"), self.names),
            self.query_rows.mapped(lambda part, name: change(part, name, "query"), self.names),
            features=features,
        )

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
        table = table_of_frame(frame, task, x, y, query, features)
        new = cls.__new__(cls)
        x_names = check_names([x] if isinstance(x, str) else x, table.support.x)
        dtype = table.support.x.dtype
        new._set(table.names, table.support, table.query, table.features, x_names, dtype)
        return new

    # -- the tasks ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Task]:
        return map(self._task, range(len(self)))

    def _task(self, position: int) -> Task:
        return Task(
            self.support_rows.part(position),
            self.query_rows.part(position),
            self.names[position],
            {name: float(value[position]) for name, value in self._known.items()},
            scaling=self.scaling,
        )

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
                raise no_task(index, self.names)
            return self._task(self.names.index(index))
        if isinstance(index, slice):
            # a copy, because torch reads no negative strides
            return self._taken(np.arange(len(self))[index].copy())
        if np.ndim(index.cpu() if isinstance(index, Tensor) else index) == 0:
            return self._task(position_of(index, len(self)))
        return self._taken(positions_of(index, len(self)))

    def _taken(self, positions: np.ndarray) -> TaskSet:
        at = torch.from_numpy(positions)
        support, query = (
            rows.take(at.to(self.device)) for rows in (self.support_rows, self.query_rows)
        )
        features = {name: value[at] for name, value in self._known.items()}
        return self._derived(support, query, [self.names[i] for i in positions.tolist()], features)

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of a row of x; `()` where no task has data."""
        return tuple(self.support_rows.x.shape[1:])

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What is known of every task as a whole, by name."""
        return tuple(self._known)

    @property
    def device(self) -> torch.device:
        return self.support_rows.x.device

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> TaskSet:
        """The same tasks in another precision or place; integer y stays int64.

        Raises ValueError, naming the task and row, for numbers that the dtype cannot hold, and for
        a device that torch does not have here.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                f"dtype must be a floating torch.dtype, e.g. torch.float64, not {dtype!r}; see "
                "device="
            )

        if dtype in (None, self.dtype) and device in (None, self.device):
            return self
        check_device(device)

        def move(part: Part, name: str | None, what: str) -> Part:
            x, y = in_precision(part, dtype, name, what)
            kept = x if part[0].is_floating_point() else part[0]
            return kept.to(device=device), y.to(device=device)

        new = self._changed(move)
        new.dtype = dtype or self.dtype
        return new

    def _table(self) -> pd.DataFrame:
        """Of every task the rows of support and query, and its features."""
        import pandas as pd

        columns = {"support": self.support_rows.counts.tolist()}
        if len(self.query_rows.x):
            columns["query"] = self.query_rows.counts.tolist()
        columns |= {name: value.tolist() for name, value in self._known.items()}
        return pd.DataFrame(columns, index=pd.Index(self.names, name="task"))

    def __repr__(self) -> str:
        count = counted(len(self), "task")
        parts = _describe("support", self.support_rows), _describe("query", self.query_rows)
        kind = str(self.dtype).removeprefix("torch.") + (
            "" if self.support_rows.y.is_floating_point() else ", y int64"
        )
        known = f", features {', '.join(self.feature_names)}" if self.feature_names else ""
        rows = self.support_rows if len(self.support_rows.x) else self.query_rows
        # bytes are stored as bytes, and cast by batch
        stored = " uint8" if rows.x.dtype == torch.uint8 else ""
        return f"TaskSet({count}, {', '.join(parts)}, x {self.x_shape}{stored}{known}, {kind})"

    # -- what a model sees -------------------------------------------------------------------------

    @cached_property
    def features(self) -> dict[str, Tensor]:
        like = torch.zeros((), dtype=self.dtype, device=self.device)
        return in_dtype_of(like, self._known)

    @cached_property
    def _ids(self) -> Tensor:
        return torch.tensor(
            [task_id(name) for name in self.names], dtype=torch.int64, device=self.device
        )

    def batch(self, rows: Sequence[int] | np.ndarray | Tensor | None = None) -> Batch:
        """The tasks at the positions `rows` (None: all), padded to the largest of them.

        They are padded when they are looked at.  The tensors may share memory with the set: do not
        write into them.

        Raises ValueError for no rows, IndexError for positions that there are not.
        """
        if rows is None:
            everyone = torch.arange(len(self), device=self.device)
            support, query = self._data(None)
            return Batch(support, query, self._ids, self.names, everyone, len(self), whole=True)
        positions = positions_of(rows, len(self))
        if not len(positions):
            raise ValueError("rows is empty: a batch needs at least one task")
        at = torch.from_numpy(positions).to(self.device)
        names = tuple(self.names[i] for i in positions.tolist())
        support, query = self._data(at)
        return Batch(support, query, self._ids[at], names, at, len(self))

    def _data(self, at: Tensor | None) -> tuple[Data, Data | None]:
        """Support and query of the tasks at these positions, None: of all."""
        features = self.features
        if at is not None:
            features = {name: value[at] for name, value in features.items()}

        def data(rows: Rows) -> Data:
            if at is None:
                return Data.of_rows(rows, features, self.dtype)
            return Data.of_rows(rows.take(at), features, self.dtype, widest=rows.largest)

        return data(self.support_rows), data(self.query_rows) if len(self.query_rows.x) else None

    def first_difference(self, other: TaskSet) -> str | None:
        """Where another set differs from this one, in a few words.

        None where every name and number is the same.
        """
        if len(self) != len(other):
            return f"{len(other)} tasks instead of {len(self)}"
        known = [{n: v.tolist() for n, v in tasks._known.items()} for tasks in (self, other)]
        if (
            self.names == other.names
            and self.support_rows.same(other.support_rows)
            and self.query_rows.same(other.query_rows)
            and known[0] == known[1]
        ):
            return None
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
        kept = kept_rows(self.support_rows, num_support, seed, self._ids)
        return self._derived(
            self.support_rows.where(kept), self.query_rows.joined(self.support_rows.where(~kept))
        )

    def with_query(self) -> TaskSet:
        """The tasks that have query data: `split` gives a task of one row none.

        Raises ValueError where no task has any.

        >>> tasks = TaskSet([Task(([0.0], [1.0])), Task(([0.0, 1.0], [1.0, 2.0]))])
        >>> tasks.split(0.5).with_query().names
        ('task 1',)
        """
        rows = np.flatnonzero(self.query_rows.counts.cpu().numpy())
        if not len(rows):
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

        nothing = torch.zeros(len(self.query_rows.x), dtype=torch.bool, device=self.device)
        return self._derived(
            self.support_rows.joined(self.query_rows), self.query_rows.where(nothing)
        )

    def standardized(self, likelihood: Reads | None = None) -> tuple[TaskSet, Scaling]:
        """Every x column and y with mean 0 and sd 1 over all tasks' support rows pooled.

        Features over tasks.

        likelihood: says what y is.  Of Gaussian and StudentT (and a likelihood of one's own whose
            kind is "regression") integers are numbers and are scaled too; classes, counts,
            log-normal responses and the weights of `Weighted` stay as they are. None: floating y is
            scaled, all of its columns, and integers stay, of which `fit` warns where the model
            takes them for numbers.

        The sd divides by the number of rows; a constant column is centred only.  Query rows are
        scaled with the support's numbers; further tasks with `Scaling.apply`.  The set remembers
        its scaling, `tasks.scaling`, and so do what is taken from it and a fit to it (`fit.tasks`).
        Raises ValueError where no task has support data.

        >>> tasks, scaling = TaskSet([Task(support=([1.0, 3.0], [10.0, 10.0]))]).standardized()
        >>> tasks[0].support[0].tolist(), scaling.y_loc.item(), scaling.y_scale.item()
        ([-1.0, 1.0], 10.0, 1.0)
        >>> from varmeta import likelihoods
        >>> raw = TaskSet([Task(support=([1.0, 3.0], [10, 14]))])
        >>> tasks, scaling = raw.standardized(likelihoods.Gaussian())
        >>> tasks[0].support[1].tolist()
        [-1.0, 1.0]
        """
        rows = self.support_rows
        if not len(rows.x):
            raise ValueError(
                "no task has support data, so there is nothing to take a mean of: standardize with "
                "others"
            )
        scaling = Scaling.of(rows.x.to(self.dtype), rows.y, self.features, likelihood)
        return scaling.apply(self), scaling

    def mapped(
        self,
        rows: Callable[[Part, str | None], Part],
        features: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        scaling: Scaling,
    ) -> Self:
        """The tasks with every (x, y), support and query, replaced by `rows((x, y), name)`.

        Their features, `(tasks,)`, are replaced likewise.

        rows: takes any number of rows, and gives one for each: it is called with all at once and no
            name, and task by task where it refuses, so that it can name the task.
        scaling: what the new set remembers it was made by, after the one that made this set.
        """

        def one(part: Part, name: str | None, what: str) -> Part:
            x, y = rows((part[0].to(self.dtype), part[1]), name)
            refuse_non_finite(x, f"task {name!r}: {what} x")
            refuse_non_finite(y, f"task {name!r}: {what} y")
            return in_precision((x, y), self.dtype, name, what)

        known = features(self._known)
        refuse_infinite(known, self.names)
        some = len(self.support_rows.x) or len(self.query_rows.x)
        new = self._changed(one, known) if some else self._derived(features=known)
        new.scaling = scaling if self.scaling is None else scaling.after(self.scaling)
        return new


def of_rows(tasks: TaskSet, support: Rows, features: Mapping[str, Tensor]) -> TaskSet:
    """The same tasks with these rows and features, which have been checked, and no query."""
    nothing = torch.zeros(len(support.x), dtype=torch.bool, device=support.x.device)
    known = {name: value.double().cpu() for name, value in features.items()}
    return tasks._derived(support, support.where(nothing), features=known)


def no_tasks(value: object) -> str:
    """What came instead of a TaskSet, and how to make one of it."""
    if hasattr(value, "columns"):
        return (
            "a table: make tasks of it, TaskSet.from_frame(table, task='...', x=['...'], "
            "y='...'), or model.tasks(table) of a formula's model"
        )
    if isinstance(value, tuple) and value and isinstance(value[0], TaskSet):
        return "a tuple: standardized() returns (tasks, scaling), so take its first"
    if _has_no_end(value):
        return (
            f"{kind_of(value)}, which has a task for every number and no end: tasks.take(100) "
            "makes a TaskSet of the first hundred"
        )
    return f"{kind_of(value)}: write TaskSet([Task(support=(x, y)), ...])"


def _has_no_end(tasks: object) -> bool:
    return hasattr(tasks, "take") and not hasattr(tasks, "__len__")


def _describe(what: str, rows: Rows) -> str:
    sizes = rows.counts.tolist()
    return (
        f"{sum(sizes)} {what} points ({min(sizes)} to {max(sizes)} per task)"
        if any(sizes)
        else f"no {what}"
    )
