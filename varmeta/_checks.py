"""Words and numbers that complaints share, and checks by name of numbers that users type."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from difflib import get_close_matches
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


def nearest(given: Any, known: Iterable[Any]) -> str:
    """The end of a complaint about a name: the known one that is nearest to what was typed.

    Nothing where none is near.  Upper and lower case are alike; of several names typed the first
    that is near to one counts.

    >>> nearest("Per-parameter", ("shared", "per_parameter")), nearest("both", ("shared",))
    ("; did you mean 'per_parameter'?", '')
    """
    names = {name.lower(): name for name in known if isinstance(name, str)}
    typed = given if isinstance(given, list | tuple) else [given]
    for one in (name for name in typed if isinstance(name, str)):
        near = get_close_matches(one.lower(), names, n=1)
        if near:
            return f"; did you mean {names[near[0]]!r}?"
    return ""


def no_task(name: Any, names: Iterable[str]) -> KeyError:
    """The complaint about a task's name that is none of `names`.

    >>> no_task("nort", ("north", "south"))
    KeyError("no task is called 'nort'; the first names are [...]; did you mean 'north'?")
    """
    names = list(names)
    return KeyError(
        f"no task is called {name!r}; the first names are {names[:5]}{nearest(name, names)}"
    )


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ValueError, with the choices and the nearest, for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}{nearest(value, choices)}")


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
