"""Newton's method on the evidence, where it is known in closed form: nothing to integrate."""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import Any

from torch import Tensor

from varmeta.fitting import profiled_at_eta
from varmeta.fitting.blame import drowning_of
from varmeta.fitting.callback import ENDS, Callback
from varmeta.fitting.joint_newton import UNDETERMINED, WHY_IT_ENDED
from varmeta.fitting.profiled_coordinates import COVARIANCE
from varmeta.fitting.profiled_derivatives import applies, derivatives, directions
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.reduced import ReducedTasks
from varmeta.fitting.run import Run, end_early, follow, non_finite
from varmeta.numerics.joint import JointSolution, Step, minimize_single
from varmeta.numerics.joint_model import row
from varmeta.numerics.solution import Result
from varmeta.priors.factors import PRECISION
from varmeta.strategies import closed_form
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, Strategy
from varmeta.tasks import TaskSet

# Coordinates whose Hessian is formed, and numbers that its columns may take in all.
MAX_SIZE, MAX_ENTRIES = 280, 100_000_000


def profiled(
    strategy: Strategy, problem: Problem, tasks: TaskSet, eta: Eta, restricted: bool = False
) -> ProfiledEvidence | None:
    """The objective of a regression whose evidence is known in closed form.

    None elsewhere, and where Newton's method does not serve: a network's shared layers, many
    weights, collinear columns; and of a low-rank prior, which whitened columns make a dense one.

    restricted: see `ProfiledEvidence`.
    """
    model = problem.model
    if model.prior.learn_precision == "low_rank":
        return None
    if restricted and model.prior.loc_hyperprior is not None:
        return None
    if not strategy.traits(problem).closed_form or not closed_form.is_evidence(
        problem, strategy.outer
    ):
        return None
    linear, size = (*model.shared, *model.coefficients), model.weights.size
    if not model.all_linear or size * (size + 1) // 2 > MAX_SIZE:
        return None
    if len(tasks) * size**2 * MAX_SIZE > MAX_ENTRIES and size > 2:
        return None
    reduced = ReducedTasks.of(model, tasks, linear)
    if reduced is None:
        return None
    found = ProfiledEvidence(model, reduced, eta, linear, restricted)
    # a prior that is wider than the noise by more than all digits is left to other steps
    return found if bool(found(found.start).isfinite()) else None


def profiled_newton(
    objective: ProfiledEvidence, tasks: TaskSet, run: Run, max_steps: int, callback: Callback | None
) -> None:
    """Move `run` to the maximum of the evidence, in place; in float64, whatever the data are in.

    An interruption leaves it at the last step that was completed.  Raises ValueError where the
    evidence is not finite at the start.
    """
    begin, first, spent = perf_counter() - run.seconds, run.step, run.evaluations
    point = objective.enter(run.eta) if first else objective.start
    reached, run.converged = point, False

    def arrived(step: Step) -> None:
        nonlocal reached
        reached, run.loss = row(step.phi), step.loss
        follow(run, step, first, spent, begin, callback, lambda: objective.leave(reached))

    if not point:  # all that is learned is profiled
        run.eta, run.loss = objective.leave(point), float(objective(point))
        follow(run, Step(0, run.loss, {}, {}, 0.5), first, spent, begin, callback)
        run.converged = True
        run.stop = "converged at once: the best places are known in closed form"
        return
    try:
        solution = minimum(objective, point, max_steps=max_steps - first, callback=arrived)
        if not run.history:  # no step was taken
            arrived(
                Step(0, solution.stats["loss"][-1], solution.phi, {}, solution.stats["evaluations"])
            )
        run.eta = objective.leave(reached)
        losses = profiled_at_eta.losses(objective, run.eta)
        if solution.result == Result.NON_FINITE:
            raise ValueError(non_finite(tasks, losses, "at the start"))
        run.outlier = drowning_of(tasks.names, tasks.support_rows.counts, losses)
        _tell(run, solution)
    except ENDS as by:
        run.eta = objective.leave(reached)
        end_early(run, by)


def minimum(objective: ProfiledEvidence, point: dict[str, Tensor], **options: Any) -> JointSolution:
    """The least of the objective from `point`, by `minimize_single`."""
    written = None
    if applies(objective):
        written = partial(derivatives, objective, along=directions(objective, point))
    return minimize_single(objective, point, written, **options)


def _tell(run: Run, solution: JointSolution) -> None:
    """How it ended, in words."""
    run.converged = solution.result == Result.CONVERGED
    if not run.converged:
        why = WHY_IT_ENDED.get(solution.result, "it was to be no more")
        run.stop = f"after {run.step} Newton steps on the evidence: {why}"
        return
    left = float(solution.stats["decrement"])
    run.stop = (
        f"converged after {run.step} Newton steps on the evidence, in closed form: it can rise by "
        f"{left:.1e} nats more"
    )
    flat = {PRECISION if name == COVARIANCE else name for name in solution.stats["flat"]}
    run.undetermined = tuple(name for name in run.eta if name in flat)
    if run.undetermined:
        run.stop += f"; {UNDETERMINED} {' and '.join(run.undetermined)} apart"
