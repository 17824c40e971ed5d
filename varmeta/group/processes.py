"""Several processes as one: what each worked out of its tasks is added up in all of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.group.beats import CLOSED, Beats
from varmeta.tasks.taskset import TaskSet

if TYPE_CHECKING:
    import pandas as pd
    from torch._C._distributed_c10d import Store, Work

# How long processes wait for each other to begin, and for one that lives but does not come.
BEGIN, LATE = timedelta(minutes=5), timedelta(hours=1)
# How often who waits looks whether the others live; on a GPU, whether it still has to wait.
LOOK, POLL = timedelta(seconds=1), 2e-4


class ProcessError(RuntimeError):
    """Another process has ended, so that this one cannot go on.

    >>> issubclass(ProcessError, RuntimeError)
    True
    """


class Processes:
    """The processes that share one computation: see `processes`, which makes it.

    rank: which of them this one is, from 0, the first.  size: how many they are.

    All must make the same calls in the same order.

    >>> alone = Processes()
    >>> alone.rank, alone.size, alone.is_first
    (0, 1, True)
    """

    def __init__(self, rank: int = 0, size: int = 1, beats: Beats | None = None) -> None:
        self.rank, self.size, self._beats = rank, size, beats
        self._over = ""
        self._pending: Work | None = None  # what another process has not come to

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints, warns, calls callbacks and writes checkpoints."""
        return self.rank == 0

    def __repr__(self) -> str:
        return f"<Processes: {self.rank} of {self.size}>"

    # -- tasks -------------------------------------------------------------------------------------

    def share(self, tasks: TaskSet) -> TaskSet:
        """This process's tasks: as many neighbours as make an equal part of the work.

        Raises ValueError for fewer tasks than processes.

        >>> import varmeta as vm
        >>> with vm.processes() as group:
        ...     len(group.share(vm.datasets.lines(5)))
        5
        """
        begin, end = edges(tasks, self.size)[self.rank :][:2]
        return tasks if self.size == 1 else tasks[begin:end]

    def gather(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of all processes' tables, below each other, in each of them.

        >>> import pandas as pd
        >>> Processes().gather(pd.DataFrame({"rmse": [0.5]}, index=["a"])).index.tolist()
        ['a']
        """
        import pandas as pd

        return pd.concat(self.all(table))

    def cut(self, number: int) -> slice:
        """This process's of so many things, dealt out evenly."""
        return slice(*(number * rank // self.size for rank in (self.rank, self.rank + 1)))

    # -- what all must do at once ------------------------------------------------------------------

    def add(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, of one shape: the same bits in each of them.

        In float64, so that how many processes there are changes nothing but rounding.
        """
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.double()  # a copy, unless it is one already
        total = total.clone() if total is values else total
        self._finish(partial(dist.all_reduce, total, async_op=True), total)
        return total.to(values.dtype)

    def rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """All processes' rows below each other, `(sum of counts, ...)`.

        own: this one's, `(counts[rank], ...)`; counts: how many each of them has.
        """
        if self.size == 1:
            return own
        import torch.distributed as dist

        found = [own.new_empty((count, *own.shape[1:])) for count in counts]
        found[self.rank].copy_(own)
        for rank, part in enumerate(found):
            self._finish(partial(dist.broadcast, part, rank, async_op=True), part)
        return torch.cat(found)

    def all(self, thing: Any) -> list[Any]:
        """What each process gave, in their order: anything that can be pickled."""
        if self.size == 1:
            return [thing]
        import io

        import numpy as np

        written = io.BytesIO()
        torch.save(thing, written)
        own = torch.from_numpy(np.frombuffer(written.getvalue(), dtype=np.uint8).copy())
        sizes = torch.zeros(self.size, dtype=torch.float64)
        sizes[self.rank] = len(own)
        counts = [int(size) for size in self.add(sizes).tolist()]
        parts = self.rows(own, counts).split(counts)
        return [
            torch.load(io.BytesIO(part.numpy().tobytes()), weights_only=False) for part in parts
        ]

    @contextmanager
    def telling(self) -> Iterator[None]:
        """A block whose failure ends the work of all: the others are told of it."""
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise

    def _finish(self, begin: Callable[[], Any], value: Tensor) -> None:
        """Wait until all have taken part.

        Raises ProcessError where one of them does not live any more, or has not come for long.
        """
        assert self._beats is not None
        if self._over:
            raise ProcessError(f"these processes do not work together any more: {self._over}")
        until = monotonic() + LATE.total_seconds()
        try:
            work = begin()
            while not _has_ended(work, value):
                self._pending = work
                gone = self._beats.gone()
                if gone is not None:
                    raise ProcessError(gone)
                if monotonic() > until:
                    raise ProcessError(f"another process has not come for {LATE}, but it lives")
            self._pending = None
        except ProcessError:
            raise
        except RuntimeError as error:  # a connection is closed: by whom?
            self._pending = None
            until = monotonic() + 2 * CLOSED
            gone = self._beats.gone(closed=True)
            while gone is None and monotonic() < until:
                sleep(0.1)
                gone = self._beats.gone(closed=True)
            raise ProcessError(gone or f"the processes lost each other: {error}") from error

    def _end(self, error: BaseException) -> None:
        if self._beats is not None and not self._over:
            own = str(error) if isinstance(error, ProcessError) else repr(error)
            self._over = own
            self._beats.end(own)


def _has_ended(work: Work, value: Tensor) -> bool:
    """Whether it has, after at most `LOOK`; raises RuntimeError where it failed."""
    if value.device.type == "cpu":
        try:
            work.wait(LOOK)
        except RuntimeError:
            if work.is_completed():
                raise
            return False
        return True
    until = monotonic() + LOOK.total_seconds()
    while not work.is_completed():
        if monotonic() > until:
            return False
        sleep(POLL)
    work.wait()
    return True


def check_processes(given: object) -> None:
    """Raise TypeError where that is no group."""
    if not isinstance(given, Processes):
        raise TypeError(
            f"processes takes what `with vm.processes() as group:` gives, not {kind_of(given)}"
        )


def edges(tasks: TaskSet, size: int) -> list[int]:
    """Where each of `size` processes' tasks begin, and the last one's end.

    Half of the work is taken to go with the tasks, half with their rows.

    Raises ValueError for fewer tasks than processes.
    """
    if len(tasks) < size:
        raise ValueError(
            f"{size} processes share {len(tasks)} tasks, so that some would have none: start fewer"
        )
    rows = (tasks.support_rows.counts + tasks.query_rows.counts).double().cpu()
    work = (1.0 + rows / rows.mean().clamp(min=1e-9)).cumsum(0)
    wanted = work[-1] * torch.arange(1, size, dtype=torch.float64) / size
    found = (torch.searchsorted(work, wanted * (1 - 1e-12)) + 1).tolist()
    # each of them has one at least
    inner = [min(max(at, k), len(tasks) - size + k) for k, at in enumerate(found, 1)]
    return [0, *inner, len(tasks)]


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that `torchrun` started, as one group for the length of a block.

    All of them run the same script and make the same calls on the same tasks; verbs that are given
    the group share the work: `fit(..., processes=group)`.  Started without torchrun, the group is
    this process alone.  Gradients are added up by gloo, those on a GPU by nccl.

    Within the block RuntimeWarnings are shown by the first process alone.  Where a process ends,
    the others end with a `ProcessError` that says which, and why, within half a minute.

    Raises ValueError where a group of torch.distributed is there already, or the environment does
    not say which process this is.

    >>> with processes() as group:
    ...     group
    <Processes: 0 of 1>
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    import torch.distributed as dist

    group, store = _joined(size)
    try:
        with warnings.catch_warnings():
            if not group.is_first:
                warnings.simplefilter("ignore", RuntimeWarning)
            with group.telling():
                yield group
                if not group._over:
                    group.add(torch.zeros(1))  # nobody leaves while others count on it
    finally:
        assert group._beats is not None
        group._beats.stop()
        if group._pending is None:
            dist.destroy_process_group()
        else:
            _left_alone(dist.group.WORLD, group._pending)
        del store  # who keeps it, keeps it until here


def _left_alone(*things: Any) -> None:
    """Never end them, nor when the process ends.

    The end of a group waits for all that is under way in it: for a process that is silent, for
    ever.
    """
    Thread(target=lambda *kept: Event().wait(), args=things, daemon=True).start()


def _joined(size: int) -> tuple[Processes, Store]:
    import torch.distributed as dist
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    if dist.is_initialized():
        raise ValueError(
            "torch.distributed has a group already: vm.processes() starts and ends its own, one at "
            "a time"
        )
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE={size} processes, but {' and '.join(missing)} is not set in the "
            "environment: start the script with torchrun"
        )
    store, rank, _ = next(iter(rendezvous("env://", timeout=BEGIN)))
    # blocks one after another: so many have joined one before this
    prefix = f"varmeta/{(store.add('varmeta/joined', 1) - 1) // size}"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    beats = Beats(host, port, prefix, rank, size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=PrefixStore(prefix, store), rank=rank, world_size=size, timeout=LATE
    )
    group = Processes(rank, size, beats)
    beats.start()
    group.add(torch.zeros(1))
    return group, store
