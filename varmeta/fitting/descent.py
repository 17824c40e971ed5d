"""Descent on eta by any torch optimiser, with minibatches, a budget and a schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from varmeta.fitting.blame import drowning, largest, what_failed
from varmeta.fitting.callback import ENDS, Callback, Row, told
from varmeta.fitting.checkpoint import Keeper
from varmeta.fitting.chunks import Outcome
from varmeta.fitting.compiled_step import Compile, Step
from varmeta.fitting.convergence import judge, promised, settled
from varmeta.fitting.hold import Hold
from varmeta.fitting.optimizer import checked_optimizer
from varmeta.fitting.pooled_start import MAX_ETA_SIZE
from varmeta.fitting.run import ADVICE, Run, end_early
from varmeta.fitting.schedule import GIVEN, Decay, Rates, SchedulerFactory
from varmeta.fitting.shard import shard_of
from varmeta.fitting.shared import Shared
from varmeta.fitting.validation import Watch
from varmeta.group.processes import ProcessError, Processes
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.strategies.warnings import Kind, warning
from varmeta.tasks import Batch
from varmeta.tasks.source import Source

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
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
    decay: the schedule's factor at a fraction of the way; scheduler: makes one of torch's instead.
    clip: the largest norm of a gradient in eta that is stepped by; None: any.
    compile, task_chunk_size: how the step is taken, see `Step`.
    """

    optimizer: OptimizerFactory
    num_steps: int | None
    budget: float | None
    decay: Decay
    compile: Compile = "auto"
    task_chunk_size: int | None = None
    scheduler: SchedulerFactory | None = None
    clip: float | None = None


def descend(
    problem: Problem,
    strategy: Strategy,
    source: Source,
    run: Run,
    plan: Descent,
    callback: Callback | None,
    watch: Watch | None = None,
    keeper: Keeper | None = None,
    processes: Processes | None = None,
) -> None:
    """Step eta by a torch optimiser; updates `run` in place, also when interrupted.

    A `run` that has converged stays where it is.

    source: the tasks of each step; where it ends, so does the run.
    watch: looks at the validation tasks on the way; `run` then ends at the best state that it saw.
    keeper: writes where the run stands at its last step, before that is judged.
    processes: those that share the tasks; in each of them `run` is that of all in the end.
    """
    telling = nullcontext() if processes is None else processes.telling()
    with telling, Hold() as hold:
        way = _Way(problem, strategy, source, run, plan, watch, hold)
        if processes is not None and processes.size > 1:
            way.share(processes, keeper)
        if keeper is not None:
            due = None if way.shared is None else way.shared.is_due
            callback = keeper.reporting(callback, way.live, due)
            if watch is not None and keeper.found is not None and keeper.found.watched is not None:
                watch.go_on(keeper.found.watched)
        try:
            if watch is None or watch.last < 0 or watch.is_due(run.step):
                way.look(run.step)
            if not run.converged:
                _walk(way, callback)
            way.close(None)
            # before a closing look, which a longer run would not take there
            if keeper is not None:
                keeper.last()
            way.look(run.step)
            if watch is not None and watch.validation.calibrate:
                watch.calibrate()
        except (*ENDS, SystemExit) as by:
            end_early(run, by)
            way.close(by)
            if keeper is not None:
                keeper.last()
            if isinstance(by, SystemExit):  # from a handler of the program's own
                raise
        except ProcessError:
            raise
        except Exception as error:
            # what later tasks of a stream meet must not cost what was learned from those before
            if not source.streams or run.step == way.first:
                raise
            end_early(run, error)
            way.close(error)
            if keeper is not None:
                keeper.last()
        way.end()


def _walk(way: _Way, callback: Callback | None) -> None:
    """Step after step, until one of the reasons for which a run ends."""
    run, plan, source, watch = way.run, way.plan, way.source, way.watch
    run.stop = f"stopped after {plan.num_steps} steps"
    for step in range(run.step, plan.num_steps if plan.num_steps is not None else 10**9):
        if watch is not None and watch.has_seen_enough:
            run.stop = f"stopped after {step} steps, {watch.worse} looks without a better"
            return
        if plan.budget is not None and way.spent >= plan.budget:
            run.stop = (
                f"spent its budget of {plan.budget:g} gradient evaluations per task after "
                f"{step} steps"
            )
            return
        if not source.has(step):
            run.stop = f"the source of tasks ended after {step} steps"
            return
        if not way.step(step, callback) or way.arrived(step):
            return


