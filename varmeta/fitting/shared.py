"""What all processes of a descent do together: one sum a step, the end, and what is rarely asked.

Whatever is decided is decided on sums, so that all decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from varmeta.fitting import chunks
from varmeta.fitting.blame import drowning_of, rows_of
from varmeta.fitting.callback import EndedElsewhere
from varmeta.fitting.chunks import Outcome
from varmeta.fitting.compiled_step import Step
from varmeta.fitting.run import Run
from varmeta.fitting.shard import Shard
from varmeta.group.processes import ProcessError
from varmeta.numerics.tree import Tree, take
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Traits
from varmeta.strategies.warnings import Kind, warning
from varmeta.tasks import Batch

# Beside value, evaluations and gradient a process adds up how many have to warn of something, how
# many end here, and whether the first wants to write a checkpoint behind this step.
DOUBTS, ENDS, DUE, MARKS = 0, 1, 2, 3


class Shared:
    """What a descent does with the other processes: a `Step`, and the end.

    said: what was warned of before.  eta: all of it is learned.
    due: whether a checkpoint is, behind a step of that number.
    """

    def __init__(
        self,
        step: Step,
        shard: Shard,
        traits: Traits,
        said: set[Kind],
        eta: Eta,
        due: Callable[[int], bool],
    ) -> None:
        self.step, self.shard, self.traits, self.said, self._due = step, shard, traits, said, due
        self.processes = shard.processes
        self.marks = [0.0] * MARKS
        self.size = 2 + sum(value.numel() for value in eta.values())
        self.met = self.gathered = False
        self._state: State | None = None  # of all tasks, where a checkpoint is due

    # -- a step ------------------------------------------------------------------------------------

    def __call__(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> Outcome:
        """Raises EndedElsewhere where another process takes no part in the step."""
        own = self.step(problem, batch, eta, state) if len(batch) else _nothing(eta, state)
        stats, first = own.stats, next(iter(eta.values()))
        evaluations = torch.as_tensor(stats.evaluations).to(first) * batch.share
        marks = [0.0] * MARKS
        marks[DOUBTS] = float(len(batch) and self._doubts(batch, stats))
        marks[DUE] = float(self.processes.is_first and self._due(state.step + 1))
        total = self._add(own.value, evaluations, marks, own.gradient)
        if self.marks[ENDS]:
            self._hear(None)
        value, evaluations, *gradients = total.split([1, 1, *(x.numel() for x in eta.values())])
        gradient = {
            name: part.reshape(x.shape).to(x)
            for (name, x), part in zip(eta.items(), gradients, strict=True)
        }
        stats = replace(stats, evaluations=float(evaluations))
        return Outcome(value[0].to(own.value), gradient, own.state, stats)

    def value(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> float:
        """As `Step.value`; state: of all tasks."""
        own = self.step.value(problem, batch, eta, self.own(state)) if len(batch) else 0.0
        like = batch.support.like
        return float(self.processes.add(like.new_tensor(own, dtype=torch.float64)))

    def _add(
        self, value: Tensor, evaluations: Tensor, marks: list[float], gradient: dict[str, Tensor]
    ) -> Tensor:
        """The one sum of a step: value, evaluations and gradient; the marks are kept."""
        parts = [value, evaluations, *gradient.values()]
        flat = torch.cat([part.detach().reshape(-1).double() for part in parts])
        total = self.processes.add(torch.cat([flat, flat.new_tensor(marks)]))
        self.marks = total[self.size :].tolist()
        return total[: self.size]

    def _doubts(self, batch: Batch, stats: Stats) -> bool:
        try:
            return warning(self.traits, batch, stats, self.said) is not None
        except RuntimeError:  # the strategy is to raise, which all do together
            return True

    # -- what concerns all tasks, which is seldom asked for ----------------------------------------

    def to_warn_of(self, step: int, batch: Batch, stats: Stats) -> tuple[Batch, Stats]:
        """The tasks and stats of all processes, where one of them has to warn of something."""
        if not self.marks[DOUBTS]:
            return batch, Stats(stats.losses, stats.evaluations)
        return self.shard.everyone(step), self._joined(batch, stats)

    def all_of(
        self,
        step: int,
        state: State,
        met: list[tuple[tuple[str, ...], Tensor]],
        calls: list[Outcome],
    ) -> tuple[Batch, State, list[tuple[tuple[str, ...], Tensor]], list[Outcome]]:
        """The tasks of a step, and what is known of them and of those of the step before."""
        met = [(sum(self.processes.all(names), ()), self._losses(x)) for names, x in met]
        calls = [call._replace(stats=Stats(self._losses(call.stats.losses), 0.0)) for call in calls]
        return self.shard.everyone(step), self.whole(state), met, calls

    def _joined(self, batch: Batch, stats: Stats) -> Stats:
        found = [one for one in self.processes.all((len(batch), stats)) if one[0]]
        joined: Stats = chunks.joined([one[1] for one in found], [one[0] for one in found])
        return joined

    def _losses(self, own: Tensor) -> Tensor:
        return torch.cat(self.processes.all(own))

    def drowning(self, batch: Batch, losses: Tensor) -> str | None:
        """As `blame.drowning`, of all processes' tasks."""
        own = batch.names, rows_of(batch), losses
        found = [part for part in self.processes.all(own) if part[0]]
        names = tuple(name for part in found for name in part[0])
        return drowning_of(names, *(torch.cat([part[k] for part in found]) for k in (1, 2)))

    def own(self, state: State) -> State:
        """This process's rows of the state of all tasks."""
        if not self.shard.owned:
            return state
        rows = slice(*self.shard.own)
        return replace(
            state,
            phi=None if state.phi is None else take(state.phi, rows),
            inner=None if state.inner is None else take(state.inner, rows),
        )

    def whole(self, state: State) -> State:
        """The state of all tasks, of which each process has its rows."""
        if not self.shard.owned or self.gathered:
            return state
        return replace(state, phi=self._whole(state.phi), inner=self._whole(state.inner))

    def _whole(self, own: Tree | None) -> Tree | None:
        if own is None:
            return None
        counts = [b - a for a, b in zip(self.shard.edges, self.shard.edges[1:], strict=False)]
        return {name: self.processes.rows(value, counts) for name, value in own.items()}

    # -- checkpoints, and the end ------------------------------------------------------------------

    def is_due(self, step: int) -> bool:
        """Whether the first process is to write a checkpoint behind the last step."""
        return self._state is not None

    def gather_if_due(self, state: State) -> None:
        self._state = self.whole(state) if self.marks[DUE] else None

    def state_of(self, run: Run) -> State:
        """The state of all tasks, where a checkpoint is written."""
        return self._state or run.state

    def close(self, run: Run, by: BaseException | None) -> None:
        """Come together where this process takes no more steps.

        `run` then has the state of all tasks, and says why it ended as in all processes.

        by: what ended it here; None: nothing that the others would not know.

        Raises EndedElsewhere where nothing ended it here, but something did elsewhere.
        """
        if not self.met:
            self._meet(run, by)
        run.state, self.gathered, self._state = self.whole(run.state), True, None

    def _meet(self, run: Run, by: BaseException | None) -> None:
        marks = [0.0] * MARKS
        marks[ENDS] = float(by is not None)
        flat = torch.zeros(self.size, dtype=torch.float64, device=self.shard.tasks.device)
        self._add(flat[0], flat[1], marks, {"": flat[2:]})
        self.met = True
        if self.marks[ENDS]:
            self._hear(None if by is None else run)

    def _hear(self, run: Run | None) -> None:
        """Why the first of those that end here does.

        run: this process's, where it ends too; else EndedElsewhere is raised.
        """
        self.met = True
        own = (
            None if run is None else (run.stop, None if run.failure is None else repr(run.failure))
        )
        found: list[Any] = self.processes.all(own)
        rank = next(rank for rank, one in enumerate(found) if one is not None)
        stop, failure = found[rank]
        error = None
        if failure is not None:
            error = ProcessError(f"process {rank} of {self.processes.size} ended: {failure}")
        if run is None:
            raise EndedElsewhere(stop, error)
        run.stop = stop
        if rank != self.processes.rank:
            run.failure = error


def _nothing(eta: Eta, state: State) -> Outcome:
    """Of a process that has none of a step's tasks."""
    zeros = {name: torch.zeros_like(value) for name, value in eta.items()}
    zero = next(iter(eta.values())).detach().new_zeros(())
    return Outcome(zero, zeros, replace(state, step=state.step + 1), Stats(zero.new_zeros(0), 0.0))
