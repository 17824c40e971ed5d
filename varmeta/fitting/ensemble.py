"""An ensemble's fit: all members in one descent, each from a start of its own."""

from __future__ import annotations

import math

import torch

from varmeta._checks import whole_number
from varmeta.fitting.run import Run
from varmeta.models.ensemble import Ensemble, starts
from varmeta.strategies.members import Members
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.tasks import TaskSet


def members_of(strategy: Strategy, problem: Problem, number: object) -> Members:
    """The strategy under `number` etas at once.  Raises where it does not serve."""
    count = whole_number("ensemble", number, 2)
    if not strategy.traits(problem).closed_form:
        raise ValueError(
            "ensemble= fits networks whose last layer is in closed form: "
            "TaskModel(net, likelihoods.Gaussian(), prior, shared=[all layers but the last]) and "
            f"vm.Joint('multivariate_normal'), not {strategy.describe()} of {problem.model!r}"
        )
    return Members(strategy, count)


def first_run(members: Members, problem: Problem, tasks: TaskSet) -> Run:
    """The members before their first step."""
    like = torch.zeros((), dtype=tasks.dtype, device=tasks.device)
    return Run(starts(problem.model, members.number, problem.seed, like), State())


def mixture(eta: Eta) -> Run:
    """The members on the way, to be mixed; their objectives are not asked for."""
    first = next(iter(eta.values()))
    found = Ensemble(eta, first.new_full((len(first),), math.nan))
    return Run(found.best, State(), hyper=found)


def close(run: Run, members: Members, problem: Problem, tasks: TaskSet) -> None:
    """Turn the run of a descent into that of a fit, in place: the best member as eta."""
    batch = tasks.batch()
    with torch.no_grad():
        losses = members.losses(problem, batch, run.eta, 0)
        found = Ensemble(run.eta, members.totals(problem, batch, run.eta, losses))
    run.eta, run.hyper, run.loss = found.best, found, float(found.losses.mean())


def reopened(run: Run, members: Members | None) -> Run:
    """The run of a fit as one to descend from, changed in place.

    Raises ValueError where it was of another number of members.
    """
    found = run.hyper
    count = len(found) if isinstance(found, Ensemble) else None
    asked = None if members is None else members.number
    if count != asked:
        raise ValueError(f"resume is a fit with ensemble={count}, not {asked}: give it the same")
    if isinstance(found, Ensemble):
        run.eta = found.points
    # what a run had found at its end is found again, unless there is nothing left to do
    if isinstance(found, Ensemble) or run.checkpoint is None or not run.checkpoint.finished:
        run.hyper = None
    run.undetermined, run.failure = (), None
    return run
