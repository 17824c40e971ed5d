"""What torch, Pyro and Python keep once for the whole process: one thread at a time changes it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

# Held for a block that changes Pyro's stack, store or validation, torch's random state or switches,
# or the parameters of a module while it runs, and for a trace.  No backward pass that comes back to
# a model may stand in such a block: on a GPU it runs in a thread of torch's own, which would wait
# for this one.
ALONE = threading.RLock()
# Held while Python's filters of warnings are other ones.  Of the two locks it comes first.
FILTERS = threading.RLock()


@contextmanager
def kept_warnings(category: type[Warning] = Warning) -> Iterator[list[warnings.WarningMessage]]:
    """What this thread warns of within the block, in a list instead of being shown.

    Other categories are shown, and what other threads warn of.

    >>> with kept_warnings(RuntimeWarning) as kept:
    ...     warnings.warn("of no matter", RuntimeWarning)
    >>> [str(one.message) for one in kept]
    ['of no matter']
    """
    mine, kept = threading.get_ident(), list[warnings.WarningMessage]()
    with FILTERS, warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Warning | str, kind: type[Warning], *where: Any) -> None:
            if threading.get_ident() == mine and issubclass(kind, category):
                kept.append(warnings.WarningMessage(message, kind, *where))
            else:
                show(message, kind, *where)

        warnings.showwarning = cast("Any", keep)  # called with places alone
        warnings.simplefilter("always", category)
        yield kept


@contextmanager
def unheard(message: str = "", category: type[Warning] = Warning) -> Iterator[None]:
    """Warnings of that pattern are not shown, unless another thread is keeping its own.

    It never waits, so that it may stand where a backward pass comes by.
    """
    if not FILTERS.acquire(blocking=False):
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        FILTERS.release()
