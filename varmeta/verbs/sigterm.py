"""SIGTERM as a batch system sends it: end the fit, let its user save, then go."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

FIT = ("varmeta.verbs.fit", "fit")


@contextlib.contextmanager
def sigterm_ends_fit() -> Iterator[None]:
    """Within the block SIGTERM ends a running `fit` as Ctrl-C does.

    It returns what has been learned, and the block goes on.

    At the end of the block the process ends by the SIGTERM that it got, with the exit status that
    it would have had (143 in a shell); a second SIGTERM ends it at once.  Outside a fit, as in
    `save`, nothing is interrupted.  What handled SIGTERM before the block does so after it.
    Without the block varmeta leaves SIGTERM alone, but for a fit that writes checkpoints.

    Raises ValueError outside the main thread, which alone gets signals.

    >>> import varmeta as vm
    >>> model = vm.TaskModel(__import__("torch").nn.Linear(1, 1), vm.likelihoods.Gaussian())
    >>> with sigterm_ends_fit():
    ...     result = vm.fit(model, vm.datasets.lines(5), num_steps=3)  # and result.save(path)
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("sigterm_ends_fit must stand in the main thread, which alone gets signals")
    before = signal.getsignal(signal.SIGTERM)
    if before is None:
        raise ValueError(
            "SIGTERM is handled by code that is not Python's, which could not be put back: leave "
            "it to that"
        )
    received = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGTERM, before)
        if _in_fit(frame):
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def ends_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a fit and then the process; where it is handled otherwise, it stays so."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    with sigterm_ends_fit():
        yield


def _in_fit(frame: FrameType | None) -> bool:
    """Whether that is, or was called by, `fit`, which stands above this file."""
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == FIT:
            return True
        frame = frame.f_back
    return False
