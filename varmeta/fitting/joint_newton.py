"""Joint Newton: minimise sum_i F_i(phi_i, eta) over eta and every phi_i, for small models."""

from __future__ import annotations

import math
from dataclasses import replace
from time import perf_counter

from torch import Tensor

from varmeta.fitting.blame import drowning, drowning_at_start, largest
from varmeta.fitting.callback import ENDS, Callback
from varmeta.fitting.float64 import in_double
from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.fitting.run import Run, end_early, follow, non_finite
from varmeta.fitting.whitened import Whitened
from varmeta.numerics.joint import JointSolution, Step, minimize_jointly
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, cast, detach, flatten
from varmeta.strategies.expectation import Cubature
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.joint import Joint
from varmeta.strategies.problem import Problem
from varmeta.strategies.reinit import Reinit
from varmeta.strategies.strategy import Eta, Strategy
from varmeta.tasks import Batch

# Joint Newton assembles (m x m) blocks and a (p x p) corner; beyond this size first-order steps are
# cheaper.  A dense guide of 14 weights and their prior are 147 numbers (200 tasks: converged in a
# minute, where 2,000 steps of Adam were not). A regression's derivatives are cheap and its steps
# few: 20 weights are 271 numbers, 50 tasks converged in 13 s, where 2,000 steps of Adam ended 15
# nats short after 8 s.
MAX_NEWTON_SIZE, MAX_REGRESSION_SIZE = 160, 280
MAX_NEWTON_ENTRIES = 20_000_000
UNDETERMINED = "the data can hardly tell"
WHY_IT_ENDED = {
    Result.STEP_LIMIT: "give more by num_steps (or go on with resume=), or standardise the data: "
    "tasks.standardized()",
    Result.STAGNATED: "no step lowers the objective, although it is not flat: use float64 data, "
    "or standardise them",
    Result.DIVERGED: "the objective is not finite any more: standardise the data "
    "(tasks.standardized()), start nearer, by "
    "tensors in params or GaussianPrior(loc=...), with a narrower prior, "
    "GaussianPrior(precision=1.0), or use vm.Implicit('laplace'), which looks at each task's mode "
    "alone",
}


def newton_applies(strategy: Strategy, problem: Problem, batch: Batch, eta: Eta) -> bool:
    """Whether the joint problem is small and free of noise, so that Newton's method serves it.

    `Implicit` with the same objective inside and outside is the profile of the joint one over phi,
    and the Schur complement that a step takes is the profile's Hessian; so it is served too.
    """
    profile = (
        isinstance(strategy, Implicit) and strategy.outer == "elbo" and strategy.inner_steps is None
    )
    profile = profile and not problem.guide.at_mode  # its evidence is no profile over the mode
    if not (profile or type(strategy) in (Joint, Reinit)) or strategy.traits(problem).noisy:
        return False
    tasks, size = flatten(problem.start(batch, eta)).shape
    border = sum(value.numel() for value in eta.values())
    largest = MAX_REGRESSION_SIZE if problem.expectation == Cubature() else MAX_NEWTON_SIZE
    return size + border <= largest and tasks * size * (size + border) <= MAX_NEWTON_ENTRIES


