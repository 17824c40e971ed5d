"""Numbers that users type, checked under the argument's name."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """value as an int, also numpy's; ValueError for a number that is not whole or too small, TypeError for other things.

    >>> whole_number("num_steps", 5)
    5
    """
    problem = f"{name} must be a whole number of at least {least}, not {value!r}"
    if isinstance(value, (bool, str)) or not hasattr(value, "__index__"):
        raise (ValueError if isinstance(value, float) else TypeError)(problem)
    number = operator.index(value)
    if number < least:
        raise ValueError(problem)
    return number


def positive_number(name: str, value: Any, least: float = 1.0) -> float:
    """value as a float of at least `least`; ValueError for a smaller one, TypeError for other things."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number of at least {least:g}, not {value!r}")
    if not float(value) >= least:
        raise ValueError(f"{name} must be a number of at least {least:g}, not {value!r}")
    return float(value)
