"""Pyro's and torch's validation for the length of a block, put back across threads too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
from pyro import infer, poutine

_PARTS = (dist, infer, poutine)


class _Blocks:
    """The blocks that are open, whoever opened them, and what held before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: dict[object, bool] = {}
        self.before: list[bool] = []


_BLOCKS = _Blocks()


@contextlib.contextmanager
def validation_enabled(is_validate: bool) -> Iterator[None]:
    """As Pyro's, but of two blocks in two threads the last to end restores the first state.

    Pyro's state is the process's: there, the last to end puts back what the other set, and
    validation stays off for good.  Here it puts back what held before the first.
    """
    mine = object()
    with _BLOCKS.lock:
        if not _BLOCKS.open:
            _BLOCKS.before = [part.is_validation_enabled() for part in _PARTS]
        _BLOCKS.open[mine] = is_validate
        pyro.enable_validation(is_validate)
    try:
        yield
    finally:
        with _BLOCKS.lock:
            del _BLOCKS.open[mine]
            if _BLOCKS.open:
                pyro.enable_validation(list(_BLOCKS.open.values())[-1])
            else:
                for part, before in zip(_PARTS, _BLOCKS.before, strict=True):
                    part.enable_validation(before)
