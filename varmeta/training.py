"""The loops that move eta: joint Newton for small models, and any torch optimiser for the rest.

Both work on a `Run`, which holds all that a later call needs to go on from where this one stopped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from varmeta.bayes.expectation import MAX_CUBATURE_SIZE
from varmeta.bayes.guide import Delta
from varmeta.bayes.model import TaskModel
from varmeta.bayes.objective import Objective
from varmeta.bayes.prior import PRECISION, TRIL
from varmeta.joint import Joint, Reinit
from varmeta.numerics.arrowhead import JointSolution, minimize_jointly
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, detach, flatten
from varmeta.problem import Problem
from varmeta.strategy import Eta, State, Strategy
from varmeta.tasks import Batch, TaskSet

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Callback = Callable[[dict[str, float]], None]

# Joint Newton assembles (m x m) blocks and a (p x p) corner; beyond this size first-order steps are cheaper.
MAX_NEWTON_SIZE = 120
MAX_NEWTON_ENTRIES = 20_000_000
# Newton steps between two points at which an interrupted run keeps what it has.
NEWTON_CHUNK = 20
# Quasi-Newton on eta: beyond this many numbers Adam.
MAX_LBFGS_SIZE = 300

UNDETERMINED = "the data can hardly tell"
_WHY_NEWTON_ENDED = {
    Result.STEP_LIMIT: "give more by num_steps (or go on with resume=), or standardise the data: tasks.standardized()",
    Result.STAGNATED: "no step lowers the objective, although it is not flat: use float64 data, or standardise them",
    Result.DIVERGED: "the objective is not finite any more: standardise the data (tasks.standardized()), or start nearer with "
    "GaussianPrior(precision=...)",
}


@dataclass
class Run:
    """Where a fit stands: everything needed to look at it, and to go on."""

    eta: Eta
    state: State
    history: list[dict[str, float]] = field(default_factory=list)
    optimizer_state: dict[str, Any] | None = None
    stop: str = "not started"
    converged: bool = False

    @property
    def step(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def evaluations(self) -> float:
        return self.history[-1]["evaluations"] if self.history else 0.0

    @property
    def seconds(self) -> float:
        return self.history[-1]["seconds"] if self.history else 0.0

    def record(self, callback: Callback | None, **row: float) -> None:
        self.history.append(row)
        if callback is not None:
            callback(row)


# -- where small models start --------------------------------------------------------------------------------------------


def is_small(model: TaskModel, eta: Eta) -> bool:
    """Few weights, few meta-parameters: a regression rather than a network."""
    return model.weights.size <= MAX_CUBATURE_SIZE and sum(value.numel() for value in eta.values()) <= MAX_LBFGS_SIZE


def pooled_start(problem: Problem, batch: Batch, eta: Eta) -> Eta:
    """eta with theta0, shared parameters and noise scales at their best fit to all tasks at once, as if tasks did not differ,
    and a learned precision at what one observation knows, unless the user said where it starts.

    Data in raw units (weights of hundreds of grams, a predictor around 2,000) put the optimum far from where a model
    starts; this brings the quadratic and quasi-Newton methods near enough, in any units.
    """
    objective = Objective(problem.model, Delta())
    moving = [name for name in eta if name.partition(".")[0] not in (PRECISION, TRIL)]
    noise = batch.support.x.new_zeros(1, 1, problem.model.weights.size)

    def fn(row: Tree) -> Tensor:
        # one "task" whose parameters are all of eta's
        now = eta | {name: row[name].squeeze(0) for name in moving}
        phi = objective.guide.init(problem.model, now, batch.support)
        return objective.terms(phi, now, batch.support, noise)[1].sum().reshape(1)

    start = {name: eta[name].detach().unsqueeze(0) for name in moving}
    solution = minimize(fn, start, NewtonCG(), max_steps=100)
    if solution.worst == Result.NON_FINITE:
        return eta
    eta = eta | {name: value.squeeze(0) for name, value in solution.value.items()}
    weights = problem.model.weights
    theta = weights.flatten(eta)

    def total(theta: Tensor) -> Tensor:
        now = eta | weights.unflatten(theta)
        return fn({name: now[name].unsqueeze(0) for name in moving}).squeeze()

    information = torch.autograd.functional.hessian(total, theta) / batch.support.mask.sum()
    return eta | problem.model.prior.start_at(weights, eta, information)


# -- joint Newton ------------------------------------------------------------------------------------------------------


def newton_applies(strategy: Strategy, problem: Problem, batch: Batch, eta: Eta) -> bool:
    """Whether the whole joint problem is small and free of noise, so that Newton's method serves it."""
    if type(strategy) not in (Joint, Reinit) or strategy.is_noisy(problem):
        return False
    tasks, size = flatten(problem.start(batch, eta)).shape
    border = sum(value.numel() for value in eta.values())
    return size + border <= MAX_NEWTON_SIZE and tasks * size * (size + border) <= MAX_NEWTON_ENTRIES


