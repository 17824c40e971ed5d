"""Descent on eta by any torch optimiser, with minibatches, a budget and a schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from varmeta.fitting.blame import drowning, largest, what_failed
from varmeta.fitting.chunks import Outcome
from varmeta.fitting.compiled_step import Step
from varmeta.fitting.pooled_start import MAX_ETA_SIZE
from varmeta.fitting.run import ADVICE, Callback, Run, interrupted
from varmeta.fitting.schedule import GIVEN, Decay, Rates
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.strategies.warnings import warning
from varmeta.tasks import Batch, TaskSet

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
# A run has settled when its mean objective changed by no more than this over its last third (nats
# per task), or than chance makes of it; how far that is must be below RESOLVED, or nothing is
# known.
SETTLED = 0.01
RESOLVED = 0.05
# A line search that is stuck although its direction promises more than this (nats) is no
# convergence.
JUMP = 1e-3


def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2, fused=True)  # one kernel for all of eta


def lbfgs(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        params,
        max_iter=20,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def lbfgs_applies(strategy: Strategy, problem: Problem, eta: Eta) -> bool:
    """Whether a line search may trust value and gradient, and eta is small."""
    small, traits = (
        sum(value.numel() for value in eta.values()) <= MAX_ETA_SIZE,
        strategy.traits(problem),
    )
    return small and traits.line_search and not traits.stored and not traits.noisy


class _NowhereError(Exception):
    """eta is not finite."""


@dataclass(frozen=True)
class Descent:
    """How far and in which steps to descend.

    num_steps: outer steps; budget: gradient evaluations per task, whichever ends first.
    batch_size: tasks per step (None: all).  decay: the schedule's factor at a fraction of the way.
    compile, task_chunk_size: how the step is taken, see `Step`.
    """

    optimizer: OptimizerFactory
    num_steps: int | None
    budget: float | None
    batch_size: int | None
    decay: Decay
    compile: str | bool = "auto"
    task_chunk_size: int | None = None


def descend(
    problem: Problem,
    strategy: Strategy,
    tasks: TaskSet,
    run: Run,
    plan: Descent,
    callback: Callback | None,
) -> None:
    """Step eta by a torch optimiser; updates `run` in place, also when interrupted."""
    eta = {name: value.clone().requires_grad_() for name, value in run.eta.items()}
    leaves = list(eta.values())
    optimizer = plan.optimizer(leaves)
    rates = Rates(optimizer)
    if run.optimizer_state is not None:
        given = [dict(group) for group in optimizer.param_groups]
        known, own = (
            set(state["param_groups"][0]) for state in (run.optimizer_state, optimizer.state_dict())
        )
        # a file of version 0.1.0 knows no given rate: it goes on at the new optimizer's
        if known | {GIVEN} != own:
            raise ValueError(
                "resume was stepped by another kind of optimizer: give fit(optimizer=...) the same "
                "again"
            )
        optimizer.load_state_dict(run.optimizer_state)
        rates.go_on_from(given)
    quasi_newton, traits = isinstance(optimizer, torch.optim.LBFGS), strategy.traits(problem)
    if quasi_newton and traits.stored:
        raise ValueError(
            f"LBFGS evaluates the objective several times a step, but {type(strategy).__name__} "
            "moves phi at each: use Adam or SGD"
        )
    if quasi_newton and not traits.line_search:
        raise ValueError(
            "LBFGS's line search trusts value and gradient alike, but those of "
            f"{strategy.describe()} do not belong together: use Adam or SGD"
        )
    if (
        traits.period is not None
        and plan.batch_size is not None
        and isinstance(problem.guide, PyroGuide)
    ):
        raise ValueError(
            f"{type(strategy).__name__} with a guide of one's own needs all tasks in each step: "
            "leave batch_size out"
        )
    take_step = Step(strategy, plan.compile, _num_steps(plan), plan.task_chunk_size)
    whole = tasks.batch() if plan.batch_size is None or plan.batch_size >= len(tasks) else None
    start, begin = run.step, perf_counter() - run.seconds
    spent = run.evaluations
    # the last point at which the loss was finite; what a run that breaks off returns
    safe, broken = (run.eta, run.state), False
    warned = False
    met: tuple[Batch, Tensor] | None = None  # the losses of the last step
    run.stop, run.converged = f"stopped after {plan.num_steps} steps", False
    try:
        for step in range(start, plan.num_steps if plan.num_steps is not None else 10**9):
            fraction = max(step / (plan.num_steps or math.inf), spent / (plan.budget or math.inf))
            if plan.budget is not None and spent >= plan.budget:
                run.stop = (
                    f"spent its budget of {plan.budget:g} gradient evaluations per task after "
                    f"{step} steps"
                )
                break
            scale = plan.decay(fraction)
            batch = whole or tasks.batch(
                _rows(len(tasks), plan.batch_size or len(tasks), problem.seed, step)
            )
            before = replace(run.state, lr_scale=scale)
            if traits.period is not None:
                before = _in_period(strategy, problem, tasks, eta, before, traits.period)
            calls: list[Outcome] = []

            def closure() -> float:
                # B023: the closure is called within this step only
                if calls and not math.isfinite(float(_norm(eta))):  # noqa: B023
                    raise _NowhereError  # where a line search may lead, and nothing can be computed
                calls.append(take_step(problem, batch, eta, before))  # noqa: B023
                for name, gradient in calls[-1].gradient.items():  # noqa: B023
                    eta[name].grad = gradient
                return float(calls[-1].value)  # noqa: B023

            here = {name: value.detach().clone() for name, value in eta.items()}
            lost = False
            try:
                rates.step(closure, scale)
            except (
                _NowhereError,
                IndexError,
            ):  # an IndexError of torch's line search, of values that it cannot order
                if not quasi_newton:
                    raise
                lost = True
            value, gradient, state, stats = calls[0]
            loss, gradient_norm, size = torch.stack(
                [value, _norm(gradient), _norm(eta)]
            ).tolist()  # one read a step
            if math.isfinite(loss):
                safe = here, run.state
            if lost or not all(map(math.isfinite, (loss, gradient_norm, size))):
                message = _what_failed(
                    strategy,
                    problem,
                    batch,
                    here,
                    before,
                    [] if met is None else [met],
                    calls,
                    f"at step {step}",
                )
                if step == start:
                    raise ValueError(message)
                run.stop = f"{message}; this is the fit of the last step at which it was"
                warnings.warn(run.stop, RuntimeWarning, stacklevel=3)
                broken, run.state = True, safe[1]
                for name, before_it in safe[0].items():
                    eta[name].data.copy_(before_it)
                break
            sentence = None if warned else warning(traits, batch, stats)
            if sentence is not None:  # once: the next steps would say the same with other numbers
                warnings.warn(sentence, RuntimeWarning, stacklevel=3)
                warned = True
            # a minibatch works for its own tasks only
            share = len(batch) / len(tasks)
            spent += share * sum(float(call.stats.evaluations) for call in calls)
            run.state = state
            met = batch, stats.losses
            run.record(
                callback,
                step=step + 1,
                loss=loss,
                gradient_norm=gradient_norm,
                evaluations=spent,
                seconds=perf_counter() - begin,
            )
            # without noise a flat record is the end; quasi-Newton steps are large, so two of them
            # tell
            if (
                whole is not None
                and not traits.noisy
                and _settled(run.history, 2 if quasi_newton else 50)
            ):
                left = _promised(optimizer) if quasi_newton else 0.0
                kind = "quasi-Newton steps" if quasi_newton else "steps"
                run.converged = left <= max(JUMP, 100 * torch.finfo(value.dtype).eps * abs(loss))
                run.stop = (
                    f"converged after {step + 1} {kind}: the objective no longer changes"
                    if run.converged
                    else f"after {step + 1} {kind} none lowers the objective, although its "
                    f"gradient promises {left:.1e} nats: it "
                    "jumps, as where a task's loss has several minima and eta decides which is "
                    "found.  Take a Gaussian guide with vm.Joint, make the tasks' weights fewer, "
                    "or start elsewhere"
                )
                break
    except KeyboardInterrupt:
        run.stop = interrupted(run.step)
    run.eta = {name: value.detach().clone() for name, value in eta.items()}
    run.optimizer_state = (
        None if broken else optimizer.state_dict()
    )  # its averages are not finite either
    run.loss = take_step.value(problem, whole or tasks.batch(), run.eta, run.state)
    run.outlier = None if met is None or broken else drowning(*met)
    if not quasi_newton and run.stop.startswith(("stopped", "spent")):
        _judge(run, len(tasks), traits.period or 1)


def _in_period(
    strategy: Strategy, problem: Problem, tasks: TaskSet, eta: Eta, state: State, period: int
) -> State:
    """phi back at the prior at the start of a period; its step size falls to zero within each."""
    within = state.step % period
    state = replace(state, lr_scale=0.5 * (1.0 + math.cos(math.pi * within / period)))
    if state.step == 0 or within:
        return state
    start = strategy.init(
        problem, tasks.batch(), {name: value.detach() for name, value in eta.items()}
    )
    return replace(state, phi=start.phi, inner=start.inner)


def _what_failed(
    strategy: Strategy,
    problem: Problem,
    batch: Batch,
    eta: Eta,
    state: State,
    met: list[tuple[Batch, Tensor]],
    calls: list[Outcome],
    when: str,
) -> str:
    """In words: at eta, or where a line search from there tried a point (whose losses are known,
    and no more).

    met: the last step that went well.  Where all tasks fail at once it is eta that fails, and that
        step tells who moved it.
    """
    first, *tried = (call.stats.losses for call in calls)
    finite = torch.isfinite(first)
    if met and len(first) > 1 and not bool(finite.any()):
        return f"eta is not finite {when}, after a step from {largest(*met[0])}: {ADVICE}"
    if bool(finite.all()):
        bad = next((losses for losses in tried if not bool(torch.isfinite(losses).all())), None)
        if bad is not None and (len(first) == 1 or bool(torch.isfinite(bad).any())):
            return what_failed(
                strategy, problem, batch, eta, state, bad, f"where the line search looked {when}"
            )
    return what_failed(strategy, problem, batch, eta, state, first, when)


def _num_steps(plan: Descent) -> float:
    """The length of the whole run; a budget buys no more steps than gradient evaluations."""
    return min(plan.num_steps or math.inf, plan.budget or math.inf)


def _norm(eta: Eta) -> Tensor:
    return torch.linalg.vector_norm(
        torch.cat([value.detach().reshape(-1) for value in eta.values()])
    )


def _rows(total: int, size: int, seed: int, step: int) -> Tensor:
    """The tasks of a minibatch: each epoch is a new permutation, a function of (seed, step)
    alone.
    """
    per_epoch = math.ceil(total / size)
    epoch, number = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return (
        torch.randperm(total, generator=generator)[number * size : (number + 1) * size]
        .sort()
        .values
    )


def _settled(history: list[dict[str, float]], window: int, tolerance: float = 1e-10) -> bool:
    """Whether the last `window` losses are equal up to rounding."""
    losses = [row["loss"] for row in history[-window:]]
    return len(losses) == window and max(losses) - min(losses) <= tolerance * max(
        1.0, abs(losses[-1])
    )


def _promised(optimizer: torch.optim.Optimizer) -> float:
    """By how much the last direction of L-BFGS would have lowered the objective, were it the
    quadratic that it took it for.
    """
    state = next(iter(optimizer.state.values()))
    return -0.5 * float(state["prev_flat_grad"] @ state["d"])


def _judge(run: Run, num_tasks: int, every: int) -> None:
    """Whether a first-order run settled: the mean loss of its last tenth against the tenth that
    ended at 70 %.

    Not the tenth before: under a falling step size nothing moves at the end, whether or not it has
        arrived.
    every: look at each that many-th step only (the ends of `Reinit`'s periods).
    """
    losses = torch.tensor(
        [row["loss"] for row in run.history[every - 1 :: every]], dtype=torch.float64
    )
    tenth = max(1, len(losses) // 10)
    if len(losses) < (30 if every == 1 else 4):
        return
    late, earlier = losses[-tenth:], losses[-4 * tenth : -3 * tenth]
    change = float(earlier.mean() - late.mean())
    # what minibatches and draws make of it by chance
    noise = math.sqrt(float(late.var() + earlier.var()) / tenth) if tenth > 2 else 0.0
    longer = "the budget" if run.stop.startswith("spent") else "num_steps"
    still = abs(change) <= max(SETTLED * num_tasks, 2.0 * noise)
    run.converged = still and noise <= RESOLVED * num_tasks
    if run.converged:
        verdict = "which has settled"
    elif still:
        verdict = (
            f"which its noise of {noise:.1e} hides: raise {longer}, num_particles or batch_size"
        )
    elif change > 0:
        verdict = f"so it is still moving: raise {longer} or the learning rate"
    else:
        verdict = "so it does not descend: lower the learning rate"
    moved = f"fell by {change:.1e}" if change >= 0 else f"rose by {-change:.1e}"
    run.stop += f"; over its last third the mean objective {moved} nats, {verdict}"
