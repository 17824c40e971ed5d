"""Words and numbers that complaints share, and checks by name of numbers that users type."""

from __future__ import annotations

import operator
from typing import Any


def counted(number: int, noun: str) -> str:
    """The number and the noun, which takes an s unless there is one.

    >>> counted(1, "task"), counted(3, "task")
    ('1 task', '3 tasks')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def kind_of(value: Any) -> str:
    """What came instead of what was expected; a class is told apart from its instances.

    >>> kind_of("full"), kind_of(dict)
    ("the string 'full'", 'the class dict itself: call it, dict(...)')
    """
    if isinstance(value, type):
        return f"the class {value.__name__} itself: call it, {value.__name__}(...)"
    if value is None:
        return "None"
    if isinstance(value, str):
        return f"the string {value!r}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def name_of(code: Any) -> str:
    """What a function, or anything that is called like one, is called.

    >>> name_of(print), name_of(slice(1))
    ('print', 'slice')
    """
    return str(getattr(code, "__name__", type(code).__name__))


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError, with the choices, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """value as an int, also numpy's.

    ValueError for a number that is not whole or too small, TypeError for other things.

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


def probability(name: str, value: Any) -> float:
    """value as a float between 0 and 1, the ends left out.

    ValueError for another number, TypeError for other things.
    """
    problem = f"{name} must be a probability between 0 and 1, such as 0.9, not {value!r}"
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(problem)
    if not 0 < float(value) < 1:
        raise ValueError(problem)
    return float(value)


def positive_number(name: str, value: Any, least: float = 1.0) -> float:
    """value as a float of at least `least`.

    ValueError for a smaller one, TypeError for other things.
    """
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number of at least {least:g}, not {value!r}")
    if not float(value) >= least:
        raise ValueError(f"{name} must be a number of at least {least:g}, not {value!r}")
    return float(value)
