"""Amortised strategies: phi is a function of eta, the end of an inner loop that starts at the prior."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from varmeta._numbers import whole_number
from varmeta._words import counted
from varmeta.bayes.check_rows import rows_meet
from varmeta.bayes.guide import Delta
from varmeta.bayes.model import TaskModel
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.linear_solve import LinearSolver
from varmeta.numerics.minimize import GradientDescent, Minimizer
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree
from varmeta.problem import Losses, Problem
from varmeta.stochastic import StochasticAlg, leave_one_out
from varmeta.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch, TaskSet

# Inner and linear steps that may stand in one graph; its compilation time grows with them.
MAX_TRACED_STEPS = 50


@dataclass(frozen=True)
class Amortised(Strategy):
    """phi as a function of eta.

    alg: Alg as a distribution instead of a function: the outer objective becomes E_{theta ~ Alg} (see `StochasticAlg`).
        Needs the delta guide.
    """

    alg: StochasticAlg | None = field(default=None, kw_only=True)

    @property
    def _solver(self) -> LinearSolver | None:
        return None

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        super().check(model, tasks, for_fit)
        if self.alg is None:
            return
        if not isinstance(self.alg, StochasticAlg):
            raise TypeError(f"alg must be a StochasticAlg, not {type(self.alg).__name__}")
        if not isinstance(self.problem(model, tasks, 0).guide, Delta):
            raise ValueError(
                f"a StochasticAlg ends at points, so it goes with guide='delta', not {self.guide!r}: a Gaussian guide is "
                "a distribution over weights already"
            )
        where = rows_meet(model, tasks.batch().support, reorder=True) if self.alg.batch_size is not None else None
        if where is not None:
            raise ValueError(
                f"{where}: a row's result depends on the task's other rows or on their order, so that a minibatch of them is "
                "another problem: leave out the StochasticAlg's batch_size"
            )

    def is_noisy(self, problem: Problem) -> bool:
        return self.alg is not None or super().is_noisy(problem)

    def not_captured(self, problem: Problem) -> str | None:
        return None if self.alg is None else "a StochasticAlg draws its own noise at every inner step"

    def moving(self, problem: Problem, batch: Batch, eta: Eta, state: State, stats: Stats) -> Tensor | None:
        """Of the mean over Alg, a scalar whose derivative is the part through how the ends of the draws move.

        Each end is taken as a minimum of F_i and differentiated implicitly; where it has no positive curvature nothing
        is counted.  None without `alg`.
        """
        if self.alg is None:
            return None
        inner, outer = self._objectives(problem, batch.repeat(self.alg.num_draws), state)
        losses, _ = ImplicitAdjoint(self._solver, certify=False)(inner, outer, stats["ends"], eta)
        return self._total(problem, batch, eta, self._mean(losses))

    def _add_score(
        self, total: Tensor, problem: Problem, batch: Batch, eta: Eta, state: State, walk: list[Tree], losses: Tensor
    ) -> Tensor:
        """`total`, whose derivative now also says how the probability of each draw changes; losses: one per draw and task."""
        assert self.alg is not None
        weights = leave_one_out(losses.detach().reshape(self.alg.num_draws, -1)).reshape(-1)
        weights = weights * (batch.total / len(batch))
        for name, gradient in self.alg.score(problem, batch, eta, state.step, walk, weights).items():
            total = total + (gradient * (eta[name] - eta[name].detach())).sum()  # zero in value
        return total

    def _objectives(self, problem: Problem, batch: Batch, state: State) -> tuple[Losses, Losses]:
        """F_i and G_i; one function where they are the same, which the implicit adjoint looks for."""
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


def diverged(batch: Batch, which: Tensor, minimizer: Minimizer) -> str | None:
    """A sentence that names a task, and what to change in the numbers of the minimizer.

    which: `(tasks,)`, or one for each draw and task.
    """
    flags = which.reshape(-1, len(batch)).any(0)
    bad = [name for name, yes in zip(batch.names, flags.tolist(), strict=True) if yes]
    if not bad:
        return None
    first = f"{bad[0]!r}" + (" first" if len(bad) > 1 else "")
    sentence = f"the inner steps diverge for {counted(len(bad), 'task')}, {first}, whose loss they raise: "
    if not isinstance(minimizer, GradientDescent):
        return sentence + "lower the minimizer's learning rate"
    points, lr = int(batch.support.num_points.max()), minimizer.lr
    if minimizer.per_point:
        return sentence + (
            f"lower the minimizer's lr of {lr:g}, or use Adam, whose steps do not grow with the curvature "
            "(a field's rate a on a mean squared error is 2 s^2 a under a Gaussian of noise scale s)"
        )
    return sentence + (
        f"losses are sums, so that lr={lr:g} on up to {counted(points, 'point')} is a step of "
        f"{lr * points:g} on their mean.  Take GradientDescent({lr:g}, per_point=True), which divides "
        "by the number of points, a lower lr, or Adam, whose steps do not grow with the curvature"
    )