def newton(
    problem: Problem, strategy: Strategy, batch: Batch, run: Run, max_steps: int, callback: Callback | None
) -> None:
    """Minimise sum_i F_i(phi_i, eta) over everything at once; updates `run` in place, also when interrupted.

    `Reinit` sets phi back to the prior after every period, or as soon as a period has converged, and is done when two
    periods end at the same value.
    """
    period = strategy.every if isinstance(strategy, Reinit) else NEWTON_CHUNK
    begin, last = perf_counter() - run.seconds, math.inf
    try:
        while True:
            solution = _newton_steps(problem, batch, run, min(period, max_steps - run.step), begin, callback)
            loss = float(solution.stats["loss"][-1])
            run.converged = solution.result == Result.CONVERGED
            if run.converged and isinstance(strategy, Reinit) and abs(loss - last) > 1e-8 * max(1.0, abs(loss)):
                run.converged = False  # from the prior once more: is it reached again?
            if run.converged:
                left = float(solution.stats["decrement"])
                run.stop = f"converged after {run.step} Newton steps: the objective can fall by {left:.1e} nats more"
                if solution.stats["flat"]:
                    run.stop += f"; {UNDETERMINED} {' and '.join(solution.stats['flat'])} apart"
                return
            if solution.result == Result.NON_FINITE:
                raise ValueError(_non_finite(batch, solution.stats["losses"], "at the start"))
            if solution.result not in (Result.CONVERGED, Result.STEP_LIMIT) or run.step >= max_steps:
                run.stop = f"after {run.step} Newton steps: {_WHY_NEWTON_ENDED[solution.result]}"
                return
            last = loss
            if isinstance(strategy, Reinit):
                run.state = replace(run.state, phi=detach(problem.start(batch, run.eta)))
    except KeyboardInterrupt:
        run.stop = f"interrupted after {run.step} steps: go on with fit(..., resume=this fit)"


def _newton_steps(
    problem: Problem, batch: Batch, run: Run, max_steps: int, begin: float, callback: Callback | None
) -> JointSolution:
    assert run.state.phi is not None  # Joint and Reinit store it
    first, spent, known = run.step, run.evaluations, len(run.history)

    def each_step(step: int, loss: float) -> None:
        run.record(callback, step=first + step, loss=loss, evaluations=math.nan, seconds=perf_counter() - begin)

    solution = minimize_jointly(
        problem.losses("elbo", batch, 0),
        run.state.phi,
        run.eta,
        penalty=problem.model.prior.penalty,
        max_steps=max_steps,
        callback=each_step,
    )
    if not run.history:  # the start was the optimum
        each_step(0, float(solution.stats["loss"][-1]))
    # the iteration counts its own products; they are shared out evenly over its steps
    rows = run.history[known:]
    for number, row in enumerate(rows, 1):
        row["evaluations"] = spent + float(solution.stats["evaluations"]) * number / len(rows)
    run.eta = detach(solution.eta)
    run.state = replace(run.state, phi=detach(solution.phi), step=run.step)
    return solution


# -- any torch optimiser -------------------------------------------------------------------------------------------------


def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def lbfgs(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        params, max_iter=20, history_size=20, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )


def lbfgs_applies(strategy: Strategy, problem: Problem, eta: Eta) -> bool:
    """Whether a line search may trust value and gradient, and eta is small."""
    small = sum(value.numel() for value in eta.values()) <= MAX_LBFGS_SIZE
    return strategy.exact and not isinstance(strategy, Joint) and not strategy.is_noisy(problem) and small


@dataclass(frozen=True)
class Descent:
    """How far and in which steps to descend.

    num_steps: outer steps; budget: gradient evaluations per task, whichever ends first.
    batch_size: tasks per step (None: all).  decay: the schedule's multiplier at a fraction of the way.
    """

    optimizer: OptimizerFactory
    num_steps: int | None
    budget: float | None
    batch_size: int | None
    decay: Callable[[float], float]


