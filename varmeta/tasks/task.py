"""The data of one task, as they are given and as they are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from varmeta.tasks.scaling import Scaling


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
    scaling: what brought the data into their units; a set that was scaled gives it to its tasks.

    x is `(points,)` or `(points, features)`, y `(points,)` or `(points, responses)`, in any units.

    >>> Task(support=([0.0, 1.0], [0.5, 1.5]), query=([2.0], [2.5]), name="north")
    Task('north', support=2 points, query=1 points)
    """

    support: tuple[Any, Any] | None = None
    query: tuple[Any, Any] | None = None
    name: str | None = None
    features: Mapping[str, float] | None = None
    scaling: Scaling | None = field(default=None, kw_only=True)

    def __getstate__(self) -> dict[str, Any]:
        # a task of a set is a view: as it is, all rows of the set would be pickled with it
        return self.__dict__ | {"support": _alone(self.support), "query": _alone(self.query)}

    def __repr__(self) -> str:
        sizes = [
            f"{part}={_size(getattr(self, part))}"
            for part in ("support", "query")
            if getattr(self, part) is not None
        ]
        return f"Task({', '.join([repr(self.name), *sizes])})"


def _alone(part: Any) -> Any:
    if not isinstance(part, tuple):
        return part
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in part)


def _size(part: Any) -> str:
    try:
        return f"{len(part[1])} points"
    except (TypeError, IndexError):  # not checked yet
        return type(part).__name__
