"""Newton's method on the evidence of tasks with few weights: eta alone is searched for.

With u the weights in the prior's units, theta = theta0 + S u with S S' = Lambda^-1, and nodes u_ij
of weights w_ij around each task's mode,

    log p(y_i | eta) = log sum_j w_ij N(u_ij; 0, I) p(y_i | theta0 + S u_ij, eta)

is a smooth function of eta for as long as the weights stay, and but for the rule's error an
integral does not depend on where its nodes stand.  So nodes are placed, eta takes Newton steps, in
which they follow their mode, nodes are placed anew, until the steps have nothing to gain where they
begin.  In whitened columns, where there are such, a covariance that loses rank is an ordinary point
(`fitting/whitened.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.fitting import chunks
from varmeta.fitting.callback import ENDS, Callback
from varmeta.fitting.float64 import in_double
from varmeta.fitting.joint_newton import MAX_NEWTON_SIZE, WHY_IT_ENDED
from varmeta.fitting.run import Run, end_early, follow, non_finite
from varmeta.fitting.whitened import Whitened
from varmeta.guides.convex import LOG_CONCAVE
from varmeta.guides.prior_parts import prior_parts
from varmeta.guides.quadrature import Quadrature
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.numerics.joint import JointSolution, Step, minimize_jointly
from varmeta.numerics.joint_model import SharedProblem
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.quadrature import EVIDENCE, NODES, placed
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, cast, detach
from varmeta.numerics.triangular import root_of_inverse
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, Strategy
from varmeta.tasks import Batch, Data

Density = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""log p(y_i | theta0 + S u, eta) `(points, tasks)` of u `(points, tasks, D)`."""

# Steps between two placements: at the first of them the nodes stand where they should.
_STEPS = 2
# Few nodes lead near the maximum, and are replaced by all where two steps gain less than so many
# nats.
_NEAR = 0.01
# Placements in a row whose steps get no further; the rule's own error is then all that moves.
_PATIENCE = 4
# The least curvature at a mode, in units of the prior's: a log-concave likelihood adds to 1.
_FLAT = 0.5


def evidence_newton_applies(strategy: Strategy, problem: Problem, eta: Eta) -> bool:
    """Whether the objective is the evidence by quadrature around modes that there is one of."""
    model = problem.model
    return (
        type(strategy) is Implicit
        and strategy.outer == "elbo"
        and strategy.inner_steps is None
        and not strategy.warm_start
        and isinstance(problem.guide, Quadrature)
        and model.is_linear
        and type(model.likelihood) in LOG_CONCAVE
        and sum(value.numel() for value in eta.values()) <= MAX_NEWTON_SIZE
    )


def evidence_newton(
    problem: Problem,
    strategy: Strategy,
    batch: Batch,
    run: Run,
    max_steps: int,
    callback: Callback | None,
) -> None:
    """Move `run` to the maximum of the evidence, in place; in float64, whatever the data are in.

    An interruption leaves it at the last step that was completed.
    """
    begin, dtype = perf_counter() - run.seconds, batch.support.like.dtype
    wide = in_double(problem, batch, detach(problem.start(batch, run.eta)), run.eta)
    if wide is not None:
        batch, _, run.eta = wide
    inside = Whitened.of(problem, batch, run.eta)
    density = _density(problem.model, batch) if inside is None else inside.log_density()
    penalty = problem.model.penalty if inside is None else inside.penalty
    eta = run.eta if inside is None else inside.enter({}, run.eta)[1]
    mode = batch.support.like.new_zeros(len(batch), problem.model.weights.size)
    numbers, totals = _numbers_of_nodes(problem), list[float]()
    run.converged, first, spent = False, run.step, run.evaluations

    def arrived(step: Step) -> None:
        run.eta = detach(step.eta if inside is None else inside.leave({}, step.eta)[1])
        run.loss = step.loss
        run.state = replace(run.state, step=first + step.number)
        follow(run, step, first, spent, begin, callback)

    try:
        while True:
            placed_nodes = _Nodes.place(density, mode, eta, numbers[0])
            mode = placed_nodes.mode
            solution = minimize_jointly(
                placed_nodes.losses,
                {"none": mode.new_zeros(len(batch), 1)},
                eta,
                penalty=penalty,
                max_steps=min(_STEPS, max_steps - first),
                callback=arrived,
            )
            if not run.history:  # no step was taken
                arrived(Step(0, solution.stats["loss"][-1], {}, eta, 0.0))
            eta, first, spent = solution.eta, run.step, run.evaluations
            totals.append(solution.stats["loss"][0])
            gained = totals[-1] - solution.stats["loss"][-1]
            if len(numbers) > 1 and (gained < _NEAR or _wanders(totals)) and first < max_steps:
                numbers, totals = numbers[1:], []
            elif _has_ended(run, batch, solution, max_steps, totals, numbers[0]):
                break
    except ENDS as by:
        end_early(run, by)
    # the value at the nodes as the strategy places them, which differs by the rule's error
    run.loss = chunks.value(strategy, problem, batch, run.eta, run.state)
    run.eta = cast(run.eta, dtype)


