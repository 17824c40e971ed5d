"""Where the tasks of each outer step come from: all of a set, minibatches of it, or a stream."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from varmeta.tasks.batch import Batch
from varmeta.tasks.taskset import TaskSet


class Source(ABC):
    """The tasks of each step.

    tasks: what the model is tried on before the first step.
    kept: what of them a fit keeps.
    total: how many tasks there are; None: no number of them.
    streams: whether a step's tasks are gone after it.
    """

    tasks: TaskSet
    kept: TaskSet
    total: int | None
    streams = False

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The tasks of that step."""

    @property
    def whole(self) -> Batch | None:
        """All tasks, where every step takes them."""
        return None

    @property
    @abstractmethod
    def known(self) -> Batch:
        """All tasks; of a stream those of the last step."""

    def has(self, step: int) -> bool:
        """Whether there are tasks for that step."""
        return True

    def number(self, batch: Batch) -> int:
        """How many tasks the step has whose batch that is, of all processes."""
        return len(batch)

    def share(self, batch: Batch) -> float:
        """How much of a gradient of all tasks that of a step's tasks is; 1 of an endless stream."""
        return 1.0 if self.total is None else self.number(batch) / self.total


class OfSet(Source):
    """A set's tasks: all, or minibatches without replacement, by (seed, step)."""

    def __init__(self, tasks: TaskSet, batch_size: int | None, seed: int) -> None:
        self.tasks = self.kept = tasks
        self.total = len(tasks)
        self.size, self.seed = min(batch_size or len(tasks), len(tasks)), seed
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        if self.size == len(self.tasks):
            return self.known
        return self.tasks.batch(self.positions(step))

    def positions(self, step: int) -> Tensor:
        """Which tasks that step takes, in order, int64 `(tasks,)`."""
        epoch, number = divmod(step, math.ceil(len(self.tasks) / self.size))
        # kept for its epoch: of 10^6 tasks it takes longer than a step
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(len(self.tasks), self.seed, epoch)
        return part_of(self._order[1], self.size, number)

    @property
    def whole(self) -> Batch | None:
        return self.known if self.size == len(self.tasks) else None

    @cached_property
    def known(self) -> Batch:  # of bytes each batch is cast anew
        return self.tasks.batch()


def minibatch(total: int, size: int, seed: int, step: int) -> Tensor:
    """The tasks of a minibatch, of (seed, step) alone: each epoch is a new permutation."""
    epoch, number = divmod(step, math.ceil(total / size))
    return part_of(permutation(total, seed, epoch), size, number)


def part_of(order: Tensor, size: int, number: int) -> Tensor:
    return order[number * size : (number + 1) * size].sort().values


def permutation(total: int, seed: int, epoch: int) -> Tensor:
    """The order of the tasks in an epoch, int64 `(total,)`."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(total, generator=generator)
