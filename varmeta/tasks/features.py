"""What is known of a whole task: named numbers, the same names in every task of a set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.tasks.arrays import to_dtype


def as_features(given: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
    """The tasks' features by name, `(tasks,)`, float64, in the first task's order.

    given: of each task a mapping of numbers, or None for none.

    Raises TypeError for what is no mapping of names to numbers; ValueError, naming the task, for
    NaN and infinity, and where one task has features that another lacks.

    >>> as_features([{"age": 3, "dose": 0.5}, {"dose": 1.0, "age": 4}], ["a", "b"])["age"]
    tensor([3., 4.], dtype=torch.float64)
    """
    found = [_numbers(value, name) for value, name in zip(given, names, strict=True)]
    order = list(found[0]) if found else []
    for features, name in zip(found, names, strict=True):
        if set(features) != set(order):
            stray = set(features) ^ set(order)
            raise ValueError(
                f"task {name!r} has the features {sorted(features)}, but task {names[0]!r} "
                f"{sorted(order)}: every task of a set needs the same, so give or leave out "
                f"{sorted(stray)}"
            )
    return {
        key: torch.tensor([features[key] for features in found], dtype=torch.float64)
        for key in order
    }


def refuse_infinite(features: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raise ValueError, naming the first such task, for a feature that is NaN or infinite."""
    bad = [position for value in features.values() for position in (~value.isfinite()).nonzero()]
    if bad:
        first = int(min(bad))
        _numbers({key: float(value[first]) for key, value in features.items()}, names[first])


def in_dtype_of(like: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the dtype, which must hold the numbers, and on the device of `like`."""
    return {
        name: to_dtype(value, like.dtype, f"the feature {name!r} of the tasks").to(like)
        for name, value in features.items()
    }


def _numbers(value: Any, task: str) -> dict[str, float]:
    if value is None:
        return {}
    who = f"task {task!r}"
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
