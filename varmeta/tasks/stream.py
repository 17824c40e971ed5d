"""Tasks that come as they are needed: from a function, a sampler, a Dataset or a DataLoader.

A step's tasks are made into a `TaskSet`, used and forgotten.  Those without a name are called by
their place in the stream, so that no two of them meet the same noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from varmeta._checks import counted, kind_of
from varmeta.numerics.noise import task_id
from varmeta.tasks.batch import Batch
from varmeta.tasks.source import Source, minibatch
from varmeta.tasks.task import Task
from varmeta.tasks.taskset import TaskSet, no_tasks

ByStep = Callable[[int, torch.Generator], Iterable[Task]]
"""(step, generator) -> that step's tasks"""


class ByNumber(Protocol):
    """`tasks[number]` is a task."""

    def __getitem__(self, number: int, /) -> Task: ...


Stream = ByStep | ByNumber | Iterable[Task] | Iterable[Iterable[Task]]
"""What `fit` takes in the place of a TaskSet."""


Cut = Callable[[int], slice]
"""How many tasks a step has -> which of them are this process's."""


class SourceError(Exception):
    """On its way out through a solver; what the source raised is its cause."""


class Reader(ABC):
    """Reads a step's tasks from what the user gave.

    length: how many tasks there are; None: no number of them.
    anywhere: whether any step can be read at any time.
    """

    length: int | None = None
    anywhere = True

    @abstractmethod
    def read(self, step: int) -> Any:
        """The tasks of that step; None where there are none any more."""

    def name(self, step: int, position: int) -> str:
        """What a task is called that has no name."""
        return f"task {position} of step {step}"


class Streamed(Source):
    """The tasks of a stream, step by step, of one kind and under names of their own.

    first: the step from which they are asked for.
    device: where the tasks are moved; None: they stay where they are.
    check: looks at each step's tasks but the first's; set by who knows what they are for.
    count: how many tasks of all processes the step has.
    """

    streams = True

    def __init__(
        self, reader: Reader, first: int, device: torch.device | str | None = None
    ) -> None:
        self.reader, self.total, self.device = reader, reader.length, device
        self.check: Callable[[TaskSet, Batch], None] = lambda tasks, batch: None
        self._cut: Cut | None = None
        found = reader.read(first)
        if found is None:
            raise ValueError("the source of tasks gave none: fit needs tasks to learn from")
        self.tasks = self.now = self._named(found, first)
        self._batch = self.tasks.batch()
        begun = self._named(reader.read(0), 0) if first and reader.anywhere else self.tasks
        self.kept, self.at = begun[:1], first

    def deal(self, cut: Cut) -> None:
        """From here on read of every step's tasks this process's, or one of another's."""
        self._cut = cut
        self.now = self.tasks[self._mine(len(self.tasks))]
        self._batch = self.now.batch()

    def everyone(self, step: int) -> Batch:
        """The tasks of all processes, of the step that was taken last."""
        cut, self._cut = self._cut, None
        found = self.reader.read(step) if self.reader.anywhere else self._found
        tasks = self._alike(self._named(found, step), step)
        self._cut = cut
        return tasks.batch()

    def _mine(self, count: int) -> slice:
        self.count = count
        mine = slice(0, count) if self._cut is None else self._cut(count)
        return mine if mine.start < mine.stop else slice(0, 1)

    def has(self, step: int) -> bool:
        if step == self.at:
            return True
        try:
            found = self.reader.read(step)
            if found is not None:
                found = list(found) if isinstance(found, (tuple, Iterator)) else found
                self._found = None if self.reader.anywhere else found
                tasks = self._alike(self._named(found, step), step)
                batch = tasks.batch()
                self.check(tasks, batch)
                self.now, self._batch, self.at = tasks, batch, step
        except Exception as error:
            raise SourceError from error
        return found is not None

    def batch(self, step: int) -> Batch:
        self.has(step)
        return self.known

    @property
    def known(self) -> Batch:
        return self._batch if self.total is None else replace(self._batch, total=self.total)

    def _named(self, found: Any, step: int) -> TaskSet:
        return self._together(found, step).to(device=self.device)

    def _together(self, found: Any, step: int) -> TaskSet:
        if isinstance(found, TaskSet):
            return found if self._cut is None else found[self._mine(len(found))]
        tasks = list(found) if isinstance(found, (tuple, Iterator)) else found
        listed = isinstance(tasks, (list, _Drawn))
        mine = self._mine(len(tasks) if listed else 0)
        tasks = list(tasks[mine]) if listed else tasks
        wrong = [one for one in tasks if not isinstance(one, Task)] if listed else [tasks]
        if wrong:
            what = f"a list with {kind_of(wrong[0])}" if listed else kind_of(tasks)
            raise TypeError(
                f"the source gave {what} at step {step}, expected a list of vm.Task, or a TaskSet"
            )
        if not tasks:
            raise ValueError(f"the source gave no tasks at step {step}: a step needs at least one")
        return TaskSet(
            task if task.name is not None else replace(task, name=self.reader.name(step, position))
            for position, task in enumerate(tasks, mine.start)
        )

    def _alike(self, tasks: TaskSet, step: int) -> TaskSet:
        tasks = tasks.to(dtype=self.kept.dtype, device=self.kept.device)
        first = kind(self.kept)
        for what, came in kind(tasks).items():
            if came != first[what]:
                raise ValueError(
                    f"{what} of the source's tasks of step {step} is {came}, but {first[what]} of "
                    "its first ones: all must be alike"
                )
        return tasks


