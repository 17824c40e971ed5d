"""What an odd input may come to: the right answer, or a sentence of ours.  Nothing else."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

from hypothesis import event

import varmeta

Value = TypeVar("Value")

PACKAGE = Path(varmeta.__file__).parent
LONGEST = 60  # seconds
# A complaint that is shorter says neither what came nor what to do.
SHORTEST = 25


@dataclass
class Outcome(Generic[Value]):
    """`value` where there is one; `said` are the warnings, `refused` the complaint."""

    value: Value | None = None
    said: list[str] = field(default_factory=list)
    refused: str | None = None

    def must_be(self, right: bool, where: str) -> None:
        """The answer is right, or it came with a warning."""
        event(f"{where}: {'right' if right else 'doubted' if self.said else 'WRONG'}")
        assert right or self.said, f"{where}: a wrong number without a word"


def attempt(work: Callable[[], Value], where: str) -> Outcome[Value]:
    """Run `work`: a complaint must be raised by varmeta itself, and nothing may hang."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        try:
            value = work()
        except (ValueError, TypeError) as complaint:
            if not is_ours(complaint):
                event(f"{where}: RAW TRACEBACK")
                raise
            event(f"{where}: refused")
            return Outcome(refused=str(complaint))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return Outcome(
        value, [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    )


def is_ours(complaint: BaseException) -> bool:
    last = traceback.extract_tb(complaint.__traceback__)[-1]
    return Path(last.filename).is_relative_to(PACKAGE) and len(str(complaint)) >= SHORTEST


def _too_long(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"no answer within {LONGEST} seconds")