class _Way:
    """The way of one run: what is kept from step to step.

    safe: the last point at which the loss was finite, which a run that breaks off returns.
    met: the losses of the last step that went well.
    hold: keeps signals waiting from the first change that a step makes until it is written down.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        source: Source,
        run: Run,
        plan: Descent,
        watch: Watch | None,
        hold: Hold,
    ) -> None:
        self.problem, self.strategy, self.source = problem, strategy, source
        self.run, self.plan, self.watch, self.hold = run, plan, watch, hold
        self.traits = strategy.traits(problem)
        self.eta = {name: value.clone().requires_grad_() for name, value in run.eta.items()}
        self.optimizer, self.rates = _optimizer(list(self.eta.values()), run, plan)
        self.quasi_newton = isinstance(self.optimizer, torch.optim.LBFGS)
        self.whole = source.whole
        _check_goes_together(strategy, problem, self.traits, self.quasi_newton, self.whole is None)
        self.take_step: Step | Shared = Step(
            strategy, plan.compile, _num_steps(plan), plan.task_chunk_size
        )
        self.shared: Shared | None = None
        self.first, self.begin = run.step, perf_counter() - run.seconds
        self.spent = run.evaluations
        self.safe = run.eta, run.state
        self.broken = False
        self.said: set[Kind] = set()
        self.met: tuple[Batch, Tensor] | None = None

    def share(self, processes: Processes, keeper: Keeper | None) -> None:
        """Work on this process's tasks, and add up with the others."""
        run, due = self.run, (lambda step: False) if keeper is None else keeper.is_due
        assert isinstance(self.take_step, Step)
        shard = shard_of(self.source, processes, run.state)
        self.source, self.whole = shard, shard.whole
        self.shared = Shared(self.take_step, shard, self.traits, self.said, self.eta, due)
        self.take_step, run.state = self.shared, self.shared.own(run.state)
        self.safe = run.eta, run.state

    def close(self, by: BaseException | None) -> None:
        """Come to the end with the other processes; by: what ended the run here."""
        if self.shared is not None:
            self.hold.hold()
            self.shared.close(self.run, by)

    def step(self, step: int, callback: Callback | None) -> bool:
        """Take one; False where the run breaks off."""
        if self.shared is not None:
            self.hold.hold()  # all take it, or none does
        try:
            met = self._step(step)
        finally:
            self.hold.release()
        if met is None:
            return False
        doubt = warning(self.traits, *met, self.said)
        if doubt is not None:
            warnings.warn(doubt[1], RuntimeWarning, stacklevel=4)
            self.said.add(doubt[0])
        if self.watch is not None and self.watch.is_due(step + 1):
            self.look(step + 1)
        if callback is not None:
            told(callback, Row(self.run.history[-1], lambda: self.eta))
        return True

    def _step(self, step: int) -> tuple[Batch, Stats] | None:
        """Take one and write it down; its tasks, and what they tell.  None where the run breaks
        off.
        """
        plan, run, eta = self.plan, self.run, self.eta
        whole_way = plan.num_steps or math.inf, plan.budget or math.inf
        scale = plan.decay(max(step / whole_way[0], self.spent / whole_way[1]))
        batch = self.source.batch(step)
        before = replace(run.state, lr_scale=scale)
        if self.traits.period is not None:
            period = self.traits.period
            before = _in_period(self.strategy, self.problem, self.source.known, eta, before, period)
        here = {name: value.detach().clone() for name, value in eta.items()}
        calls, lost = self._move(batch, here, before, scale)
        value, gradient, state, stats = calls[0]
        # one read a step
        numbers = torch.stack([value, _norm(gradient), _norm(eta)]).tolist()
        loss, gradient_norm, _ = numbers
        if math.isfinite(loss):
            self.safe = here, run.state
        if lost or not all(map(math.isfinite, numbers)):
            self._break_off(step, batch, here, before, calls)
            return None
        # a minibatch works for its own tasks only
        share = self.source.share(batch)
        self.spent += share * sum(float(call.stats.evaluations) for call in calls)
        run.state = state
        if self.source.streams:
            run.streamed = (run.streamed or 0) + self.source.number(batch)
        self.met = batch, stats.losses
        run.record(
            None,
            step=step + 1,
            loss=loss,
            gradient_norm=gradient_norm,
            lr=self.rates.taken,
            evaluations=self.spent,
            seconds=perf_counter() - self.begin,
        )
        if self.shared is None:
            return batch, stats
        self.shared.gather_if_due(state)
        return self.shared.to_warn_of(step, batch, stats)

    def look(self, step: int) -> None:
        """At the validation tasks after `step` steps, unless that was done; into the history."""
        if self.watch is None or self.watch.last == step or self.broken:
            return
        state = self.run.state
        if self.shared is not None:
            self.hold.hold()
            state = self.shared.whole(state)
            self.hold.release()
        value = self.watch.look(step, self.eta, state, self.rates.state)
        if self.run.history and self.run.history[-1]["step"] == step:
            self.run.history[-1]["validation"] = value

    def live(self) -> dict[str, Any]:
        """What is kept between two steps beside the run's own record."""
        return {
            "eta": self.eta,
            # of a run that broke off the optimiser's averages are not finite either
            "optimizer_state": None if self.broken else self.rates.state(),
            "watched": None if self.watch is None else self.watch.state(),
            "state": self.run.state if self.shared is None else self.shared.state_of(self.run),
        }

    def _move(
        self, batch: Batch, here: Eta, before: State, scale: float
    ) -> tuple[list[Outcome], bool]:
        """Let the optimiser step eta; what it evaluated, and whether its line search was lost.

        A step of first order is held from its gradient on, and so is taken or not; a line search
        takes long, and one that is interrupted goes back to where it began.
        """
        calls: list[Outcome] = []
        memory = _memory(self.optimizer) if self.quasi_newton else None

        def closure() -> float:
            if calls and not math.isfinite(float(_norm(self.eta))):
                raise _NowhereError  # where a line search may lead, and nothing can be computed
            calls.append(self.take_step(self.problem, batch, self.eta, before))
            for name, gradient in self._clipped(calls[-1].gradient).items():
                # as torch.optim.LBFGS wants it; members that are differentiated at once are not
                self.eta[name].grad = gradient.contiguous()
            value = float(calls[-1].value)
            if memory is None:
                self.hold.hold()
            return value

        try:
            self.rates.step(closure, scale)
            self.hold.hold()
        # an IndexError of torch's line search, of values that it cannot order
        except (_NowhereError, IndexError):
            if not self.quasi_newton:
                raise
            self.hold.hold()
            return calls, True
        except BaseException:
            if memory is not None:
                self._put_back(here)
                _remember(self.optimizer, memory)
            raise
        return calls, False

    def _clipped(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scaled down, all of it, to the norm that the plan allows."""
        if self.plan.clip is None:
            return gradient
        norm = _norm(gradient)
        factor = (self.plan.clip / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        return {name: factor * value for name, value in gradient.items()}

    def _break_off(
        self, step: int, batch: Batch, here: Eta, before: State, calls: list[Outcome]
    ) -> None:
        """Back to the last finite point.  Raises ValueError where that is none of this run's."""
        met = [] if self.met is None else [(self.met[0].names, self.met[1])]
        if self.shared is not None:
            batch, before, met, calls = self.shared.all_of(step, before, met, calls)
        message = _what_failed(
            self.strategy, self.problem, batch, here, before, met, calls, f"at step {step}"
        )
        if step == self.first:
            raise ValueError(message)
        self.run.stop = f"{message}; this is the fit of the last step at which it was"
        warnings.warn(self.run.stop, RuntimeWarning, stacklevel=5)
        self.broken, self.run.state = True, self.safe[1]
        self._put_back(self.safe[0])

    def _put_back(self, eta: Eta) -> None:
        for name, value in eta.items():
            self.eta[name].data.copy_(value)

    def arrived(self, step: int) -> bool:
        """Whether a run without noise has come to its end: its record is flat.

        Quasi-Newton steps are large, so that two of them tell.
        """
        run, window = self.run, 2 if self.quasi_newton else 50
        flat = self.whole is not None and not self.traits.noisy and settled(run.history, window)
        if not flat:
            return False
        left = promised(self.optimizer) if self.quasi_newton else 0.0
        kind = "quasi-Newton steps" if self.quasi_newton else "steps"
        rounding = torch.finfo(next(iter(self.eta.values())).dtype).eps
        run.converged = left <= max(JUMP, 100 * rounding * abs(run.history[-1]["loss"]))
        run.stop = (
            f"converged after {step + 1} {kind}: the objective no longer changes"
            if run.converged
            else f"after {step + 1} {kind} none lowers the objective, although its gradient "
            f"promises {left:.1e} nats: it jumps, as where a task's loss has several minima and "
            "eta decides which is found.  Take a Gaussian guide with vm.Joint, make the tasks' "
            "weights fewer, or start elsewhere"
        )
        return True

    def end(self) -> None:
        """Write what was reached into the run."""
        run, batch = self.run, self.source.known
        if self.source.streams and run.failure is not None and self.met is not None:
            batch = self.met[0]  # the step's own tasks may be what failed
        kept = None if self.watch is None else self.watch.best
        run.eta = {name: value.detach().clone() for name, value in self.eta.items()}
        run.optimizer_state = self.live()["optimizer_state"]
        if kept is not None:
            assert self.watch is not None
            run.stop, run.converged = f"{run.stop}; {self.watch.in_words(run.step)}", False
            run.kept, run.eta, run.state = kept.step, kept.eta, kept.state
            run.optimizer_state = kept.optimizer
        run.loss = self.take_step.value(self.problem, batch, run.eta, run.state)
        told = drowning if self.shared is None else self.shared.drowning
        run.outlier = None if self.met is None or self.broken else told(*self.met)
        if kept is None and not self.quasi_newton and run.stop.startswith(("stopped", "spent")):
            judge(run, self.source.total or len(batch), self.traits.period or 1)


def _optimizer(
    leaves: list[Tensor], run: Run, plan: Descent
) -> tuple[torch.optim.Optimizer, Rates]:
    """The optimiser, where a resumed run left it.  Raises ValueError for one of another kind."""
    optimizer = checked_optimizer(plan.optimizer(leaves))
    if plan.clip is not None and isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS chooses the length of its steps itself: leave clip out")
    rates = Rates(optimizer, plan.scheduler, plan.num_steps)
    if run.optimizer_state is None:
        return optimizer, rates
    states = run.optimizer_state, optimizer.state_dict()
    known, own = (set(state["param_groups"][0]) for state in states)
    # a file of version 0.1.0 knows no given rate: it goes on at the new optimizer's
    if known | {GIVEN} != own:
        raise ValueError(
            "resume was stepped by another kind of optimizer or of scheduler: give "
            "fit(optimizer=..., schedule=...) the same again"
        )
    rates.load(run.optimizer_state)
    return optimizer, rates


def _memory(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """What L-BFGS remembers, held still: its lists grow, and its last gradient is overwritten."""
    return [
        (leaf, {name: _still(value) for name, value in own.items()})
        for leaf, own in optimizer.state.items()
    ]


def _still(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(value) if isinstance(value, list) else value


def _remember(
    optimizer: torch.optim.Optimizer, memory: list[tuple[Tensor, dict[str, Any]]]
) -> None:
    optimizer.state.clear()
    optimizer.state.update(memory)


def _check_goes_together(
    strategy: Strategy, problem: Problem, traits: Traits, quasi_newton: bool, minibatch: bool
) -> None:
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
    if traits.period is not None and minibatch and isinstance(problem.guide, PyroGuide):
        raise ValueError(
            f"{type(strategy).__name__} with a guide of one's own needs all tasks in each step: "
            "leave batch_size out"
        )


def _in_period(
    strategy: Strategy, problem: Problem, whole: Batch, eta: Eta, state: State, period: int
) -> State:
    """phi back at the prior at the start of a period; its step size falls to zero within each."""
    within = state.step % period
    state = replace(state, lr_scale=0.5 * (1.0 + math.cos(math.pi * within / period)))
    if state.step == 0 or within:
        return state
    start = strategy.init(problem, whole, {name: value.detach() for name, value in eta.items()})
    return replace(state, phi=start.phi, inner=start.inner)


def _what_failed(
    strategy: Strategy,
    problem: Problem,
    batch: Batch,
    eta: Eta,
    state: State,
    met: list[tuple[tuple[str, ...], Tensor]],
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
    norm: Tensor = torch.linalg.vector_norm(
        torch.cat([value.detach().reshape(-1) for value in eta.values()])
    )
    return norm
