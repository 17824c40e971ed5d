"""Amortised strategies: phi is a function of eta, where an inner loop from the prior ends."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from varmeta._checks import whole_number
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch

# Inner and linear steps that may stand in one graph; its compilation time grows with them.
MAX_TRACED_STEPS = 50


@dataclass(frozen=True)
class Amortised(Strategy):
    """phi as a function of eta: where an inner loop ends that starts at the prior."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if "alg" in options:
            raise TypeError(
                f"{cls.__name__} takes no alg: vm.Stochastic(vm.{cls.__name__}(...), alg) goes on "
                "from its draws, of vm.Unrolled or vm.Implicit"
            )
        return super().__new__(cls)

    @abstractmethod
    def from_point(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, start: Tree
    ) -> tuple[Tensor, Stats]:
        """G where the strategy gets to from `start`, a draw of Alg, and what it rests on.

        `(tasks,)`, with its derivative in eta.
        """

    @abstractmethod
    def adapt_from_point(self, problem: Problem, batch: Batch, eta: Eta, start: Tree) -> Solution:
        """phi where the strategy gets to from there.

        start: phi, one row `(tasks, ...)` for each draw and task.
        """

    def objectives(self, problem: Problem, batch: Batch, state: State) -> tuple[Losses, Losses]:
        """F_i and G_i.

        One function where they are the same, which the implicit adjoint looks for.
        """
        inner = problem.losses("inner", batch, state.step)
        same = self.outer == "elbo" and not problem.guide.at_mode
        return inner, inner if same else problem.losses(self.outer, batch, state.step)


def with_inner_steps(strategy: Strategy, steps: int) -> Strategy:
    """The same strategy with that many inner steps.

    Rates of single steps stay those of the training's; steps beyond them take the last one's.
    Raises ValueError where it does not adapt by a fixed number of steps.
    """
    whole_number("inner_steps", steps)
    fixed = isinstance(strategy, Amortised) and getattr(strategy, "inner_steps", None) is not None
    if not fixed or getattr(strategy, "warm_start", False):
        raise ValueError(
            f"inner_steps is for strategies that adapt by a fixed number of them, such as "
            f"vm.Unrolled or vm.Implicit(inner_steps=5), not for {strategy.describe()}: leave it "
            "out"
        )
    return replace(strategy, inner_steps=steps)  # type: ignore[call-arg]


def check_steps(steps: int | None) -> None:
    if steps is not None:
        whole_number("inner_steps", steps)


def has_diverged(solution: Solution) -> Tensor:
    """Whether a task's inner loop ended above where it started, or not at a finite number."""
    return solution.result >= Result.DIVERGED
