"""What `fit(resume=folder)` goes on from, and what must be as it was."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

from varmeta.display.versions import versions
from varmeta.files.folder import numbered
from varmeta.files.plain import difference
from varmeta.fitting.callback import Callback
from varmeta.fitting.checkpoint import Checkpoint
from varmeta.fitting.run import Run
from varmeta.fitting.validation import Validation
from varmeta.models.model import TaskModel
from varmeta.results.checkpoints import Checkpoints, Writer, checkpoints_of, same_folder
from varmeta.results.load import IsCode, Refused, load
from varmeta.results.result import Fit
from varmeta.strategies.strategy import Strategy
from varmeta.tasks.fingerprint import fingerprint
from varmeta.verbs.sigterm import ends_by_sigterm

# Settings that a run may go on under others of.
FREE = ("num_steps", "budget")


class Saving:
    """What `fit(checkpoint=..., resume=path)` adds to a fit: it is read, and written.

    Within the block SIGTERM ends the fit where checkpoints are written; after it others may write.

    resume: the fit to go on from; found: the checkpoint that it was, if it was one.
    writes: whether this process does; of several that share a fit, the first alone.

    Raises as `Writer` and `fit_to_resume`.
    """

    def __init__(
        self,
        checkpoint: Checkpoints | str | PathLike[str] | None,
        resume: Fit | str | PathLike[str] | None,
        model: TaskModel,
        strategy: Strategy | None,
        writes: bool = True,
    ) -> None:
        plan = None if checkpoint is None else checkpoints_of(checkpoint)
        self.plan, self.writer = plan, Writer(plan) if plan and writes else None
        self.by_path = isinstance(resume, (str, PathLike))
        self.own = False
        if isinstance(resume, (str, PathLike)):
            self.own = plan is not None and same_folder(plan.folder, resume)
            resume = fit_to_resume(resume, model, strategy, self.own)
        self.resume = resume
        self.found = resume.run.checkpoint if isinstance(resume, Fit) else None

    def __enter__(self) -> None:
        self._open = ExitStack()
        if self.writer is not None:
            self._open.callback(self.writer.folder.close)
        if self.plan is not None:
            self._open.enter_context(ends_by_sigterm())

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def begin(self, fit: Fit, settings: dict[str, Any]) -> None:
        """Refuse to go on under other settings, and write where the fit starts."""
        fit.run.checkpoint = None
        if self.by_path and self.found is not None:
            check_settings(self.found, settings)
        if self.writer is not None:
            self.writer.begin(fit, settings, self.found, self.own)

    def is_done(self, run: Run, most: int) -> bool:
        """Whether the run was at its end, so that Newton's method has nothing to add."""
        finished = self.found is not None and self.found.finished
        return finished and (run.converged or run.step >= most)

    def reporting(
        self,
        callback: Callback | None,
        live: Callable[[], dict[str, Any]] = dict,
        due: Callable[[int], bool] | None = None,
    ) -> Callback | None:
        """See `Keeper`."""
        return callback if self.writer is None else self.writer.reporting(callback, live, due)

    def is_due(self, step: int) -> bool:
        """See `Keeper`."""
        return self.writer is not None and self.writer.is_due(step)

    def last(self) -> None:
        """See `Keeper`."""
        if self.writer is not None:
            self.writer.last()


def fit_to_resume(
    path: str | PathLike[str], model: TaskModel, strategy: Strategy | None, may_begin: bool
) -> Fit | None:
    """The fit of a file, or of a folder's last checkpoint that can be read.

    may_begin: whether a folder without any is where the run starts; None then.

    Raises FileNotFoundError where there is nothing, ValueError as `load`.
    """
    if Path(path).is_file():
        return _loaded(Path(path), model, strategy)
    files, unread = numbered(path), list[str]()
    for step, file in files.items():
        try:
            found = _loaded(file, model, strategy)
        except Refused:
            raise
        except ValueError as error:
            unread.append(str(error))
            continue
        if unread:
            warnings.warn(
                f"the run goes on after {step} steps, since a later checkpoint cannot be read: "
                f"{unread[0]}",
                RuntimeWarning,
                stacklevel=5,
            )
        return found
    if unread:
        raise ValueError(f"no checkpoint in {os.fspath(path)!r} can be read: {unread[0]}")
    if may_begin:
        return None
    raise FileNotFoundError(
        2, "there are no checkpoints here: fit(..., checkpoint=folder) writes them", os.fspath(path)
    )


def _loaded(file: Path, model: TaskModel, strategy: Strategy | None) -> Fit:
    try:
        return load(file, model)
    except IsCode:
        if strategy is None:
            raise
        return load(file, model, strategy)


def settings_of(
    stream: object | None, validation: Validation | None, **others: Any
) -> dict[str, Any]:
    """The settings of a fit that a checkpoint keeps, as plain values."""
    watched = None
    if validation is not None:
        watched = {"metric": validation.metric, "tasks": fingerprint(validation.tasks)}
    return {**others, "streams": stream is not None, "validate": watched}


def check_settings(found: Checkpoint, now: dict[str, Any]) -> None:
    """Refuse other settings than those of the run that is resumed; warn of other versions.

    Raises ValueError that names the setting.
    """
    before, here = (
        {k: v for k, v in one.items() if k not in FREE} for one in (found.settings, now)
    )
    other = difference(before, here)
    if other is not None:
        raise ValueError(
            f"the checkpoint is of another fit: {other}.  Give the same, or what it has learned as "
            "resume=vm.load(path of the file, model), which goes on under other settings"
        )
    mine = versions()
    others = [
        f"{name} {was}, not {mine.get(name)}"
        for name, was in found.versions.items()
        if was != mine.get(name)
    ]
    if others:
        warnings.warn(
            f"the checkpoint was written under {', '.join(others)}: the rest of the run may differ "
            "in its last digits from one that was never cut short",
            RuntimeWarning,
            stacklevel=4,
        )
