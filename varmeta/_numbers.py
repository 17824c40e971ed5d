"""Numbers that users type, checked under the argument's name, and numbers of things in sentences."""

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


def counted(number: int, noun: str) -> str:
    """
    >>> counted(1, "task"), counted(3, "task")
    ('1 task', '3 tasks')
    """
    return f"{number} {noun}{'s' * (number != 1)}"
