"""Where a fit stands: everything needed to look at it, and to go on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.fitting.callback import (
    Callback,
    CallbackError,
    EndedElsewhere,
    Row,
    StopFit,
    told,
)
from varmeta.fitting.checkpoint import Checkpoint
from varmeta.numerics.joint import Step
from varmeta.strategies.strategy import Eta, State
from varmeta.tasks import Batch, TaskSet
from varmeta.tasks.stream import SourceError

if TYPE_CHECKING:
    from varmeta.models.ensemble import Ensemble
    from varmeta.models.hyper_posterior import HyperPosterior


@dataclass(repr=False)
class Run:
    """The record of a run so far.

    loss: the outer objective over all tasks at `eta`, of an ensemble its members' mean.
    history: what each step met, one step behind, or of its minibatch.
    kept: the step whose eta and state these are, where validation tasks chose it; None: the last.
    schedule: how the step size fell, None for solvers without one.
    hyper: the posterior of eta, or an ensemble of them; None where eta is a point.
    streamed: how many tasks of a stream the steps met; None: they are a set's.
    checkpoint: of a run that was read from one, what it needs to go on bit for bit.
    failure: what a callback, a source of tasks or a step raised, which ended the run; not kept in
        files.
    undetermined: names that the data can hardly tell apart, where Newton's method converged; not
        kept in files.
    outlier: a sentence about a task whose loss drowns all others, where there is one; not kept in
        files.
    seconds_compiling: of this run, which an equal one in this process does not pay again; not kept
        in files.
    """

    eta: Eta
    state: State
    history: list[dict[str, float]] = field(default_factory=list)
    optimizer_state: dict[str, Any] | None = None
    stop: str = "not started"
    converged: bool = False
    loss: float = math.nan
    schedule: str | None = None
    kept: int | None = None
    streamed: int | None = None
    hyper: HyperPosterior | Ensemble | None = None
    checkpoint: Checkpoint | None = None
    seconds_compiling: float = 0.0
    outlier: str | None = None
    undetermined: tuple[str, ...] = ()
    failure: Exception | None = None

    def __repr__(self) -> str:
        return f"<Run: step {self.step}, {self.stop}>"

    @property
    def step(self) -> int:
        if self.kept is not None:
            return self.kept
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def evaluations(self) -> float:
        return self.history[-1]["evaluations"] if self.history else 0.0

    @property
    def seconds(self) -> float:
        return self.history[-1]["seconds"] if self.history else 0.0

    def record(
        self, callback: Callback | None, eta: Callable[[], Eta] | None = None, **row: float
    ) -> None:
        """eta: what it is after this step, where it is not the run's own yet."""
        self.history.append(row)
        if callback is not None:
            told(callback, Row(row, eta or (lambda: self.eta)))


def follow(
    run: Run,
    step: Step,
    first: int,
    spent: float,
    begin: float,
    callback: Callback | None,
    eta: Callable[[], Eta] | None = None,
) -> None:
    """Record an iteration's step behind `first` steps and `spent` evaluations before it.

    begin: the clock when the run began, less what it had taken by then.
    """
    run.record(
        callback,
        eta,
        step=first + step.number,
        loss=step.loss,
        evaluations=spent + step.evaluations,
        seconds=perf_counter() - begin,
    )


def end_early(run: Run, by: BaseException) -> None:
    """Say that a run ended early, by one of `ENDS` or by what a step raised."""
    go_on = f"after {run.step} steps: go on with fit(..., resume=this fit)"
    if isinstance(by, KeyboardInterrupt):
        run.stop = f"interrupted {go_on}"
        if run.step == 0:
            before = "interrupted before the first step was done"
            run.stop = f"{before}: nothing has been learned yet"
    elif isinstance(by, (CallbackError, SourceError)):
        who = "callback" if isinstance(by, CallbackError) else "source of tasks"
        run.stop = f"ended by the {who}'s {type(by.__cause__).__name__} {go_on}"
        run.failure = by.__cause__ if isinstance(by.__cause__, Exception) else None
    elif isinstance(by, EndedElsewhere):
        run.stop, run.failure = by.stop, by.failure
    elif isinstance(by, StopFit):
        run.stop = f"ended by the callback {go_on}"
    elif isinstance(by, Exception):
        run.stop, run.failure = f"ended by the step's {type(by).__name__} {go_on}", by


ADVICE = "standardise the data, lower the learning rate, or raise the prior precision"


def non_finite(tasks: Batch | TaskSet, losses: Tensor, when: str) -> str:
    bad = [
        name
        for name, ok in zip(tasks.names, torch.isfinite(losses).tolist(), strict=True)
        if not ok
    ]
    who = (
        f"the loss of task {bad[0]!r}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
        if bad
        else "eta"
    )
    return f"{who} is not finite {when}: {ADVICE}"
