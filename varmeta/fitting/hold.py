"""Ctrl-C and SIGTERM wait while a step is written down, so that none is left half taken."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

Handler = Callable[[int, FrameType | None], Any]


class Hold:
    """Within the block, signals whose handlers are Python's can be made to wait.

    What handles them is not changed, only when: at once, but between `hold` and `release` then.
    Outside the main thread, where none comes, it does nothing.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: dict[int, Handler] = {}  # twice the same is once
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if callable(before):
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            # whoever has put another handler in its place meant it to stay
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self.release()

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        """What came meanwhile is handled now, and may raise KeyboardInterrupt."""
        self._held = False
        while self._waiting:
            number, handler = self._waiting.popitem()
            handler(number, sys._getframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._waiting[number] = self._before[number]
        else:
            self._before[number](number, frame)
