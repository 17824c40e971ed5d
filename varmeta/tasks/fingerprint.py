"""A few letters that tell one set of tasks from another, where its numbers are not at hand."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from varmeta.tasks.taskset import TaskSet


class AbsentTasks(NamedTuple):
    """What is known of a set of tasks that is not at hand.

    number: how many tasks it has.
    """

    number: int
    fingerprint: str

    @classmethod
    def of(cls, tasks: TaskSet) -> AbsentTasks:
        """What will be known of these tasks."""
        return cls(len(tasks), fingerprint(tasks))


def example_of(tasks: TaskSet) -> TaskSet:
    """The largest task alone, which tells a model's inputs where the others are absent."""
    filled = tasks.support_rows.counts + tasks.query_rows.counts
    return tasks[[int(filled.argmax())]]


def fingerprint(tasks: TaskSet) -> str:
    """A hash of every name and number, equal where `TaskSet.first_difference` finds none.

    >>> from varmeta.tasks import Task
    >>> one, other = (TaskSet([Task(([0.0], [y]))]) for y in (1.0, 2.0))
    >>> fingerprint(one) == fingerprint(one[:1]), fingerprint(one) == fingerprint(other)
    (True, False)
    """
    features = {name: value.tolist() for name, value in tasks.features.items()}
    found = hashlib.sha256(json.dumps([tasks.names, features]).encode())
    for rows in (tasks.support_rows, tasks.query_rows):
        for values in (rows.x, rows.y, rows.counts):
            found.update(f"{values.dtype} {list(values.shape)}".encode())
            found.update(values.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:32]
