"""Strategies: one variational objective, handled in different ways.

A strategy answers four questions: where phi starts, how many inner steps it takes, how the derivative with respect to eta
comes back through them, and which outer objective is differentiated.

| strategy     | start of phi     | inner steps       | derivative           | outer objective |
| `Joint`      | stored per task  | phi and eta move together                | elbo            |
| `Reinit`     | stored; back to the prior every k steps                    | elbo            |
| `Implicit`   | the prior        | to tolerance or K | implicit             | any of the four |
| `Unrolled`   | the prior        | K                 | through the iterates | any of the four |
| `FirstOrder` | the prior        | K                 | d phi_K/d phi_0 = 1  | any of the four |
| `Reptile`    | the prior        | K                 | phi_K held fixed     | elbo            |

The contract: `strategy.loss(problem, batch, eta, state) -> (scalar, state, stats)`, and backpropagating the scalar into
eta is the meta-gradient of `sum_i G_i + hyperprior`; for a minibatch, its unbiased estimate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from varmeta.bayes.guide import PyroGuide
from varmeta.bayes.model import TaskModel
from varmeta.bayes.objective import OUTER
from varmeta.certificate import Certificate
from varmeta.numerics.adjoint import ImplicitAdjoint, detached, unrolled
from varmeta.numerics.linear_solve import CG, LinearSolver
from varmeta.numerics.minimize import Adam, FirstOrderMinimizer, GradientDescent, Minimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree, add, detach, leaves, map_tree, put, take
from varmeta.problem import Problem
from varmeta.tasks import Batch, TaskSet

Eta = dict[str, Tensor]
Stats = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a strategy keeps between outer steps; every tree has one row for each task of the whole set.

    phi: the stored guide parameters (None where phi starts afresh at each step).
    inner: the inner minimiser's state for them.
    step: the outer step, which also numbers the noise.
    lr_scale: the schedule's present multiplier, for steps that the strategy takes itself.
    """

    phi: Tree | None = None
    inner: Tree | None = None
    step: int = 0
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Strategy(ABC):
    """How phi and eta are found; see the table above.

    guide: "delta", "normal", "multivariate_normal", or a factory of a Pyro guide.
    expectation, num_particles: how E_q is taken; "auto" is cubature up to 24 weights, else antithetic draws.
    """

    guide: str | Callable[..., Any] = "delta"
    expectation: str = field(default="auto", kw_only=True)
    num_particles: int = field(default=2, kw_only=True)

    # not annotated: constants of the class here, a field where a strategy lets its user choose
    outer = "elbo"
    exact = True  # the scalar's gradient is that of its value, so that a line search may trust both

    # the posterior of a training task is found anew from the prior, not stored
    adapts_afresh = True

    def describe(self) -> str:
        guide = self.guide if isinstance(self.guide, str) else getattr(self.guide, "__name__", "own guide")
        return f"{type(self).__name__}({guide}, outer={self.outer})"

    def problem(self, model: TaskModel, seed: int) -> Problem:
        return Problem.make(model, self.guide, self.expectation, self.num_particles, seed)

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        """Refuse what cannot work, before any work is done; `for_fit` also what has a gradient but no optimum."""
        problem = self.problem(model, 0)
        if self.outer not in OUTER:
            raise ValueError(f"unknown outer objective {self.outer!r}: choose one of {OUTER}")
        if self.outer != "elbo":
            missing = [task.name for task in tasks if task.query is None or not len(task.query[1])]
            if missing:
                raise ValueError(
                    f"outer={self.outer!r} needs query data, but {len(missing)} tasks have none, {missing[0]!r} first: give "
                    "query=(x, y), or split the support with tasks.split(...)"
                )
        prior = model.prior
        if for_fit and prior.learn_precision is not None:
            batch = tasks[:1].batch()
            if problem.is_point(batch, model.init(batch.support.x.new_zeros(()))):
                self._check_precision(prior.hyperprior is not None)

    def _check_precision(self, has_hyperprior: bool) -> None:
        if self.outer in ("elbo", "query_elbo") and not has_hyperprior:
            raise ValueError(
                "a delta guide cannot learn the precision from this objective, which falls without bound as the precision "
                "grows and all weights meet theta0.  Three ways out: a Gaussian guide (guide='normal' or "
                "'multivariate_normal'), a hyperprior on the precision (GaussianPrior(hyperprior=...)), or a query "
                "objective (Implicit or Unrolled with outer='query' or 'query_predictive')"
            )

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        """The state before the first step, for the batch of all tasks."""
        return State()

    @abstractmethod
    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        """The outer objective (nats, summed over all tasks), whose gradient in eta is the meta-gradient."""

    @abstractmethod
    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        """phi of (new) tasks: the same inner problem as in training, on their support data."""

    def warning(self, stats: Stats) -> str | None:
        """What the caller of `loss` should warn about (once), if anything."""
        return None

    def _total(self, problem: Problem, batch: Batch, eta: Eta, losses: Tensor) -> Tensor:
        return losses.sum() * (batch.total / len(batch)) + problem.model.prior.penalty(eta)