def _numbers_of_nodes(problem: Problem) -> list[int]:
    """For each weight: few, to come near, and those that were asked for."""
    guide, size = problem.guide, problem.model.weights.size
    assert isinstance(guide, Quadrature)
    number = guide.num_nodes or EVIDENCE[size]
    return [NODES[size], number] if number > NODES[size] else [number]


def _wanders(totals: list[float]) -> bool:
    """Whether the last placements found no lower total than those before."""
    late = totals[-_PATIENCE:]
    return len(totals) > _PATIENCE and min(late) >= min(totals[:-_PATIENCE])


def _has_ended(
    run: Run,
    batch: Batch,
    solution: JointSolution,
    max_steps: int,
    totals: list[float],
    number: int,
) -> bool:
    """Whether that was the last round; if so, why, in `run`.  totals: at each placement."""
    if solution.result == Result.NON_FINITE:
        raise ValueError(non_finite(batch, solution.stats["losses"], "at the start"))
    run.converged = solution.result == Result.CONVERGED
    if run.converged:
        left = float(solution.stats["decrement"])
        run.undetermined = tuple(solution.stats["flat"])
        run.stop = (
            f"converged after {run.step} Newton steps: the objective can fall by {left:.1e} nats "
            "more"
        )
        return True
    why = WHY_IT_ENDED.get(solution.result, "it was to be no more")
    wanders = solution.result == Result.STEP_LIMIT and _wanders(totals)
    if wanders:
        late = totals[-_PATIENCE:]
        why = (
            f"the error of {number} nodes for each weight, {max(late) - min(late):.1g} nats or "
            "more, hides where the maximum is: give more, as in "
            f"vm.Implicit(vm.guides.Quadrature(num_nodes={3 * number // 2}))"
        )
    run.stop = f"after {run.step} Newton steps: {why}"
    return wanders or solution.result != Result.STEP_LIMIT or run.step >= max_steps


class _Nodes(NamedTuple):
    """Nodes of every task, in the prior's units, which follow its mode as eta moves.

    mode `(tasks, D)`; points `(J, tasks, D)` and log weights `(J, tasks)` at the placement's eta,
    `origin` `(p,)`; follow `(tasks, D, p)`: by how much the mode moves with eta.
    """

    density: Density
    mode: Tensor
    points: Tensor
    log_weight: Tensor
    origin: Tensor
    follow: Tensor

    @classmethod
    def place(cls, density: Density, mode: Tensor, eta: Eta, number: int) -> _Nodes:
        def losses(phi: Tree, eta: Eta) -> Tensor:
            nll = -density(phi["u"].unsqueeze(0), eta).squeeze(0)
            return nll + 0.5 * phi["u"].square().sum(-1)

        mode = minimize(lambda phi: losses(phi, eta), {"u": mode}, NewtonCG()).value["u"]
        problem = SharedProblem(losses, {"u": mode}, eta, None)
        x, origin = problem.start()
        _, _, curvature, cross, _ = problem.hessian(x, origin)
        factor = root_of_inverse(curvature, _FLAT)
        follow = -factor @ (factor.mT @ cross)
        return cls(density, mode, *placed(mode, factor, number), origin, follow)

    def losses(self, phi: Tree, eta: Eta) -> Tensor:
        """-log p(y_i | eta); and a parabola of one number a task, which keeps `minimize_jointly` in
        tasks.
        """
        vector = torch.cat([value.reshape(-1) for value in eta.values()])
        points = self.points + self.follow @ (vector - self.origin)
        size = points.shape[-1]
        prior = -0.5 * points.square().sum(-1) - 0.5 * size * math.log(2 * math.pi)
        log_p = self.log_weight + prior + self.density(points, eta)
        return 0.5 * phi["none"].square().sum(-1) - log_p.logsumexp(0)


def _density(model: TaskModel, batch: Batch) -> Density:
    groups = batch.by_size()
    back = torch.cat([rows for rows, _ in groups]).argsort()

    def fn(u: Tensor, eta: Mapping[str, Tensor]) -> Tensor:
        parts = [_group_density(model, u[:, rows], eta, group.support) for rows, group in groups]
        return torch.cat(parts, 1)[:, back]

    return fn


def _group_density(model: TaskModel, u: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
    loc, root = prior_parts(model, eta)
    theta = loc + root.times(u)
    with validation_enabled(False):
        return -negative_log_likelihood(model, theta.unsqueeze(-2), eta, data)[1]
