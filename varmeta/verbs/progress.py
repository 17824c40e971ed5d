"""A progress bar on a terminal, and none elsewhere; who else is told of every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from varmeta.fitting.callback import Callback, Row
from varmeta.graphs.capture import watcher

if TYPE_CHECKING:
    from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(
    progress: bool | None, total: int, callback: Callback | None
) -> Iterator[Callback | None]:
    """What a run of `total` steps reports to, for the length of a block; None: to nobody.

    progress: whether to show a bar; None: on a terminal only.  callback: told of every step too.
    """
    bar = _bar(progress, total)
    watching = watcher.set(_said_by(bar))
    try:
        silent = callback is None and (bar is None or bar.disable)
        yield None if silent else _reporter(bar, callback)
    finally:
        watcher.reset(watching)
        if bar is not None:
            bar.close()


def _bar(progress: bool | None, total: int) -> tqdm | None:
    if progress is False:
        return None
    from tqdm.auto import tqdm

    # disable=None: tqdm's own word for "only on a terminal"
    return tqdm(total=total, disable=None if progress is None else False, leave=False)


def _said_by(bar: tqdm | None) -> Callable[[bool], None] | None:
    """What a bar says while a graph is compiled, which may take a minute in which it does not
    move.
    """
    return (
        None
        if bar is None
        else lambda compiling: bar.set_description("compiling" if compiling else None)
    )


def _reporter(bar: tqdm | None, callback: Callback | None) -> Callback:
    def report(row: Row) -> None:
        if bar is not None:
            bar.update(1)
            bar.set_postfix(loss=f"{row['loss']:.6g}", refresh=False)
        if callback is not None:
            callback(row)

    return report
