"""A folder of numbered files, of which one process writes the last few; standard library alone."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from varmeta.files.write import write

try:
    import fcntl
except ImportError:  # another system, where nobody is kept out
    fcntl = None  # type: ignore[assignment]

NUMBERED = re.compile(r"step-(\d+)\.fit")
# what a killed process may leave beside them
PART = re.compile(r"\.step-\d+\.fit\.[0-9a-f]+\.part")
LOCK = ".lock"


def numbered(folder: str | PathLike[str]) -> dict[int, Path]:
    """The folder's files by their numbers, the last one first; none where there is no folder."""
    path = Path(folder)
    if not path.is_dir():
        return {}
    found = ((NUMBERED.fullmatch(one.name), one) for one in path.iterdir())
    return dict(sorted(((int(m[1]), one) for m, one in found if m is not None), reverse=True))


class Folder:
    """The folder, made where there is none, as the one process that writes into it.

    keep: how many files there are at most.
    close: lets others write into it, as its end does.

    Raises OSError (PermissionError, a full disk) where it cannot be made or written into,
    ValueError where another process writes into it.
    """

    def __init__(self, path: str | PathLike[str], keep: int) -> None:
        self.path, self.keep = Path(path), keep
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{os.fspath(path)!r} is a file: give the name of a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        # a lock is the process's, which its end gives back, however that comes; a forked worker
        # that outlives it does not hold it
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, os.close, lock)
        if fcntl is not None:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.close()
                raise ValueError(
                    f"another process writes its checkpoints into {os.fspath(path)!r}: wait for "
                    "its end, or give another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        for one in self.path.iterdir():
            if PART.fullmatch(one.name):
                one.unlink(missing_ok=True)

    def write(self, number: int, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file whole or not at all, then remove the oldest ones.  Raises as `write`."""
        write(self.path / f"step-{number:09d}.fit", parts)
        for old in list(numbered(self.path).values())[self.keep :]:
            with contextlib.suppress(OSError):
                old.unlink()

    def forget_after(self, number: int) -> None:
        """Remove the files with higher numbers."""
        for found, one in numbered(self.path).items():
            if found > number:
                one.unlink(missing_ok=True)