def newton(
    problem: Problem,
    strategy: Strategy,
    batch: Batch,
    run: Run,
    max_steps: int,
    callback: Callback | None,
) -> None:
    """Move `run` to the minimum, in place.

    An interruption leaves it at the last step that was completed.

    In float64, whatever the data are in: steps are few, and in float32 an objective without a
    maximum looks like one that has converged.  `Reinit` sets phi back to the prior after every
    period, or as soon as a period has converged, and is done when two periods end at the same
    value.
    """
    resets = strategy.traits(problem).period
    period = resets or max_steps
    begin, last = perf_counter() - run.seconds, math.inf
    run.converged = False
    stored = run.state.phi is not None
    if not stored:
        run.state = replace(run.state, phi=detach(problem.start(batch, run.eta)))
    dtype = batch.support.like.dtype
    assert run.state.phi is not None
    wide = in_double(problem, batch, run.state.phi, run.eta)
    if wide is not None:
        batch, phi, run.eta = wide
        run.state = replace(run.state, phi=phi)
    try:
        while True:
            solution = _period(
                problem, batch, run, min(period, max_steps - run.step), begin, callback
            )
            loss = float(solution.stats["loss"][-1])
            run.outlier = drowning(batch, solution.stats["losses"])
            elsewhere = abs(loss - last) > 1e-8 * max(1.0, abs(loss))
            # after a period: from the prior once more, is it reached again?
            once_more = resets is not None and elsewhere
            run.converged = solution.result == Result.CONVERGED and not once_more
            if run.converged:
                left = float(solution.stats["decrement"])
                run.stop = (
                    f"converged after {run.step} Newton steps: the objective can fall by "
                    f"{left:.1e} nats more"
                )
                run.undetermined = tuple(solution.stats["flat"])
                if run.undetermined:
                    run.stop += f"; {UNDETERMINED} {' and '.join(run.undetermined)} apart"
                return
            if solution.result == Result.NON_FINITE:
                raise ValueError(_lost(strategy, problem, batch, solution.stats["losses"]))
            if (
                solution.result not in (Result.CONVERGED, Result.STEP_LIMIT)
                or run.step >= max_steps
            ):
                run.stop = (
                    f"after {run.step} Newton steps: "
                    f"{WHY_IT_ENDED.get(solution.result, 'it was to be no more')}"
                )
                if solution.result == Result.DIVERGED:
                    run.stop += f"; it ended {_where(batch, solution)}"
                return
            last = loss
            if resets is not None:
                run.state = replace(run.state, phi=detach(problem.start(batch, run.eta)))
    except ENDS as by:
        end_early(run, by)
    finally:
        run.eta = cast(run.eta, dtype)
        run.state = replace(
            run.state,
            phi=cast(run.state.phi, dtype) if stored and run.state.phi is not None else None,
        )


def _lost(strategy: Strategy, problem: Problem, batch: Batch, losses: Tensor) -> str:
    """Whose numbers are not finite at the start, to which one task may have drawn all others."""
    begun = drowning_at_start(strategy, problem, batch, float(losses.abs().sum()))
    if begun is not None and bool(losses.isfinite().all()):
        return f"eta is not finite at the start: {begun}"
    return non_finite(batch, losses, "at the start")


def _where(batch: Batch, solution: JointSolution) -> str:
    """The tasks whose derivatives are lost one step further, or else the one with most to say."""
    failed = [
        name
        for name, bad in zip(batch.names, solution.stats["failed"].tolist(), strict=True)
        if bad
    ]
    if not failed:
        return largest(batch.names, solution.stats["losses"])
    more = f" (and of {len(failed) - 1} more)" if len(failed) > 1 else ""
    return (
        f"where the loss of task {failed[0]!r}{more} or a derivative of it is lost at every step "
        "that lowers the objective"
    )


def _period(
    problem: Problem,
    batch: Batch,
    run: Run,
    max_steps: int,
    begin: float,
    callback: Callback | None,
) -> JointSolution:
    assert run.state.phi is not None
    first, spent = run.step, run.evaluations
    inside = Whitened.of(problem, batch, run.eta)
    phi, eta = (run.state.phi, run.eta) if inside is None else inside.enter(run.state.phi, run.eta)

    def keep(phi: Tree, eta: Eta) -> None:
        phi, eta = (phi, eta) if inside is None else inside.leave(phi, eta)
        run.eta, run.state = detach(eta), replace(run.state, phi=detach(phi))

    def arrived(step: Step) -> None:
        keep(step.phi, step.eta)
        run.state = replace(run.state, step=first + step.number)
        run.loss = step.loss
        follow(run, step, first, spent, begin, callback)

    solution = minimize_jointly(
        elbo_losses(problem, batch) if inside is None else inside.losses(),
        phi,
        eta,
        penalty=problem.model.penalty if inside is None else inside.penalty,
        max_steps=max_steps,
        callback=arrived,
    )
    if not run.history:  # no step was taken
        arrived(
            Step(
                0,
                float(solution.stats["loss"][-1]),
                solution.phi,
                solution.eta,
                solution.stats["evaluations"],
            )
        )
    keep(solution.phi, solution.eta)
    run.loss = float(solution.stats["loss"][-1])
    if inside is not None and not problem.model.is_linear_gaussian:
        # cubature's points lie along other axes there, which matters where log p is not quadratic
        here = elbo_losses(problem, batch)(run.state.phi, run.eta).sum() + problem.model.penalty(
            run.eta
        )
        run.loss = float(here.detach())
    return solution
