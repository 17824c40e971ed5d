"""One process's share of a descent: its tasks of each step.

Given eta, tasks have nothing to do with each other, so that a process's tasks are one more chunk
(`chunks.py`), and what is stored for a task stays where the task is.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from varmeta.group.processes import Processes, edges
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import State
from varmeta.tasks import Batch, TaskSet
from varmeta.tasks.source import OfSet, Source
from varmeta.tasks.stream import Streamed


def check_group(processes: Processes, problem: Problem) -> None:
    """Raise where the guide's module is made for all tasks at once."""
    if processes.size > 1 and isinstance(problem.guide, PyroGuide):
        raise ValueError(
            "a guide of one's own makes its module for all tasks at once, so that processes "
            "cannot share them: leave processes out"
        )


def shard_of(source: Source, processes: Processes, state: State) -> Shard:
    """This process's share of a source's tasks; state: what is stored for them."""
    if isinstance(source, Streamed):
        return OfStream(source, processes)
    assert isinstance(source, OfSet)
    return OfTasks(source, processes, not (state.phi is None and state.inner is None))


class Shard(Source):
    """A process's tasks of each step.

    source: those of all processes.
    owned: whether something is stored for each task, which then belongs to one process.
    """

    source: Source
    owned = False

    def __init__(self, source: Source, processes: Processes) -> None:
        self.processes = processes
        self.tasks, self.kept = source.tasks, source.kept
        self.total, self.streams = source.total, source.streams

    @cached_property
    def edges(self) -> list[int]:
        return edges(self.tasks, self.processes.size)

    @property
    def own(self) -> tuple[int, int]:
        """Where this process's tasks begin and end, of a set."""
        begin, end = self.edges[self.processes.rank :][:2]
        return begin, end

    def has(self, step: int) -> bool:
        return self.source.has(step)

    @abstractmethod
    def everyone(self, step: int) -> Batch:
        """The tasks of all processes, of the step that was taken last."""


class OfTasks(Shard):
    """Of a set.

    Of the tasks for which something is stored a minibatch may have many or none of this process.
    Others are dealt out evenly, step by step.
    """

    source: OfSet

    def __init__(self, source: OfSet, processes: Processes, owned: bool) -> None:
        super().__init__(source, processes)
        self.source, self.owned, self._number = source, owned, 0

    def batch(self, step: int) -> Batch:
        wanted = self.source.positions(step)
        self._number = len(wanted)
        if len(wanted) == len(self.tasks):
            return self.known
        if self.owned:
            begin, end = self.own
            return _part(self.tasks, wanted[(wanted >= begin) & (wanted < end)], wanted, begin)
        return _part(self.tasks, wanted[self.processes.cut(len(wanted))], wanted, 0)

    @property
    def whole(self) -> Batch | None:
        return None if self.source.whole is None else self.known

    @cached_property
    def known(self) -> Batch:
        begin, end = self.own
        everyone = torch.arange(len(self.tasks))
        return replace(_part(self.tasks, everyone[begin:end], everyone, begin), whole=True)

    def number(self, batch: Batch) -> int:
        return self._number

    def everyone(self, step: int) -> Batch:
        return self.source.batch(step)


def _part(tasks: TaskSet, own: Tensor, wanted: Tensor, begin: int) -> Batch:
    """Those of a step's tasks; what is stored has its first row for the task at `begin`."""
    if not len(own):
        return tasks.batch(wanted[:1]).part(0, 0)
    share = len(own) / len(wanted)
    batch = tasks.batch(own)
    return replace(batch, rows=batch.rows - begin, total=batch.total * share, share=share)


class OfStream(Shard):
    """Of a stream, of whose tasks each process reads its own."""

    source: Streamed

    def __init__(self, source: Streamed, processes: Processes) -> None:
        super().__init__(source, processes)
        self.source = source
        source.deal(processes.cut)

    def batch(self, step: int) -> Batch:
        self.source.has(step)
        return self.known

    @property
    def known(self) -> Batch:
        own = self.source.known
        count = self.source.count
        mine = self.processes.cut(count)
        if mine.start == mine.stop:  # the one task that was read is another's
            return own.part(0, 0)
        share = len(own) / count
        total = count if self.total is None else self.total
        return replace(own, total=total * share, share=share)

    def number(self, batch: Batch) -> int:
        return self.source.count

    def everyone(self, step: int) -> Batch:
        return self.source.everyone(step)
