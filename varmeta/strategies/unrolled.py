"""K inner steps from the prior, with the derivative through them (`Unrolled`) or without.

`FirstOrder` and `Reptile` do not differentiate through the steps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from varmeta._checks import counted
from varmeta.graphs.pieces import at
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.guides.quadrature import Quadrature
from varmeta.numerics.adjoint import detached, unrolled
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.minimize import FirstOrderMinimizer, minimize
from varmeta.numerics.solution import Solution
from varmeta.numerics.steps import Pace, block_size
from varmeta.numerics.tree import Tree, add, detach
from varmeta.strategies.amortised import (
    MAX_TRACED_STEPS,
    Amortised,
    check_steps,
    has_diverged,
)
from varmeta.strategies.objective import Outer
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.strategy import Eta, State, Stats, Traits
from varmeta.tasks import Batch

# Adam's steps are about its lr; one below this share of it had a gradient that is 0 but for
# rounding.
STILL = 1e-6


@dataclass(frozen=True)
class KSteps(Amortised):
    """phi_K after K first-order steps from the prior, and G there.

    phi_{k+1} = phi_k - step(dF/dphi_k).

    How the derivative of G comes back to eta is what subclasses say.
    """

    outer: Outer = "query"
    inner_steps: int = 5
    minimizer: FirstOrderMinimizer = field(default_factory=lambda: GradientDescent(lr=0.01))

    def __post_init__(self) -> None:
        check_steps(self.inner_steps)
        if not isinstance(self.minimizer, FirstOrderMinimizer):
            raise ValueError(
                f"{type(self).__name__} differentiates or counts first-order steps: minimizer must "
                f"be GradientDescent or Adam, not {type(self.minimizer).__name__}"
            )

    @abstractmethod
    def _through(
        self, inner: Losses, outer: Losses, start: Tree, eta: Eta, pace: Pace
    ) -> tuple[Tensor, Solution, float]:
        """G at phi_K, `(tasks,)`, with its derivative in eta; the end; and the gradient evaluations
        that this takes.
        """

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return State()

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        inner, outer = self.objectives(problem, batch, state)
        start = problem.start(batch, eta)
        pace = problem.pace(batch, self.minimizer, eta, start)
        losses, solution, evaluations = self._through(inner, outer, start, eta, pace)
        stats = Stats(losses.detach(), evaluations, diverged=has_diverged(solution))
        return self.total(problem, batch, eta, losses), replace(state, step=state.step + 1), stats

    def from_point(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, start: Tree
    ) -> tuple[Tensor, Stats]:
        """There: the noisy steps have taken the place of its own."""
        losses = unrolled(self.objectives(problem, batch, state)[1], start, eta)
        return losses, Stats(losses.detach(), 1.0, ends=detach(start))

    def adapt_from_point(self, problem: Problem, batch: Batch, eta: Eta, start: Tree) -> Solution:
        inner, pace = (
            problem.losses("inner", batch, 0),
            problem.pace(batch, self.minimizer, eta, start),
        )
        return minimize(at(inner, eta), start, self.minimizer, steps=0, **pace._asdict())

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        inner, known = problem.losses("inner", batch, 0), detach(eta)
        start = detach(problem.start(batch, eta))
        return self._steps(inner, start, eta, problem.pace(batch, self.minimizer, known, start))

    def _steps(self, inner: Losses, start: Tree, eta: Eta, pace: Pace) -> Solution:
        """phi_K without a derivative, but in the learned rates where they have a graph."""
        rule, steps = self.minimizer, self.inner_steps
        return minimize(at(inner, eta), start, rule, steps=steps, **pace._asdict())

    def _check_end(self, problem: Problem) -> None:
        if isinstance(problem.guide, Quadrature):
            raise ValueError(
                f"{type(self).__name__} stops after {counted(self.inner_steps, 'step')}, but the "
                f"{problem.guide.evidence_name} of this guide is that around the mode, and no "
                f"evidence elsewhere: use vm.Implicit({self.guide!r})"
            )

    def _check_start(self, problem: Problem) -> None:
        if isinstance(problem.guide, PyroGuide):
            raise ValueError(
                f"{type(self).__name__} differentiates through the start of phi, but a guide of "
                "one's own starts where its author put it, which carries no derivative to theta0: "
                "use Joint, Reinit, Implicit or Reptile"
            )

    @property
    def _too_long(self) -> str | None:
        if self.inner_steps <= MAX_TRACED_STEPS:
            return None
        return (
            f"{self.inner_steps} inner steps are too many for one graph (at most "
            f"{MAX_TRACED_STEPS})"
        )


@dataclass(frozen=True)
class Unrolled(KSteps):
    """K inner steps from the prior, and the derivative through all of them.

    MAML with a delta guide; ABML with a normal.

    phi_{k+1} = phi_k - step(dF/dphi_k),   phi_0 = prior(eta)

    dG/deta by backpropagation through the K steps.

    recompute: keep no step's graph, but make them again on the way back, a few at a time: memory
        does not grow with K, and a step takes four gradients instead of three.  None: beyond 50
        steps.
    Reference: Finn et al. (2017); Ravi and Beatson (2019).

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> found = vm.meta_gradient(model, tasks, vm.Unrolled(inner_steps=3))
    >>> sorted(found.grads)
    ['intercept', 'log_scale', 'x']
    """

    recompute: bool | None = field(default=None, kw_only=True)

    @property
    def _recomputes(self) -> bool:
        return self.inner_steps > MAX_TRACED_STEPS if self.recompute is None else self.recompute

    def traits(self, problem: Problem) -> Traits:
        self._check_end(problem)
        self._check_start(problem)
        again = "steps that are made again on the way back are no part of one graph"
        graph = self._too_long or (again if self._recomputes else None)
        # of how many steps a graph is kept for the way back; where blocks start takes as much again
        kept = 2 * block_size(self.inner_steps) if self._recomputes else self.inner_steps
        memory = 4 * (1 + kept)
        noisy, minimizer = not problem.deterministic, self.minimizer
        return Traits(
            noisy, memory=memory, not_captured=graph, not_in_pieces=graph, minimizer=minimizer
        )

    def _through(
        self, inner: Losses, outer: Losses, start: Tree, eta: Eta, pace: Pace
    ) -> tuple[Tensor, Solution, float]:
        solution = minimize(
            at(inner, eta),
            start,
            self.minimizer,
            steps=self.inner_steps,
            create_graph=True,
            recompute=tuple(eta.values()) if self._recomputes else None,
            **pace._asdict(),
        )
        end = solution.value
        # in double precision one step still leaves enough digits, also where another weight's
        # change would move this one
        if isinstance(self.minimizer, Adam) and (
            self.inner_steps > 1 or any(x.dtype != torch.float64 for x in end.values())
        ):
            end = {
                name: _kept_where_still(start[name], x, self.minimizer.lr)
                for name, x in end.items()
            }
        # a gradient forward, and perhaps once more, a Hessian product (two gradients) backward
        each = 4.0 if self._recomputes else 3.0
        return unrolled(outer, end, eta), solution, each * self.inner_steps + 1.5


def _kept_where_still(start: Tensor, end: Tensor, lr: float) -> Tensor:
    """`end`, which follows `start` one to one where Adam has not moved it.

    That is so where a gradient is 0 all the way: a column of zeros, a unit that is dead in this
    task, a task without support. Adam's step has the slope lr / eps there, some 1e6, and the way
    back through several steps would lose its digits in terms of that size that cancel.
    """
    moved = (end - start).detach()
    return torch.where(moved.abs() <= STILL * lr, start + moved, end)


@dataclass(frozen=True)
class FirstOrder(KSteps):
    """`Unrolled` with d phi_K / d phi_0 taken as the identity: first-order MAML.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> found = vm.meta_gradient(model, tasks, vm.FirstOrder(inner_steps=3))
    >>> sorted(found.grads)
    ['intercept', 'log_scale', 'x']
    """

    def traits(self, problem: Problem) -> Traits:
        self._check_end(problem)
        self._check_start(problem)
        return _first_order_traits(self, problem)

    def _through(
        self, inner: Losses, outer: Losses, start: Tree, eta: Eta, pace: Pace
    ) -> tuple[Tensor, Solution, float]:
        solution = self._steps(inner, detach(start), detach(eta), pace)
        moved = add(solution.value, detach(start), -1.0)
        return unrolled(outer, add(start, moved), eta), solution, self.inner_steps + 1.5


@dataclass(frozen=True)
class Reptile(KSteps):
    """K inner steps, then theta0 is pulled towards where they ended.

    By lambda (theta0 - phi_K), the elbo with phi_K held fixed.

    Reference: Nichol et al. (2018); its pull with the precision of the prior as the factor.

    Raises ValueError for another outer objective than "elbo".

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> found = vm.meta_gradient(model, tasks, vm.Reptile(inner_steps=3))
    >>> sorted(found.grads)
    ['intercept', 'log_scale', 'x']
    """

    outer: Outer = "elbo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer != "elbo":
            raise ValueError(
                "Reptile pulls theta0 towards phi_K, which is the elbo's derivative; "
                f"outer={self.outer!r}"
            )

    def traits(self, problem: Problem) -> Traits:
        self._check_end(problem)
        return _first_order_traits(self, problem)

    def _through(
        self, inner: Losses, outer: Losses, start: Tree, eta: Eta, pace: Pace
    ) -> tuple[Tensor, Solution, float]:
        solution = self._steps(inner, detach(start), detach(eta), pace)
        return detached(outer, solution.value, eta), solution, self.inner_steps + 1.5


def _first_order_traits(strategy: KSteps, problem: Problem) -> Traits:
    """Of strategies through whose steps no derivative goes."""
    return Traits(
        noisy=not problem.deterministic,
        line_search=False,
        moves_precision=False,
        memory=4 * (1 + strategy.inner_steps),
        not_captured=strategy._too_long,
        minimizer=strategy.minimizer,
    )
