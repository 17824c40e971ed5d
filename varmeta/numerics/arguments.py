"""Checks of the plain numbers that the parts of an algorithm are made of."""

from __future__ import annotations

import dataclasses
import math
from numbers import Real
from typing import Any

from torch import Tensor

WHY = (
    "a tensor would neither be learned, nor saved and resumed as it was.  Give the number, "
    "float({name}); inner rates that are learned are those of vm.GradientDescent(lr='learned')"
)


def no_tensors(part: Any) -> None:
    """Raise TypeError where a field of a dataclass, or of one inside it, is or holds a tensor."""
    if not dataclasses.is_dataclass(part):
        return
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, Tensor):
                learned = " that asks for a gradient" if one.requires_grad else ""
                raise TypeError(
                    f"{field.name} of {type(part).__name__} must be a plain number, not a "
                    f"tensor{learned}: " + WHY.format(name=field.name)
                )
            no_tensors(one)


def positive(name: str, value: Any) -> None:
    """Raise unless value is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a positive number, not {value!r}")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, not {value}")
