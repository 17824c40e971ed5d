"""Words that several complaints and summaries share."""

from __future__ import annotations

from typing import Any


def counted(number: int, noun: str) -> str:
    """
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
