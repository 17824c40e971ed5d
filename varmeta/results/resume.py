"""Go on from a fit, `fit(..., resume=...)`: only with the same model, tasks, strategy and seed."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from varmeta.fitting.run import Run
from varmeta.models import constants
from varmeta.models.model import TaskModel
from varmeta.results.result import Fit, absent_tasks_of
from varmeta.strategies.inner_rates import initial_eta
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import TaskSet
from varmeta.tasks.fingerprint import AbsentTasks
from varmeta.tasks.stream import Streamed, kind


def run_to_resume(
    fit: Fit,
    model: TaskModel,
    tasks: TaskSet,
    strategy: Strategy,
    seed: int,
    stream: Streamed | None = None,
) -> Run:
    """A copy of a fit's run to go on from.

    stream: where the tasks come from, if not from a set.

    Raises ValueError where model, tasks, strategy or seed differ.
    """
    if seed != fit.seed:
        raise ValueError(
            f"resume was run with seed={fit.seed}: give fit the same, or its noise and "
            "batches would change"
        )
    start = initial_eta(fit.strategy, model, tasks.batch().support.like)
    if {name: value.shape for name, value in start.items()} != {
        n: v.shape for n, v in fit.eta.items()
    }:
        raise ValueError(
            f"resume is a fit of another model: it has {sorted(fit.eta)}, this model "
            f"{sorted(start)}"
        )
    fixed = constants.fingerprint(fit.model.net, fit.model.constants)
    other = constants.difference(fixed, model.net, model.constants)
    if other is not None:
        raise ValueError(f"resume is a fit of a network with {other}: give fit the same network")
    held = fit.model.weights.fixed
    if any(
        not torch.equal(value.to(held[name]), held[name])
        for name, value in model.weights.fixed.items()
    ):
        raise ValueError(
            "resume is a fit with theta0 held at another place: give the prior the same loc"
        )
    other = _other_tasks(fit, tasks, stream)
    if other is not None:
        drawn = stream is not None and stream.reader.anywhere
        raise ValueError(
            f"resume is a fit of other tasks ({other}): give the same data in the same order"
            + "; a function draws what is random from the generator that it is given" * drawn
        )
    if not _alike(strategy, fit.strategy):
        raise ValueError(
            f"resume is a fit by {_unlike(fit.strategy, strategy)}: give fit the same strategy"
        )
    lost = absent_tasks_of(fit) is not None and fit.run.state.phi is None
    if lost and strategy.traits(fit.problem).stored:
        raise ValueError(
            "resume was saved without its tasks' posteriors, from which its strategy goes on: save "
            "it with data=True"
        )
    run = moved(copy.deepcopy(fit.run), tasks.device)
    # where steps go on from a fit they may find more; what goes on from a checkpoint is that run
    run.converged = run.converged and run.checkpoint is not None
    if run.kept is not None:
        until = [row for row in run.history if row["step"] <= run.kept]
        if len(until) < len(run.history):  # forget what came after it
            run.history, run.stop = until, f"kept at step {run.kept}"
        run.kept = None
    return run


def moved(run: Run, device: torch.device) -> Run:
    """The run with what it steps on that device, where a file has it on the CPU.

    The optimiser moves its own state to where its parameters are.
    """
    if next(iter(run.eta.values())).device == device:
        return run

    def to(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    state = replace(run.state, phi=tree_map(to, run.state.phi), inner=tree_map(to, run.state.inner))
    hyper, found = run.hyper, run.checkpoint
    if hyper is not None:
        parts = {f.name: tree_map(to, getattr(hyper, f.name)) for f in dataclasses.fields(hyper)}
        hyper = replace(hyper, **parts)
    if found is not None and found.watched is not None and found.watched["best"] is not None:
        best = found.watched["best"]
        own = {name: tree_map(to, best[name]) for name in ("eta", "phi", "inner")}
        found = replace(found, watched={**found.watched, "best": {**best, **own}})
    return replace(run, eta=tree_map(to, run.eta), state=state, hyper=hyper, checkpoint=found)


def _other_tasks(fit: Fit, tasks: TaskSet, stream: Streamed | None) -> str | None:
    """Where the tasks are not those of the fit, in a few words; of a stream as far as it shows."""
    if (fit.run.streamed is None) != (stream is None):
        return "of a stream" if stream is None else "of a TaskSet"
    absent = absent_tasks_of(fit)
    if absent is not None:
        same = absent == AbsentTasks.of(tasks)
        return None if same else "by their names or numbers"
    if stream is None or stream.reader.anywhere:
        return fit.tasks.first_difference(tasks.to(device=fit.tasks.device))
    first, now = kind(fit.tasks), kind(tasks)
    return next((f"{what} was {first[what]}" for what in first if first[what] != now[what]), None)


def _alike(one: Any, other: Any) -> bool:
    """Equal, also where a tensor is part of it, which `==` compares entry by entry."""
    if type(one) is not type(other):
        return (
            bool(one == other)
            if not isinstance(one, Tensor) and not isinstance(other, Tensor)
            else False
        )
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if dataclasses.is_dataclass(one):
        return all(
            _alike(getattr(one, f.name), getattr(other, f.name))
            for f in dataclasses.fields(one)
            if f.compare
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)


def _unlike(one: Strategy, other: Strategy) -> str:
    """`one, not other`, in as few words as tell them apart."""
    if type(one) is not type(other):
        return f"{type(one).__name__}, not {type(other).__name__}"
    names = [
        f.name
        for f in dataclasses.fields(one)
        if not _alike(getattr(one, f.name), getattr(other, f.name))
    ]
    mine, its = (", ".join(f"{name}={getattr(s, name)!r}" for name in names) for s in (one, other))
    return f"{type(one).__name__}({mine}), not {type(other).__name__}({its})"