def kind(tasks: TaskSet) -> dict[str, Any]:
    """What all tasks of a stream have in common, by its name."""
    y = tasks.support_rows.y
    return {
        "the shape of a row of x": tasks.x_shape,
        "the shape of a row of y": tuple(y.shape[1:]),
        "the kind of y": "floating" if y.is_floating_point() else "integer",
        "the names of the features": tasks.feature_names,
    }


class FromFunction(Reader):
    """Of a function of the step and a generator that only (seed, step) decide."""

    def __init__(self, function: ByStep, size: int | None, seed: int) -> None:
        self.function, self.size, self.seed = function, size, seed

    def read(self, step: int) -> Any:
        found: Any = self.function(
            step, torch.Generator().manual_seed(task_id(f"step {step} of {self.seed}"))
        )
        found = list(found) if isinstance(found, Iterator) else found
        if self.size is not None and isinstance(found, Sized) and len(found) != self.size:
            raise ValueError(
                f"the function gives {counted(len(found), 'task')} at step {step}, not batch_size="
                f"{self.size}: leave batch_size out"
            )
        return found


class Numbered(Reader):
    """`tasks[number]`: with a length in a new order each epoch, without one on and on."""

    def __init__(self, tasks: Any, size: int | None, seed: int) -> None:
        if size is None:
            raise ValueError("say how many of these tasks a step takes, with batch_size")
        self.tasks, self.seed = tasks, seed
        self.length = len(tasks) if hasattr(tasks, "__len__") else None
        self.size = size if self.length is None else min(size, self.length)

    def _numbers(self, step: int) -> list[int]:
        if self.length is None:
            return list(range(step * self.size, (step + 1) * self.size))
        if not self.length:
            return []
        numbers: list[int] = minibatch(self.length, self.size, self.seed, step).tolist()
        return numbers

    def read(self, step: int) -> Any:
        return _Drawn(self.tasks, self._numbers(step)) or None

    def name(self, step: int, position: int) -> str:
        return f"task {self._numbers(step)[position]}"


class _Drawn(Sequence[Task]):
    """Tasks by their numbers, each drawn when it is asked for."""

    def __init__(self, tasks: Any, numbers: list[int]) -> None:
        self.tasks, self.numbers = tasks, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Drawn(self.tasks, self.numbers[index])
        return self.tasks[self.numbers[index]]


_END = object()  # of an iterator: None is something that it may give


class InOrder(Reader):
    """An iterable of tasks, or of lists of them, one for each step.

    One that can be read again (a DataLoader) is read from its start, past what the steps before
    `first` met, and again from its start when it ends.  An iterator goes on from where it stands,
    and when it ends so does the fit.
    """

    anywhere = False

    def __init__(self, source: Iterable[Any], size: int | None, first: int) -> None:
        self.source, self.size = source, size
        self.iterator: Iterator[Any] = iter(source)
        self.again = self.iterator is not source
        for step in range(first if self.again else 0):
            self.read(step)

    def read(self, step: int) -> Any:
        found = self._read()
        if found is None and self.again:
            self.iterator = iter(self.source)
            found = self._read()
        return found

    def _read(self) -> Any:
        item = next(self.iterator, _END)
        if item is _END:
            return None
        if item is None:
            raise TypeError("the source gave None, expected a vm.Task, or a list of them")
        if not isinstance(item, Task):
            if self.size is not None and isinstance(item, Sized) and len(item) != self.size:
                raise ValueError(
                    f"the source gives a step's tasks at once, {len(item)} of them, not batch_size="
                    f"{self.size}: leave batch_size out"
                )
            return item
        if self.size is None:
            raise ValueError(
                "the source gives one task at a time: say how many a step takes, with batch_size"
            )
        return [item, *islice(self.iterator, self.size - 1)]


def stream_of(
    tasks: object,
    batch_size: int | None,
    seed: int,
    first: int = 0,
    device: torch.device | str | None = None,
) -> Streamed:
    """The stream of a fit's tasks, asked for from step `first` on.

    tasks: a function `(step, generator)` that gives a step's tasks; what gives a task for a number,
        `tasks[number]` (`vm.episodes`, a torch Dataset); or an iterable of tasks, or of lists with
        a step's tasks (a generator, a DataLoader).

    Raises TypeError for anything else, ValueError for a source without tasks.
    """
    return Streamed(_reader(tasks, batch_size, seed, first), first, device)


def _reader(tasks: object, size: int | None, seed: int, first: int) -> Reader:
    finite = isinstance(tasks, (list, tuple, dict, str, bytes, Task, torch.Tensor))
    if finite or hasattr(tasks, "columns") or isinstance(tasks, type):
        raise TypeError(f"tasks must be a TaskSet, not {no_tasks(tasks)}")
    if isinstance(tasks, DataLoader) and tasks.collate_fn is default_collate:
        raise TypeError(
            "this DataLoader collates what it reads into tensors, but tasks stay as they are: give "
            "it collate_fn=list"
        )
    if hasattr(tasks, "__getitem__") and not isinstance(tasks, IterableDataset):
        return Numbered(tasks, size, seed)
    if isinstance(tasks, Iterable):
        return InOrder(tasks, size, first)
    if callable(tasks):
        return FromFunction(tasks, size, seed)
    raise TypeError(f"tasks must be a TaskSet, not {no_tasks(tasks)}")
