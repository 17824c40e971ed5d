"""Checkpoints: where a running fit stands, written every so often into a folder."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import kind_of, whole_number
from varmeta.display.versions import versions
from varmeta.files.folder import Folder, numbered
from varmeta.fitting.callback import Callback, Row
from varmeta.fitting.checkpoint import Checkpoint
from varmeta.fitting.run import Run
from varmeta.models.ensemble import Ensemble
from varmeta.models.learned_prior import LearnedPrior
from varmeta.numerics.tree import cast
from varmeta.results.result import Fit
from varmeta.results.storage import parts_of
from varmeta.strategies.strategy import Eta
from varmeta.tasks.fingerprint import AbsentTasks, example_of

# Where nobody says how often: not before so many seconds have passed, nor before so many times what
# the last one took to write.
SECONDS, TIMES = 30.0, 50.0
# Of other versions of these the last digits may be others.
NUMERICAL = ("varmeta", "python", "torch", "pyro-ppl", "numpy")


@dataclass(frozen=True)
class Checkpoints:
    """Write where a fit stands into a folder, so that a run that is cut short can go on.

    folder: made where there is none; one fit at a time writes into it.
    every: outer steps from one checkpoint to the next.  None: whenever 30 seconds have passed and
        50 times as long as the last one took to write, so that writing takes at most 2 % of the
        time.  The start and the end are written anyhow.
    keep: how many checkpoints stay, the last ones.

    A checkpoint is a file as of `Fit.save`, whole or not at all and under a checksum, with the
    optimizer's and the scheduler's state, the tasks' stored posteriors and torch's random state,
    but without the data, which are known by a fingerprint.  `load(path, model)` reads it too.

    Use `Checkpoints` where `fit(checkpoint=folder)` is not enough.

    Raises TypeError where the folder is no path, ValueError for numbers below 1.

    >>> import tempfile, torch, varmeta as vm
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    >>> tasks = vm.datasets.lines(5)
    >>> options = {"strategy": vm.Joint("normal"), "optimizer": torch.optim.Adam}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     every = vm.Checkpoints(folder, every=10)
    ...     part = vm.fit(model, tasks, num_steps=30, checkpoint=every, **options)
    ...     vm.fit(model, tasks, num_steps=30, resume=folder, **options).loss == part.loss
    True
    """

    folder: str | PathLike[str]
    every: int | None = field(default=None, kw_only=True)
    keep: int = field(default=3, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, PathLike)):
            raise TypeError(f"folder must be a path, not {kind_of(self.folder)}")
        if self.every is not None:
            whole_number("every", self.every)
        whole_number("keep", self.keep)


def checkpoints_of(given: object) -> Checkpoints:
    """What was passed as `checkpoint`.  Raises TypeError for anything else."""
    if isinstance(given, Checkpoints):
        return given
    if isinstance(given, (str, PathLike)):
        return Checkpoints(given)
    raise TypeError(
        f"checkpoint takes the path of a folder, or vm.Checkpoints(folder, ...), not "
        f"{kind_of(given)}"
    )


def same_folder(one: str | PathLike[str], other: str | PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


class Writer:
    """Writes the checkpoints of one fit.

    Raises OSError and ValueError as `Folder`.
    """

    def __init__(self, plan: Checkpoints) -> None:
        self.plan, self.folder = plan, Folder(plan.folder, plan.keep)
        self.live: Callable[[], dict[str, Any]] = dict
        self.begun: Tensor = torch.get_rng_state()
        self._said = False

    def begin(
        self, fit: Fit, settings: dict[str, Any], found: Checkpoint | None, own: bool
    ) -> None:
        """Write where the fit starts.

        fit: with the run before its first step; settings: see `Checkpoint`.
        found: the checkpoint that it goes on from; own: whether it was read from this folder.

        Raises OSError where that cannot be written, ValueError where the folder holds the
        checkpoints of a run that this one does not go on from.
        """
        last = next(iter(numbered(self.folder.path)), None)
        if last is not None and not own and not 0 < last <= fit.run.step:
            raise ValueError(
                f"{os.fspath(self.plan.folder)!r} holds the checkpoints of a run, the last after "
                f"{last} steps: go on from them with resume={os.fspath(self.plan.folder)!r}, or "
                "give another folder"
            )
        self.folder.forget_after(fit.run.step)  # what could not be read
        if found is not None:
            self.begun = found.begun
        self.fit, self.one = fit, example_of(fit.tasks)
        self.absent = None if settings["streams"] else AbsentTasks.of(fit.tasks)
        self.settings = settings
        self.versions = {name: value for name, value in versions().items() if name in NUMERICAL}
        self._write(fit.run.eta, fit.run.stop, found is not None and found.finished)

    def reporting(
        self,
        callback: Callback | None,
        live: Callable[[], dict[str, Any]] = dict,
        due: Callable[[int], bool] | None = None,
    ) -> Callback:
        """The callback, after which a checkpoint is written where one is due: see `Keeper`."""
        self.live, due = live, due or self.is_due

        def report(row: Row) -> None:
            if callback is not None:
                callback(row)
            if due(int(row["step"])):
                go_on = f"go on with fit(..., resume={os.fspath(self.plan.folder)!r})"
                self._try(row.eta, f"checkpoint after {int(row['step'])} steps: {go_on}", False)

        return report

    def last(self) -> None:
        """Write where the run ended; a RuntimeWarning where that fails."""
        run = self.fit.run
        self._try(run.eta, run.stop, not run.stop.startswith(("interrupted", "ended by")))

    def is_due(self, step: int) -> bool:
        """See `Keeper`."""
        if self.plan.every is not None:
            return step % self.plan.every == 0
        return perf_counter() - self._wrote >= max(SECONDS, TIMES * self._took)

    def _try(self, eta: Eta, stop: str, finished: bool) -> None:
        """Write; where that fails the fit is worth more than its checkpoint."""
        try:
            self._write(eta, stop, finished)
        except (OSError, TypeError) as error:
            self._wrote = perf_counter()
            if not self._said:
                warnings.warn(
                    f"a checkpoint after {self.fit.run.step} steps was not written; the fit goes "
                    f"on, and tries again: {error}",
                    RuntimeWarning,
                    stacklevel=6,
                )
            self._said = True
        else:
            self._said = False

    def _write(self, eta: Eta, stop: str, finished: bool) -> None:
        begin = perf_counter()
        run = self._now(eta, stop, finished)
        prior = LearnedPrior.of(self.fit.model, run.eta, self.one.x_names)
        what = self.fit.model, self.one, self.fit.strategy, self.fit.seed, run, prior
        self.folder.write(run.step, parts_of(*what, self.absent, True))
        self._wrote = perf_counter()
        self._took = self._wrote - begin

    def _now(self, eta: Eta, stop: str, finished: bool) -> Run:
        """The run as one that stands here."""
        run, live = self.fit.run, self.live()
        dtype = self.fit.tasks.dtype  # Newton's steps are in float64
        eta = cast({name: value.detach() for name, value in live.get("eta", eta).items()}, dtype)
        state, hyper = live.get("state", run.state), run.hyper
        phi = state.phi
        if self.settings["ensemble"] is not None and hyper is None:
            losses = next(iter(eta.values())).new_full((self.settings["ensemble"],), math.nan)
            hyper = Ensemble(eta, losses)
            eta = hyper.best
        checkpoint = Checkpoint(
            settings=self.settings,
            versions=self.versions,
            begun=self.begun,
            random=torch.get_rng_state(),
            finished=finished,
            watched=live.get("watched"),
        )
        return replace(
            run,
            eta=eta,
            state=replace(state, phi=None if phi is None else cast(phi, dtype)),
            hyper=hyper,
            stop=stop,
            kept=None,
            loss=run.history[-1]["loss"] if "eta" in live and run.history else run.loss,
            optimizer_state=live.get("optimizer_state", run.optimizer_state),
            checkpoint=checkpoint,
        )
