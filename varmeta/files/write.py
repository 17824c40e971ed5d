"""Files written whole or not at all: beside the old one, to the disk, then in its place.

Standard library alone.  A write that fails, is interrupted or is killed leaves what stood there
before.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

# A file without a name, so that a killed process leaves nothing behind; Linux alone has it, and not
# on every file system.
UNNAMED = getattr(os, "O_TMPFILE", None)


def write(path: str | PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Write the parts, one after the other, as the file `path`.

    Raises ValueError where there is no such folder or the path is none of a file; OSError, with the
    path, for what the system refuses (PermissionError, a full disk).  What stood there before then
    still does.
    """
    target = _target(path)
    with _named(target):
        descriptor = _unnamed(target.parent)
        if descriptor is None:
            with replacing(path) as beside, open(beside, "wb") as file:
                file.writelines(parts)
            return
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(descriptor)
            _take_mode(target, descriptor)
            beside = _beside(target)
            try:
                # a link cannot take another's place; renaming can.  A src_dir_fd, here without a
                # meaning of its own, makes Python call linkat, which follows the link in /proc
                os.link(
                    f"/proc/self/fd/{descriptor}",
                    beside,
                    src_dir_fd=descriptor,
                    follow_symlinks=True,
                )
                os.replace(beside, target)
            finally:
                beside.unlink(missing_ok=True)
        _sync(target.parent)


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """The name of a new file beside `path`, for writers that want a name.

    At the end it takes the place of `path`.

    Raises as `write`.
    """
    target = _target(path)
    with _named(target):
        beside = _beside(target)
        try:
            yield beside
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
                _take_mode(target, file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        _sync(target.parent)


def _target(path: str | PathLike[str]) -> Path:
    target = Path(os.path.realpath(path))  # of a symbolic link, what it points to
    shown = os.fspath(path)
    if not target.parent.is_dir():
        raise ValueError(
            f"the folder of {shown!r} does not exist: make it first, Path(...).mkdir(parents=True)"
        )
    if target.is_dir():
        raise ValueError(f"{shown!r} is a folder: give the name of a file")
    if target.exists() and not target.is_file():
        raise ValueError(f"{shown!r} is no ordinary file: give the name of one")
    if target.exists() and not os.access(target, os.W_OK):  # renaming would not ask
        raise PermissionError(
            13, "the file may not be written: give another name, or change its mode", shown
        )
    return target


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """What the system refuses, told with the file's own name."""
    try:
        yield
    except OSError as error:
        if error.filename == str(target):
            raise
        kept = "; what stood there before still does" if target.exists() else ""
        words = f"{error.strerror or error}: the file was not written{kept}"
        raise OSError(error.errno or 5, words, str(target)) from error


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")


def _unnamed(folder: Path) -> int | None:
    if UNNAMED is None or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, UNNAMED | os.O_WRONLY, 0o666)
    except PermissionError:
        raise
    except OSError:  # this file system has none
        return None


def _take_mode(target: Path, descriptor: int) -> None:
    """The new file may be read and written by whom the old one could."""
    if target.exists() and hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))


def _sync(folder: Path) -> None:
    """The new name too reaches the disk, where the system can say so of a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
