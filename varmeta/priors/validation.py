"""Pyro's and torch's validation for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
from pyro import infer, poutine

from varmeta.graphs.process import ALONE

_PARTS = (dist, infer, poutine)


@contextlib.contextmanager
def validation_enabled(is_validate: bool) -> Iterator[None]:
    """As Pyro's, for one thread at a time: its state, and its stack, are the process's.

    Of two threads' blocks that overlapped, the last to end would put back what the other had set.
    """
    with ALONE:
        before = [part.is_validation_enabled() for part in _PARTS]
        pyro.enable_validation(is_validate)
        try:
            yield
        finally:
            for part, was in zip(_PARTS, before, strict=True):
                part.enable_validation(was)
