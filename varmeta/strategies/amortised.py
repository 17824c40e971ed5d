"""Amortised strategies: phi is a function of eta, where an inner loop from the prior ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from varmeta._checks import whole_number
from varmeta.guides.delta import Delta
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.stochastic import StochasticAlg, leave_one_out
from varmeta.strategies.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch

# Inner and linear steps that may stand in one graph; its compilation time grows with them.
MAX_TRACED_STEPS = 50
DRAWS_ITS_OWN = "a StochasticAlg draws its own noise at every inner step"


@dataclass(frozen=True)
class Amortised(Strategy):
    """phi as a function of eta.

    alg: Alg as a distribution instead of a function: the outer objective becomes E_{theta ~ Alg}
        (see `StochasticAlg`). Needs the delta guide.
    """

    alg: StochasticAlg | None = field(default=None, kw_only=True)

    def _check_guide(self, problem: Problem) -> None:
        if self.alg is not None and not isinstance(problem.guide, Delta):
            raise ValueError(
                "a StochasticAlg ends at points, so it goes with guide='delta', not "
                f"{self.guide!r}: a Gaussian guide is a distribution over weights already"
            )

    def _check_alg(self) -> None:
        if not (self.alg is None or isinstance(self.alg, StochasticAlg)):
            raise TypeError(f"alg must be a StochasticAlg, not {type(self.alg).__name__}")

    def _is_noisy(self, problem: Problem) -> bool:
        return self.alg is not None or not problem.deterministic

    def moving(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, stats: Stats
    ) -> Tensor | None:
        """Of the mean over Alg, a scalar whose derivative is the part through moving ends.

        The ends are where the draws of Alg end.

        Each end is taken as a minimum of F_i and differentiated implicitly; where it has no
        positive curvature nothing is counted.  None without `alg`.
        """
        if self.alg is None or stats.ends is None:
            return None
        inner, outer = self._objectives(problem, batch.repeat(self.alg.num_draws), state)
        solver = getattr(self, "linear_solver", None)
        losses, _ = ImplicitAdjoint(solver, certify=False)(inner, outer, stats.ends, eta)
        return self.total(problem, batch, eta, self._mean(losses))

    def _add_score(
        self,
        total: Tensor,
        problem: Problem,
        batch: Batch,
        eta: Eta,
        state: State,
        walk: list[Tree],
        losses: Tensor,
    ) -> Tensor:
        """`total`, whose derivative now also says how the probability of each draw changes; losses:
        one per draw and task.
        """
        assert self.alg is not None
        weights = leave_one_out(losses.detach().reshape(self.alg.num_draws, -1)).reshape(-1)
        weights = weights * (batch.total / len(batch))
        for name, gradient in self.alg.score(
            problem, batch, eta, state.step, walk, weights
        ).items():
            total = total + (gradient * (eta[name] - eta[name].detach())).sum()  # zero in value
        return total

    def _objectives(self, problem: Problem, batch: Batch, state: State) -> tuple[Losses, Losses]:
        """F_i and G_i; one function where they are the same, which the implicit adjoint looks
        for.
        """
        inner = problem.losses("inner", batch, state.step)
        same = self.outer == "elbo" and not problem.guide.at_mode
        return inner, inner if same else problem.losses(self.outer, batch, state.step)

    def _mean(self, losses: Tensor) -> Tensor:
        """Over the draws of Alg, `(tasks,)`."""
        return losses if self.alg is None else losses.reshape(self.alg.num_draws, -1).mean(0)


def check_steps(steps: int | None) -> None:
    if steps is not None:
        whole_number("inner_steps", steps)


def has_diverged(solution: Solution) -> Tensor:
    """Whether a task's inner loop ended above where it started, or not at a finite number."""
    return solution.result >= Result.DIVERGED
