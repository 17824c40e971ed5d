"""Objects that are known again by the arguments of their constructors.

Nobody lists what is kept.  A class that takes part remembers the arguments of its constructor,
whatever they are called, so an argument that is added later is kept too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

P = ParamSpec("P")
T = TypeVar("T", bound="Remembers")


class Remembers:
    """A base of classes that are known again by the arguments of their constructors.

    constructor, constructed_with: what made the object, and the arguments that it got, by name,
        defaults too.
    """

    # slots: a class may show or compare its own attributes without these
    __slots__ = ("constructed_with", "constructor")

    constructor: Callable[..., Any]
    constructed_with: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        _remember(self, cls.__init__, self, args, kwargs)
        return self


def remembered(make: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """For another constructor (a `classmethod`): what it makes remembers its arguments instead."""

    @functools.wraps(make)
    def making(cls: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        made = make(cls, *args, **kwargs)
        _remember(made, make, cls, args, kwargs)
        return made

    return making


def _remember(made: T, constructor: Callable[..., Any], first: Any, args: Any, kwargs: Any) -> None:
    made.constructor = constructor
    made.constructed_with = {}
    try:
        bound = inspect.signature(constructor).bind(first, *args, **kwargs)
    except TypeError:
        # the constructor itself says it better; and a copy is made without arguments, and gets the
        # original's
        return
    bound.apply_defaults()
    made.constructed_with = dict(list(bound.arguments.items())[1:])
