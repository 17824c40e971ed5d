"""Strategies for which phi is a function of eta: the end of an inner loop that starts at the prior."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from varmeta.bayes.guide import PyroGuide
from varmeta.bayes.model import TaskModel
from varmeta.certificate import Certificate
from varmeta.numerics.adjoint import ImplicitAdjoint, detached, unrolled
from varmeta.numerics.linear_solve import CG, LinearSolver
from varmeta.numerics.minimize import FirstOrderMinimizer, GradientDescent, Minimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree, add, detach, put, take
from varmeta.problem import Problem
from varmeta.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch, TaskSet


@dataclass(frozen=True)
class Implicit(Strategy):
    """phi_i*(eta) = argmin F_i(., eta), and the derivative of the outer objective G through it (amortised; iMAML).

    dG/deta = d_eta G - (d2F/dphi deta)' u   with   (d2F/dphi2) u = d_phi G.

    outer: "elbo" (the post's variational objective, where the envelope theorem leaves no linear system), "query" (iMAML),
        "query_elbo" or "query_predictive".
    inner_steps: None, to tolerance; or a fixed number K, in which case the gradient is exact only as far as phi_K is the
        minimum: look at the certificate.
    on_unconverged: "warn" (once per fit), "raise" or "ignore" a gradient whose certificate is out of tolerance.
    warm_start: start the inner solve from the task's last phi instead of the prior.
    tolerance: of the inner gradient, relative to 1 + its norm at the start; None: 1e-8 in float64, 1e-4 in float32.
    Reference: Rajeswaran et al. (2019).
    """

    outer: str = "elbo"
    inner_steps: int | None = None
    minimizer: Minimizer = field(default_factory=NewtonCG)
    linear_solver: LinearSolver = field(default_factory=CG)
    on_unconverged: str = "warn"
    warm_start: bool = field(default=False, kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.on_unconverged not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_unconverged must be 'warn', 'raise' or 'ignore', not {self.on_unconverged!r}")
        _check_steps(self.inner_steps)

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return State(detach(problem.start(batch, eta)) if self.warm_start else None)

    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        inner = problem.losses("elbo", batch, state.step)
        outer = inner if self.outer == "elbo" else problem.losses(self.outer, batch, state.step)
        start = take(state.phi, batch.rows) if state.phi is not None else detach(problem.start(batch, eta))
        solution = self._solve(inner, start, detach(eta))
        losses, stats = ImplicitAdjoint(self.linear_solver)(inner, outer, solution.value, eta)
        certificate = Certificate.of(batch.names, solution, stats)
        if self.on_unconverged == "raise" and not certificate.ok:
            raise RuntimeError(str(certificate))
        if state.phi is not None:
            state = replace(state, phi=put(state.phi, batch.rows, solution.value))
        evaluations = solution.stats["evaluations"].mean() + 2.0 * stats["linear_steps"].to(losses).mean() + 2.0
        return (
            self._total(problem, batch, eta, losses),
            replace(state, step=state.step + 1),
            {"losses": losses.detach(), "evaluations": evaluations, "certificate": certificate},
        )

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        return self._solve(problem.losses("elbo", batch, 0), detach(problem.start(batch, eta)), eta)

    def _solve(self, inner: Any, start: Tree, eta: Eta) -> Solution:
        return minimize(
            lambda phi: inner(phi, eta), start, self.minimizer, steps=self.inner_steps, tolerance=self.tolerance
        )

    def warning(self, stats: Stats) -> str | None:
        certificate = stats["certificate"]
        return None if self.on_unconverged == "ignore" or certificate.ok else str(certificate)


@dataclass(frozen=True)
class Unrolled(Strategy):
    """K inner steps from the prior, and the derivative through all of them (MAML with a delta guide; ABML with a normal).

    phi_{k+1} = phi_k - step(dF/dphi_k), phi_0 = prior(eta);   dG/deta by backpropagation through the K steps.
    Reference: Finn et al. (2017); Ravi and Beatson (2019).
    """

    outer: str = "query"
    inner_steps: int = 5
    minimizer: FirstOrderMinimizer = field(default_factory=lambda: GradientDescent(lr=0.01))

    through_start = True

    def __post_init__(self) -> None:
        _check_steps(self.inner_steps)
        if not isinstance(self.minimizer, FirstOrderMinimizer):
            raise ValueError(
                f"{type(self).__name__} differentiates or counts first-order steps: minimizer must be GradientDescent or "
                f"Adam, not {type(self.minimizer).__name__}"
            )

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        super().check(model, tasks, for_fit)
        if self.through_start and isinstance(self.problem(model, 0).guide, PyroGuide):
            raise ValueError(
                f"{type(self).__name__} differentiates through the start of phi, but a guide of one's own starts where its "
                "author put it, which carries no derivative to theta0: use Joint, Reinit, Implicit or Reptile"
            )

    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        inner = problem.losses("elbo", batch, state.step)
        outer = problem.losses(self.outer, batch, state.step)
        losses = self._through(inner, outer, problem.start(batch, eta), eta)
        stats = {"losses": losses.detach(), "evaluations": self._evaluations}
        return self._total(problem, batch, eta, losses), replace(state, step=state.step + 1), stats

    @property
    def _evaluations(self) -> float:
        return 3.0 * self.inner_steps + 1.0  # a gradient forward, a Hessian product (two gradients) backward

    def _through(self, inner: Any, outer: Any, start: Tree, eta: Eta) -> Tensor:
        solution = minimize(
            lambda phi: inner(phi, eta), start, self.minimizer, steps=self.inner_steps, create_graph=True
        )
        return unrolled(outer, solution.value, eta)

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        inner = problem.losses("elbo", batch, 0)
        start = detach(problem.start(batch, eta))
        return minimize(lambda phi: inner(phi, eta), start, self.minimizer, steps=self.inner_steps)


@dataclass(frozen=True)
class FirstOrder(Unrolled):
    """`Unrolled` with d phi_K / d phi_0 taken as the identity: first-order MAML."""

    exact = False

    @property
    def _evaluations(self) -> float:
        return self.inner_steps + 1.0

    def _check_precision(self, has_hyperprior: bool) -> None:
        super()._check_precision(has_hyperprior)
        if self.outer == "query" or self.outer == "query_predictive":
            raise ValueError(
                f"{type(self).__name__} with a delta guide passes no derivative to the precision: fix it "
                "(learn_precision=None), or use Implicit or Unrolled"
            )

    def _through(self, inner: Any, outer: Any, start: Tree, eta: Eta) -> Tensor:
        fixed = detach(eta)
        solution = minimize(lambda phi: inner(phi, fixed), detach(start), self.minimizer, steps=self.inner_steps)
        moved = add(solution.value, detach(start), -1.0)
        return unrolled(outer, add(start, moved), eta)


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

    def _through(self, inner: Any, outer: Any, start: Tree, eta: Eta) -> Tensor:
        fixed = detach(eta)
        solution = minimize(lambda phi: inner(phi, fixed), detach(start), self.minimizer, steps=self.inner_steps)
        return detached(outer, solution.value, eta)


def _check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"inner_steps must be at least 1, not {steps}")
