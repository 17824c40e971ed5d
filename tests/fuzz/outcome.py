"""What an odd input may come to: the right answer, or a sentence of ours.  Nothing else."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections import Counter
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
OURS = (ValueError, TypeError, RuntimeError, FloatingPointError)
# A complaint that is shorter says neither what came nor what to do.
SHORTEST = 25
# What came of every question so far; an example may ask several.  A failing one is asked again
# while it is made smaller.
COUNTS: Counter[str] = Counter()
KINDS = (
    "examples",
    "questions",
    "right",
    "doubted",
    "refused",
    "no number",
    "WRONG",
    "RAW TRACEBACK",
    "HANG",
)


def came_to(kind: str, where: str) -> None:
    COUNTS[kind] += 1
    event(f"{where}: {kind}")


class Hang(AssertionError):
    """No answer within `LONGEST` seconds."""


@dataclass
class Outcome(Generic[Value]):
    """`value` where there is one; `said` are the warnings, `refused` the complaint."""

    value: Value | None = None
    said: list[str] = field(default_factory=list)
    refused: str | None = None

    def must_be(self, right: bool, where: str) -> None:
        """The answer is right, or it came with a warning."""
        came_to("right" if right else "doubted" if self.said else "WRONG", where)
        assert right or self.said, f"{where}: a wrong number without a word"


def attempt(work: Callable[[], Value], where: str) -> Outcome[Value]:
    """Run `work`: a complaint must be raised by varmeta itself, and nothing may hang."""
    COUNTS["questions"] += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(LONGEST)
        try:
            value = work()
        except Hang:
            came_to("HANG", where)
            raise
        except Exception as complaint:
            if not (isinstance(complaint, OURS) and is_ours(complaint)):
                came_to("RAW TRACEBACK", where)
                raise
            came_to("refused", where)
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
    raise Hang(f"no answer within {LONGEST} seconds")
