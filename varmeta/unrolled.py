"""K inner steps from the prior: `Unrolled` differentiates through them, `FirstOrder` and `Reptile` do not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from varmeta._words import counted
from varmeta.amortised import MAX_TRACED_STEPS, Amortised, check_steps, diverged, has_diverged
from varmeta.bayes.guide import PyroGuide
from varmeta.bayes.laplace import Laplace
from varmeta.bayes.model import TaskModel
from varmeta.bayes.quadrature import Quadrature
from varmeta.numerics.adjoint import detached, unrolled
from varmeta.numerics.minimize import Adam, FirstOrderMinimizer, GradientDescent, minimize
from varmeta.numerics.pieces import at
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree, add, detach
from varmeta.problem import Problem
from varmeta.stochastic import StochasticAlg
from varmeta.strategy import Eta, State, Stats
from varmeta.tasks import Batch, TaskSet

# Adam's steps are about its lr; one below this share of it had a gradient that is 0 but for rounding.
STILL = 1e-6


@dataclass(frozen=True)
class Unrolled(Amortised):
    """K inner steps from the prior, and the derivative through all of them (MAML with a delta guide; ABML with a normal).

    phi_{k+1} = phi_k - step(dF/dphi_k), phi_0 = prior(eta);   dG/deta by backpropagation through the K steps.
    Reference: Finn et al. (2017); Ravi and Beatson (2019).
    """

    outer: str = "query"
    inner_steps: int = 5
    minimizer: FirstOrderMinimizer = field(default_factory=lambda: GradientDescent(lr=0.01))

    through_start = True

    def __post_init__(self) -> None:
        check_steps(self.inner_steps)
        if not isinstance(self.minimizer, FirstOrderMinimizer):
            raise ValueError(
                f"{type(self).__name__} differentiates or counts first-order steps: minimizer must be GradientDescent or "
                f"Adam, not {type(self.minimizer).__name__}"
            )

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        super().check(model, tasks, for_fit)
        guide = self.problem(model, tasks, 0).guide
        # the gradient of Laplace's formula at phi_K can be asked for; a fit would call its value an evidence
        if isinstance(guide, Quadrature) or (for_fit and self.outer == "elbo" and isinstance(guide, Laplace)):
            raise ValueError(
                f"{type(self).__name__} stops after {counted(self.inner_steps, 'step')}, but the {guide.evidence_name} of this "
                f"guide is that around the mode, and no evidence elsewhere: use vm.Implicit({self.guide!r})"
            )
        if self.through_start and isinstance(guide, PyroGuide):
            raise ValueError(
                f"{type(self).__name__} differentiates through the start of phi, but a guide of one's own starts where its "
                "author put it, which carries no derivative to theta0: use Joint, Reinit, Implicit or Reptile"
            )

    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        if self.alg is not None:
            return self._noisy_loss(self.alg, problem, batch, eta, state)
        inner, outer = self._objectives(problem, batch, state)
        losses, solution = self._through(
            inner, outer, problem.start(batch, eta), eta, problem.lr_scale(batch, self.minimizer)
        )
        stats = {
            "losses": losses.detach(), "evaluations": self._evaluations, "diverged": has_diverged(solution)
        }  # fmt: skip
        return self._total(problem, batch, eta, losses), replace(state, step=state.step + 1), stats

    def _noisy_loss(
        self, alg: StochasticAlg, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        """The mean over draws at the end of the noisy steps."""
        walk = alg.walk(problem, batch, eta, state.step, graph=not alg.uses_score)
        _, outer = self._objectives(problem, batch.repeat(alg.num_draws), state)
        losses = unrolled(outer, walk[-1], eta)
        total = self._total(problem, batch, eta, self._mean(losses))
        if alg.uses_score:
            total = self._add_score(total, problem, batch, eta, state, walk, losses)
        stats = {
            "losses": self._mean(losses.detach()),
            "evaluations": alg.num_draws * ((4.0 if alg.uses_score else 3.0) * alg.num_steps + 1.0),
            "ends": detach(walk[-1]),
        }
        return total, replace(state, step=state.step + 1), stats

    @property
    def gradients_held(self) -> int:
        return 4 * (1 + self.inner_steps)  # every step's graph is kept for the way back

    @property
    def _evaluations(self) -> float:
        return 3.0 * self.inner_steps + 1.5  # a gradient forward, a Hessian product (two gradients) backward

    def _through(
        self, inner: Any, outer: Any, start: Tree, eta: Eta, lr_scale: Tensor | None
    ) -> tuple[Tensor, Solution]:
        solution = minimize(
            at(inner, eta), start, self.minimizer, steps=self.inner_steps, create_graph=True, lr_scale=lr_scale
        )
        end = solution.value
        # in double precision one step still leaves enough digits, also where another weight's change would move this one
        if isinstance(self.minimizer, Adam) and (
            self.inner_steps > 1 or any(x.dtype != torch.float64 for x in end.values())
        ):
            end = {name: _kept_where_still(start[name], x, self.minimizer.lr) for name, x in end.items()}
        return unrolled(outer, end, eta), solution

    def not_captured(self, problem: Problem) -> str | None:
        if self.inner_steps > MAX_TRACED_STEPS:
            return f"{self.inner_steps} inner steps are too many for one graph (at most {MAX_TRACED_STEPS})"
        return super().not_captured(problem)

    def warning(self, batch: Batch, stats: Stats) -> str | None:
        return diverged(batch, stats["diverged"], self.minimizer) if "diverged" in stats else None

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        inner = problem.losses("inner", batch, 0)
        rates = problem.lr_scale(batch, self.minimizer)
        if self.alg is not None:
            end = self.alg.one_draw(problem, batch, eta)
            return minimize(at(inner, eta), end, self.minimizer, steps=0, lr_scale=rates)
        start = detach(problem.start(batch, eta))
        return minimize(at(inner, eta), start, self.minimizer, steps=self.inner_steps, lr_scale=rates)


def _kept_where_still(start: Tensor, end: Tensor, lr: float) -> Tensor:
    """`end`, which follows `start` one to one where Adam has not moved it.

    That is so where a gradient is 0 all the way: a column of zeros, a unit that is dead in this task, a task without support.
    Adam's step has the slope lr / eps there, some 1e6, and the way back through several steps would lose its digits in
    terms of that size that cancel.
    """
    moved = (end - start).detach()
    return torch.where(moved.abs() <= STILL * lr, start + moved, end)


@dataclass(frozen=True)
class FirstOrder(Unrolled):
    """`Unrolled` with d phi_K / d phi_0 taken as the identity: first-order MAML."""

    @property
    def gradient_is_of_value(self) -> bool:
        return False

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        super().check(model, tasks, for_fit)
        if self.alg is not None:
            raise ValueError(f"{type(self).__name__} takes no alg: use Unrolled(alg=...) or Implicit(alg=...)")

    def not_in_pieces(self, problem: Problem) -> str | None:
        return None  # no derivative goes through the steps

    @property
    def _evaluations(self) -> float:
        return self.inner_steps + 1.5

    def _check_precision(self, bounded: bool, has_hyperprior: bool) -> None:
        super()._check_precision(bounded, has_hyperprior)
        if self.outer == "query" or self.outer == "query_predictive":
            raise ValueError(
                f"{type(self).__name__} with a delta guide passes no derivative to the precision: fix it "
                "(learn_precision=None), or use Implicit or Unrolled"
            )

    def _through(
        self, inner: Any, outer: Any, start: Tree, eta: Eta, lr_scale: Tensor | None
    ) -> tuple[Tensor, Solution]:
        fixed = detach(eta)
        solution = minimize(at(inner, fixed), detach(start), self.minimizer, steps=self.inner_steps, lr_scale=lr_scale)
        moved = add(solution.value, detach(start), -1.0)
        return unrolled(outer, add(start, moved), eta), solution


@dataclass(frozen=True)
class Reptile(FirstOrder):
    """K inner steps, then theta0 is pulled towards where they ended: lambda (theta0 - phi_K), the elbo with phi_K held fixed.

    Reference: Nichol et al. (2018); its pull with the precision of the prior as the factor.
    """

    outer: str = "elbo"

    through_start = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer != "elbo":
            raise ValueError(
                f"Reptile pulls theta0 towards phi_K, which is the elbo's derivative; outer={self.outer!r}"
            )

    def _through(
        self, inner: Any, outer: Any, start: Tree, eta: Eta, lr_scale: Tensor | None
    ) -> tuple[Tensor, Solution]:
        fixed = detach(eta)
        solution = minimize(at(inner, fixed), detach(start), self.minimizer, steps=self.inner_steps, lr_scale=lr_scale)
        return detached(outer, solution.value, eta), solution