def descend(
    problem: Problem, strategy: Strategy, tasks: TaskSet, run: Run, plan: Descent, callback: Callback | None
) -> None:
    """Step eta by a torch optimiser; updates `run` in place, also when interrupted."""
    eta = {name: value.clone().requires_grad_() for name, value in run.eta.items()}
    leaves = list(eta.values())
    optimizer = plan.optimizer(leaves)
    base = [group["lr"] for group in optimizer.param_groups]
    if run.optimizer_state is not None:
        known, own = (set(state["param_groups"][0]) for state in (run.optimizer_state, optimizer.state_dict()))
        if known != own:
            raise ValueError("resume was stepped by another kind of optimizer: give fit(optimizer=...) the same again")
        optimizer.load_state_dict(run.optimizer_state)
    quasi_newton = isinstance(optimizer, torch.optim.LBFGS)
    if quasi_newton and isinstance(strategy, Joint):
        raise ValueError(
            "LBFGS evaluates the objective several times a step, but Joint moves phi at each: use Adam or SGD"
        )
    whole = tasks.batch() if plan.batch_size is None or plan.batch_size >= len(tasks) else None
    start, begin = run.step, perf_counter() - run.seconds
    spent = run.evaluations
    # the last point at which the loss was finite; what a run that breaks off returns
    safe, broken = (run.eta, run.state), False
    warned = False
    run.stop, run.converged = f"stopped after {plan.num_steps} steps", False
    try:
        for step in range(start, plan.num_steps if plan.num_steps is not None else 10**9):
            fraction = max(step / (plan.num_steps or math.inf), spent / (plan.budget or math.inf))
            if plan.budget is not None and spent >= plan.budget:
                run.stop = f"spent its budget of {plan.budget:g} gradient evaluations per task after {step} steps"
                break
            scale = plan.decay(fraction)
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * scale
            batch = whole or tasks.batch(_rows(len(tasks), plan.batch_size or len(tasks), problem.seed, step))
            before = replace(run.state, lr_scale=scale)
            calls: list[tuple[Tensor, State, dict[str, Any]]] = []

            def closure() -> float:
                optimizer.zero_grad(set_to_none=True)
                # B023: the closure is called within this step only
                calls.append(strategy.loss(problem, batch, eta, before))  # noqa: B023
                calls[-1][0].backward(inputs=leaves)  # noqa: B023
                return float(calls[-1][0].detach())  # noqa: B023

            here = {name: value.detach().clone() for name, value in eta.items()}
            optimizer.step(closure)
            scalar, state, stats = calls[0]
            loss = float(scalar.detach())
            if math.isfinite(loss):
                safe = here, run.state
            if not math.isfinite(loss) or not all(bool(torch.isfinite(value).all()) for value in eta.values()):
                message = _non_finite(batch, stats["losses"], f"at step {step}")
                if step == start:
                    raise ValueError(message)
                run.stop = f"{message}; this is the fit of the last step at which it was"
                warnings.warn(run.stop, RuntimeWarning, stacklevel=3)
                broken, run.state = True, safe[1]
                for name, value in safe[0].items():
                    eta[name].data.copy_(value)
                break
            gradient_norm = math.sqrt(sum(float(v.grad.square().sum()) for v in eta.values() if v.grad is not None))
            warning = None if warned else strategy.warning(stats)
            if warning is not None:  # once: the next steps would say the same with other numbers
                warnings.warn(warning, RuntimeWarning, stacklevel=3)
                warned = True
            # a minibatch works for its own tasks only
            share = len(batch) / len(tasks)
            spent += share * sum(float(call[2]["evaluations"]) for call in calls)
            run.state = state
            run.record(
                callback, step=step + 1, loss=loss, gradient_norm=gradient_norm, evaluations=spent,
                seconds=perf_counter() - begin,
            )  # fmt: skip
            # without noise a flat record is the end; quasi-Newton steps are large, so two of them tell
            if (
                whole is not None
                and not strategy.is_noisy(problem)
                and _settled(run.history, 2 if quasi_newton else 50)
            ):
                run.converged = True
                kind = "quasi-Newton steps" if quasi_newton else "steps"
                run.stop = f"converged after {step + 1} {kind}: the objective no longer changes"
                break
    except KeyboardInterrupt:
        run.stop = f"interrupted after {run.step} steps: go on with fit(..., resume=this fit)"
    run.eta = {name: value.detach().clone() for name, value in eta.items()}
    run.optimizer_state = None if broken else optimizer.state_dict()  # its averages are not finite either
    if not quasi_newton and run.stop.startswith(("stopped", "spent")):
        _judge(run)


def _rows(total: int, size: int, seed: int, step: int) -> Tensor:
    """The tasks of a minibatch: each epoch is a new permutation, a function of (seed, step) alone."""
    per_epoch = math.ceil(total / size)
    epoch, number = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(total, generator=generator)[number * size : (number + 1) * size].sort().values


def _settled(history: list[dict[str, float]], window: int, tolerance: float = 1e-10) -> bool:
    """Whether the last `window` losses are equal up to rounding."""
    losses = [row["loss"] for row in history[-window:]]
    return len(losses) == window and max(losses) - min(losses) <= tolerance * max(1.0, abs(losses[-1]))


def _judge(run: Run) -> None:
    """Whether a first-order run settled: the mean loss of its last tenth against the tenth that ended at 70 %.

    Not the tenth before: under a falling step size nothing moves at the end, whether or not it has arrived.
    """
    tenth = max(1, len(run.history) // 10)
    losses = [row["loss"] for row in run.history]
    if len(losses) < 20:
        return
    late, earlier = sum(losses[-tenth:]) / tenth, sum(losses[-4 * tenth : -3 * tenth]) / tenth
    change = (earlier - late) / max(1.0, abs(late))
    run.converged = abs(change) < 1e-3
    verdict = "which has settled" if run.converged else "so it is still moving: raise num_steps or the learning rate"
    run.stop += f"; over its last third the mean objective fell by {change:.1e} of its size, {verdict}"


def _non_finite(batch: Batch, losses: Tensor, when: str) -> str:
    bad = [name for name, ok in zip(batch.names, torch.isfinite(losses).tolist(), strict=True) if not ok]
    who = f"the loss of task {bad[0]!r}" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "") if bad else "eta"
    return f"{who} is not finite {when}: standardise the data, lower the learning rate, or raise the prior precision"
