"""`Implicit`: phi is the inner argmin, differentiated by the implicit function theorem.

The derivative itself, iMAML's, is `ImplicitAdjoint` in `numerics/adjoint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import one_of
from varmeta.graphs.pieces import at
from varmeta.guides.convex import inverse_ceiling
from varmeta.numerics.adjoint import MAX_DIRECT_SIZE, ImplicitAdjoint
from varmeta.numerics.linear_solve import CG, Direct, LinearSolver, Neumann
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Solution
from varmeta.numerics.steps import value_and_gradient
from varmeta.numerics.tree import Tree, add, detach, dot, zeros_like
from varmeta.strategies import closed_form
from varmeta.strategies.amortised import (
    MAX_TRACED_STEPS,
    Amortised,
    check_steps,
    has_diverged,
)
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.objective import Outer
from varmeta.strategies.prior_coordinates import minimize_in_prior_coordinates
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.strategy import (
    ON_UNCONVERGED,
    Eta,
    OnUnconverged,
    State,
    Stats,
    Traits,
)
from varmeta.tasks import Batch


@dataclass(frozen=True)
class Implicit(Amortised):
    """phi_i*(eta) = argmin F_i(., eta), and the derivative of G through it (amortised; iMAML).

    G is the outer objective.

    dG/deta = d_eta G - (d2F/dphi deta)' u   with   (d2F/dphi2) u = d_phi G.

    outer: "elbo" (the post's variational objective, where the envelope theorem leaves no linear
        system), "query" (iMAML), "query_elbo" or "query_predictive"; or a function of your own, see
        docs/extend.md.
    inner_steps: None, to tolerance; or a fixed number K, in which case the gradient is exact only
        as far as phi_K is the minimum: look at the certificate.
    minimizer: None: `ClosedForm` where the model has one, the guide can be the posterior and
        neither inner_steps, alg nor warm_start is given; else `NewtonCG`.
    on_unconverged: "warn" (once per fit), "raise" or "ignore" a gradient whose certificate is out
        of tolerance.
    linear_solver: for (d2F/dphi2) u = d_phi G; None: dense up to 32 numbers a task, else `CG`.
    warm_start: start the inner solve from the task's last phi instead of the prior, and CG from its
        last u.  The phi of a task then follows its minimum however few inner steps are taken, so
        adaptation goes to tolerance.
    tolerance: of the inner gradient, relative to 1 + its norm at the start; None: 1e-8 in float64,
        1e-4 in float32.
    Reference: Rajeswaran et al. (2019).

    Raises ValueError for an unknown name, fewer than one step, and inner steps of `ClosedForm`.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> found = vm.meta_gradient(model, tasks, vm.Implicit("delta", "query"))
    >>> sorted(found.grads), found.certificate.ok
    (['intercept', 'log_scale', 'x'], True)
    """

    outer: Outer = "elbo"
    inner_steps: int | None = None
    minimizer: Minimizer | ClosedForm | None = None
    linear_solver: LinearSolver | None = None
    on_unconverged: OnUnconverged = "warn"
    warm_start: bool = field(default=False, kw_only=True)
    tolerance: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        one_of("on_unconverged", self.on_unconverged, ON_UNCONVERGED)
        check_steps(self.inner_steps)
        if isinstance(self.minimizer, ClosedForm):
            given = {"inner_steps": self.inner_steps, "warm_start": self.warm_start}
            moot = [name for name, value in given.items() if value]
            if moot:
                raise ValueError(f"ClosedForm takes no inner steps: leave out {moot[0]}")

    @property
    def rule(self) -> Minimizer:
        """What looks for phi where it is not known."""
        return NewtonCG() if isinstance(self.minimizer, ClosedForm | None) else self.minimizer

    def _knows(self, problem: Problem) -> bool:
        free = self.inner_steps is None and not self.warm_start
        return free and closed_form.chosen(self.minimizer, problem, self.expectation, self.outer)

    def traits(self, problem: Problem) -> Traits:
        if self._knows(problem):
            return Traits(
                noisy=not (problem.deterministic or closed_form.knows(problem, self.outer)),
                closed_form=True,
                at_minimum=True,
                on_unconverged=self.on_unconverged,
            )
        return Traits(
            noisy=not problem.deterministic,
            # at phi_K the value is that of K steps, the gradient that of the minimum
            line_search=self.inner_steps is None,
            at_minimum=True,
            not_captured=self._not_captured(problem),
            minimizer=self.rule,
            on_unconverged=self.on_unconverged,
        )

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        if not self.warm_start:
            return State()
        phi = detach(problem.start(batch, eta))
        return State(phi, zeros_like(phi) if self._is_solved_by_cg(problem, phi) else None)

    def _is_solved_by_cg(self, problem: Problem, phi: Tree) -> bool:
        envelope = self.outer == "elbo" and not problem.guide.at_mode
        return not envelope and isinstance(ImplicitAdjoint(self.linear_solver).solver(phi), CG)

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        if self._knows(problem):
            return closed_form.loss(self, problem, batch, eta, state)
        start = batch.of(state.phi) if state.phi is not None else detach(problem.start(batch, eta))
        losses, ends, adjoint, stats = self._at_minimum(problem, batch, eta, state, start)
        if state.phi is not None:
            state = replace(state, phi=batch.into(state.phi, ends))
        if state.inner is not None:
            state = replace(state, inner=batch.into(state.inner, adjoint))
        return self.total(problem, batch, eta, losses), replace(state, step=state.step + 1), stats

    def from_point(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, start: Tree
    ) -> tuple[Tensor, Stats]:
        """At the minimum below: losses `(tasks,)`."""
        losses, ends, _, stats = self._at_minimum(problem, batch, eta, state, start)
        inner, _ = self.objectives(problem, batch, state)
        unsettled = _on_a_ridge(inner, start, ends, detach(eta)).to(losses).mean()
        evaluations = stats.evaluations + 3.0
        return losses, replace(stats, evaluations=evaluations, ends=ends, unsettled=unsettled)

    def adapt_from_point(self, problem: Problem, batch: Batch, eta: Eta, start: Tree) -> Solution:
        inner, units = problem.losses("inner", batch, 0), problem.units(batch, start, eta)
        return self._solve(problem, batch, inner, start, eta, self.inner_steps, units)

    def _at_minimum(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, start: Tree
    ) -> tuple[Tensor, Tree, Tree, Stats]:
        """G at the minimum of F below `start`, differentiated implicitly; the minimum; the solution
        of the linear system where the last one is kept (else empty); and what the gradient rests
        on.
        """
        inner, outer = self.objectives(problem, batch, state)
        units = problem.units(batch, start, detach(eta))
        solution = self._solve(problem, batch, inner, start, detach(eta), self.inner_steps, units)
        # the certificate costs a second solve, which nobody looks at where it is ignored
        certify = self.on_unconverged != "ignore" if state.certify is None else state.certify
        guess = None if state.inner is None else batch.of(state.inner)
        ceiling = inverse_ceiling(problem.model, problem.guide, detach(eta))
        losses, linear = ImplicitAdjoint(self.linear_solver, certify)(
            inner, outer, solution.value, eta, guess, units, ceiling
        )  # fmt: skip
        adjoint = {} if guess is None else linear.pop("solution")
        # besides the products: the gradients of F and G, and the mixed derivative (none of the
        # three for the envelope)
        evaluations = (
            solution.stats["evaluations"].mean() + 2.0 * linear["products"].to(losses).mean()
        )
        evaluations = evaluations + (1.0 if inner is outer else 4.0)
        # unless it is asked what the gradient rests on, a graph need not work it out
        inner_end, about = (solution._replace(value={}), linear) if certify else (None, None)
        stats = Stats(losses.detach(), evaluations, inner_end, about, has_diverged(solution))
        return losses, solution.value, adjoint, stats

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        if self._knows(problem):
            return closed_form.solution(problem, batch, eta)
        start = detach(problem.start(batch, eta))
        steps = None if self.warm_start else self.inner_steps
        inner = problem.losses("inner", batch, 0)
        if steps is None and isinstance(self.rule, NewtonCG):
            found = minimize_in_prior_coordinates(
                problem, at(inner, eta), eta, start, self.rule, tolerance=self.tolerance
            )
            if found is not None:
                return found
        return self._solve(
            problem, batch, inner, start, eta, steps, problem.units(batch, start, eta)
        )

    def _solve(
        self,
        problem: Problem,
        batch: Batch,
        inner: Any,
        start: Tree,
        eta: Eta,
        steps: int | None,
        units: Tree | None,
    ) -> Solution:
        return minimize(
            at(inner, eta),
            start,
            self.rule,
            steps=steps,
            tolerance=self.tolerance,
            units=units,
            **problem.pace(batch, self.rule, eta, start)._asdict(),
        )

    def _not_captured(self, problem: Problem) -> str | None:
        if self.inner_steps is None or not isinstance(self.rule, FirstOrderMinimizer):
            return "an inner solve to tolerance looks at its own numbers"
        linear = self.linear_solver
        steps = (
            linear.max_steps
            if isinstance(linear, CG)
            else linear.num_terms
            if isinstance(linear, Neumann)
            else None
        )
        small = linear is None or isinstance(linear, Direct)
        if self.outer == "elbo" and self.on_unconverged == "ignore":
            steps = 0  # nothing is solved
        elif small and problem.model.weights.size <= MAX_DIRECT_SIZE:
            steps = problem.model.weights.size
        if steps is None:
            return "a linear solve to tolerance looks at its own numbers: give CG(max_steps=...)"
        if self.on_unconverged != "ignore" and not (small and steps):
            steps = 2 * steps  # the certificate's solve
        if self.inner_steps + steps > MAX_TRACED_STEPS:
            return (
                f"{self.inner_steps} inner and {steps} linear steps are too many for one graph "
                f"(at most {MAX_TRACED_STEPS})"
            )
        return None


def _on_a_ridge(inner: Losses, start: Tree, end: Tree, eta: Eta) -> Tensor:
    """Whether F curves downwards at `start` along the way to `end`, `(tasks,)`."""
    way = add(end, start, -1.0)
    _, point, gradient = value_and_gradient(lambda phi: inner(phi, eta), start, create_graph=True)
    slope = dot(gradient, way).sum()
    if not slope.requires_grad:
        return torch.zeros(len(way["loc"]), dtype=torch.bool)
    found = torch.autograd.grad(slope, list(point.values()), materialize_grads=True)
    return dot(dict(zip(point, found, strict=True)), way) < 0
