"""What is known of a whole task: named numbers, the same names in every task of a set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.tasks.arrays import to_dtype


def as_features(given: Sequence[Any], names: Sequence[str]) -> list[dict[str, float]]:
    """Each task's features as floats by name, in the first task's order.

    given: of each task a mapping of numbers, or None for none.

    Raises TypeError for what is no mapping of names to numbers; ValueError, naming the task, for
    NaN and infinity, and where one task has features that another lacks.

    >>> as_features([{"age": 3, "dose": 0.5}, {"dose": 1.0, "age": 4}], ["a", "b"])
    [{'age': 3.0, 'dose': 0.5}, {'age': 4.0, 'dose': 1.0}]
    """
    found = [_numbers(value, f"task {name!r}") for value, name in zip(given, names, strict=True)]
    order = list(found[0]) if found else []
    for features, name in zip(found, names, strict=True):
        if set(features) != set(order):
            stray = set(features) ^ set(order)
            raise ValueError(
                f"task {name!r} has the features {sorted(features)}, but task {names[0]!r} "
                f"{sorted(order)}: every task of a set needs the same, so give or leave out "
                f"{sorted(stray)}"
            )
    return [{key: features[key] for key in order} for features in found]


def stacked(tasks: Sequence[Mapping[str, float]], like: Tensor) -> dict[str, Tensor]:
    """The features of all tasks by name, `(tasks,)`, in the dtype and on the device of `like`."""
    return {
        name: to_dtype(
            torch.tensor([task[name] for task in tasks], dtype=torch.float64),
            like.dtype,
            f"the feature {name!r} of the tasks",
        ).to(like)
        for name in (tasks[0] if tasks else ())
    }


def _numbers(value: Any, who: str) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise TypeError(
            f"{who}: features must be a dict of numbers by name, such as {{'age': 3.5}}, not "
            f"{kind_of(value)}"
        )
    out = {}
    for name, entry in value.items():
        try:
            if isinstance(entry, str):
                raise TypeError
            number = float(entry)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{who}: the feature {name!r} must be one number, not {entry!r}: code categories "
                "as 0 and 1"
            ) from error
        if not math.isfinite(number):
            raise ValueError(
                f"{who}: the feature {name!r} is {number}: impute it, or leave the task out"
            )
        out[name] = number
    return out