# -- phi stored per task -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joint(Strategy):
    """Minimise sum_i F_i(phi_i, eta) over eta and every phi_i together: the post's M(theta0, Q_i).

    phi_i <- phi_i - step(dF_i/dphi_i),   eta <- eta - step(sum_i dF_i/deta), from one gradient of both.

    minimizer: the first-order rule for phi; `fit` steps eta by torch.optim.  On small models `fit` replaces both by one
        Newton iteration on (phi, eta), unless an optimizer, batch size or budget is given.
    adapt_steps: steps of adaptation to new tasks where the expectation is by draws (else Newton, to tolerance).
    Reference: Amit and Meir (2018) for Gaussian guides; with a delta guide, Zhou et al. (2019), Meta-MinibatchProx.
    """

    guide: str | Callable[..., Any] = "normal"
    minimizer: FirstOrderMinimizer = field(default_factory=lambda: Adam(lr=1e-2), kw_only=True)
    adapt_steps: int = field(default=1000, kw_only=True)

    outer = "elbo"
    adapts_afresh = False

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        phi = detach(problem.start(batch, eta))
        return State(phi, self.minimizer.init(phi))

    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        state = self._before(problem, batch, eta, state)
        assert state.phi is not None and state.inner is not None
        phi = leaves(take(state.phi, batch.rows))
        losses = problem.losses("elbo", batch, state.step)(phi, eta)
        names = [name for name in eta if eta[name].requires_grad]
        total = self._total(problem, batch, eta, losses)
        scale = batch.total / len(batch)
        gradients = torch.autograd.grad(
            total, [*phi.values(), *(eta[name] for name in names)], allow_unused=True, materialize_grads=True
        )
        phi_gradient = dict(zip(phi, (g / scale for g in gradients), strict=False))
        new, inner = self.minimizer.update(detach(phi), phi_gradient, take(state.inner, batch.rows), state.lr_scale)
        state = replace(
            state, phi=put(state.phi, batch.rows, new), inner=put(state.inner, batch.rows, inner), step=state.step + 1
        )
        scalar = total.detach()
        for name, gradient in zip(names, gradients[len(phi) :], strict=True):
            # zero in value, `gradient` in derivative: eta's half of the one gradient that was taken
            scalar = scalar + (gradient * (eta[name] - eta[name].detach())).sum()
        return scalar, state, {"losses": losses.detach(), "evaluations": 1.0}

    def _before(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> State:
        return state

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        start = detach(problem.start(batch, eta))
        if problem.deterministic:
            inner = problem.losses("elbo", batch, 0)
            return minimize(lambda phi: inner(phi, eta), start, NewtonCG())
        return _adapt_with_fresh_noise(problem, batch, eta, start, self.minimizer, self.adapt_steps)


@dataclass(frozen=True)
class Reinit(Joint):
    """`Joint`, with every phi_i and its optimiser state set back to the prior every `every` steps.

    The post: "jointly minimize the variational objective with respect to theta0 and theta_i, but every once in a while
    reinitialize theta_i to be theta0".  Each period has its own step-size schedule for phi, full at its start and falling to
    zero at its end, while eta's falls once over the whole run; so phi's steps must be large enough to get from the prior
    to the posterior within a period.
    """

    minimizer: FirstOrderMinimizer = field(default_factory=lambda: Adam(lr=5e-2), kw_only=True)
    every: int = field(default=100, kw_only=True)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def _before(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> State:
        within = state.step % self.every
        state = replace(state, lr_scale=0.5 * (1.0 + math.cos(math.pi * within / self.every)))
        if state.step == 0 or within:
            return state
        assert state.phi is not None
        row = map_tree(lambda x: x[:1], detach(problem.start(batch, eta)))
        phi = map_tree(lambda new, old: new.expand_as(old).clone(), row, state.phi)
        return replace(state, phi=phi, inner=self.minimizer.init(phi))


# -- phi a function of eta -----------------------------------------------------------------------------------------------


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


STRATEGIES: dict[str, type[Strategy]] = {
    kind.__name__: kind for kind in (Joint, Reinit, Implicit, Unrolled, FirstOrder, Reptile)
}


def check_kinds(model: object, tasks: object, strategy: object) -> None:
    """Raise TypeError where one of the three is something else."""
    if not isinstance(model, TaskModel):
        raise TypeError(f"model must be a TaskModel, not {type(model).__name__}")
    if not isinstance(tasks, TaskSet):
        raise TypeError(
            f"tasks must be a TaskSet, not {type(tasks).__name__}: vm.TaskSet([vm.Task(support=(x, y)), ...])"
        )
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be one of vm.Joint(), vm.Implicit(), ..., not {strategy!r}")


def _check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ValueError(f"inner_steps must be at least 1, not {steps}")


def _adapt_with_fresh_noise(
    problem: Problem, batch: Batch, eta: Eta, phi: Tree, minimizer: FirstOrderMinimizer, steps: int
) -> Solution:
    """Stochastic descent on F_i, new draws at every step, the step size falling to zero."""
    inner = minimizer.init(phi)
    for step in range(steps):
        point = leaves(phi)
        losses = problem.losses("elbo", batch, step)(point, eta)
        gradient = dict(zip(point, torch.autograd.grad(losses.sum(), list(point.values())), strict=True))
        phi, inner = minimizer.update(detach(point), gradient, inner, 1.0 - step / steps)
    result = torch.full((len(batch),), int(Result.STEP_LIMIT), device=losses.device)
    return Solution(phi, result, {"evaluations": torch.full_like(losses, float(steps)).detach()})
