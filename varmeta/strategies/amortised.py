"""Amortised strategies: phi is a function of eta, where an inner loop from the prior ends."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
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
        """phi where the strategy gets to from there."""

    def objectives(self, problem: Problem, batch: Batch, state: State) -> tuple[Losses, Losses]:
        """F_i and G_i.

        One function where they are the same, which the implicit adjoint looks for.
        """
        inner = problem.losses("inner", batch, state.step)
        same = self.outer == "elbo" and not problem.guide.at_mode
        return inner, inner if same else problem.losses(self.outer, batch, state.step)


def check_steps(steps: int | None) -> None:
    if steps is not None:
        whole_number("inner_steps", steps)


def has_diverged(solution: Solution) -> Tensor:
    """Whether a task's inner loop ended above where it started, or not at a finite number."""
    return solution.result >= Result.DIVERGED
