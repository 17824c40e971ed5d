"""Strategies: one variational objective, handled in different ways.

A strategy answers four questions: where phi starts, how many inner steps it takes, how the derivative with respect to eta
comes back through them, and which outer objective is differentiated.

`joint.py` holds the strategies that store phi, `implicit.py` and `unrolled.py` those for which it is a function of eta:

| strategy     | start of phi     | inner steps       | derivative           | outer objective |
| `Joint`      | stored per task  | phi and eta move together                | elbo            |
| `Reinit`     | stored; back to the prior every k steps                    | elbo            |
| `Implicit`   | the prior        | to tolerance or K | implicit             | any of the four |
| `Unrolled`   | the prior        | K                 | through the iterates | any of the four |
| `FirstOrder` | the prior        | K                 | d phi_K/d phi_0 = 1  | any of the four |
| `Reptile`    | the prior        | K                 | phi_K held fixed     | elbo            |

The contract: `strategy.loss(problem, batch, eta, state) -> (scalar, state, stats)`, and backpropagating the scalar into
eta is the meta-gradient of `sum_i G_i + hyperprior`; for a minibatch, its unbiased estimate.  The stats hold "losses", G_i
`(tasks,)` without a graph, and "evaluations", the gradient evaluations per task that the step took; others are the strategy's
own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from varmeta._words import counted, kind_of
from varmeta.bayes.guide import Guide
from varmeta.bayes.guides import GUIDES, make_guide
from varmeta.bayes.kinks import kinked
from varmeta.bayes.laplace import Laplace
from varmeta.bayes.model import TaskModel
from varmeta.bayes.objective import OUTER
from varmeta.certificate import Certificate
from varmeta.numerics.arguments import no_tensors
from varmeta.numerics.linear_solve import LinearSolver
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree
from varmeta.problem import Problem
from varmeta.tasks import Batch, TaskSet, no_tasks

Eta = dict[str, Tensor]
Stats = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What a strategy keeps between outer steps; every tree has one row for each task of the whole set.

    phi: the stored guide parameters (None where phi starts afresh at each step).
    inner: the inner minimiser's state for them.
    step: the outer step, which also numbers the noise.
    lr_scale: the schedule's present multiplier, for steps that the strategy takes itself.
    certify: work out in full what an implicit gradient rests on, also where the strategy ignores it.
    """

    phi: Tree | None = None
    inner: Tree | None = None
    step: int = 0
    lr_scale: float = 1.0
    certify: bool = False


@dataclass(frozen=True)
class Strategy(ABC):
    """How phi and eta are found; see the table above.

    guide: "delta", "normal", "multivariate_normal", "low_rank", "laplace", "quadrature", one of `vm.guides`, or a factory of a
        Pyro guide.
    expectation, num_particles: how E_q is taken; "auto" is Gauss-Hermite for one weight per task, cubature where it
        serves, else antithetic draws (docs/choices.md); "quadrature", Gauss-Hermite for up to three weights, is what a far from
        quadratic likelihood wants.
    """

    guide: str | Guide | Callable[..., Any] = "delta"
    expectation: str = field(default="auto", kw_only=True)
    num_particles: int = field(default=2, kw_only=True)

    # not annotated: constants of the class here, a field where a strategy lets its user choose
    outer = "elbo"

    @property
    def gradient_is_of_value(self) -> bool:
        """Whether the scalar's gradient is that of its value, so that a line search may trust both."""
        return True

    frozen = True  # the noise of the expectation is held fixed while phi is minimised

    # the posterior of a training task is found anew from the prior, not stored
    adapts_afresh = True

    @property
    def gradients_held(self) -> int:
        """In how many gradients' worth of memory `loss` and `adapt` find room, for chunks of tasks."""
        return 4

    def describe(self) -> str:
        guide = self.guide if isinstance(self.guide, (str, Guide)) else getattr(self.guide, "__name__", "own guide")
        made = make_guide(guide) if guide in GUIDES or isinstance(guide, Guide) else None
        outer = made.evidence_name if isinstance(made, Laplace) and self.outer == "elbo" else self.outer
        return f"{type(self).__name__}({guide}, outer={outer})"

    def problem(self, model: TaskModel, tasks: TaskSet, seed: int) -> Problem:
        return Problem.make(model, tasks, self.guide, self.expectation, self.num_particles, self.frozen, seed)

    def check(self, model: TaskModel, tasks: TaskSet, for_fit: bool = True) -> None:
        """Refuse what cannot work, before any work is done; `for_fit` also what has a gradient but no optimum."""
        self._check_solvers()
        problem = self.problem(model, tasks, 0)
        if self.outer not in OUTER:
            raise ValueError(f"unknown outer objective {self.outer!r}: choose one of {OUTER}")
        if self.outer != "elbo":
            missing = [task.name for task in tasks if task.query is None or not len(task.query[1])]
            if missing:
                raise ValueError(
                    f"outer={self.outer!r} needs query data, but {counted(len(missing), 'task')} of {len(tasks)} "
                    f"{'has' if len(missing) == 1 else 'have'} none, {missing[0]!r} first: "
                    + (
                        "a task of one row has none to split off; leave such tasks out, tasks.with_query()"
                        if len(missing) < len(tasks)
                        else "give query=(x, y), or split the support with tasks.split(...)"
                    )
                )
        if for_fit and self.outer == "elbo" and not bool(tasks.batch().support.mask.any()):
            raise ValueError(
                f"{'the task has' if len(tasks) == 1 else f'none of the {len(tasks)} tasks has'} support rows, so there is "
                "nothing to learn the prior from: give Task(support=(x, y))"
                + (
                    ", or learn from the query rows by vm.Implicit(outer='query')"
                    if all(task.query is not None for task in tasks)
                    else ""
                )
            )
        self._check_curvature(model, tasks)
        prior = model.prior
        if for_fit and prior.learn_precision is not None:
            batch = tasks[:1].batch()
            if problem.is_point(batch, model.init(batch.support.x.new_zeros(()))):
                self._check_precision(
                    prior.bounds_points(model.weights, len(tasks)),
                    prior.hyperprior is not None or prior.scale_hyperprior is not None,
                )

    def _check_curvature(self, model: TaskModel, tasks: TaskSet) -> None:
        """Refuse a likelihood with kinks where its second derivative is what the answer is made of."""
        minimizer = getattr(self, "minimizer", None)
        by_newton = minimizer is not None and not isinstance(minimizer, FirstOrderMinimizer)
        if not (by_newton or hasattr(self, "linear_solver")):
            return
        batch = tasks.batch()
        density = kinked(model, batch, model.init(batch.support.x.new_zeros(())))
        if density is not None:
            raise ValueError(
                f"the density of y, {density}, has a kink, whose curvature no second derivative sees: "
                f"{self.describe()} would rest on a curvature that is not there.  Use vm.Joint('normal') or "
                "vm.Joint('multivariate_normal'), whose steps are then Adam's, or a smooth density with heavy tails, such as "
                "likelihoods.StudentT()"
            )

    def _check_solvers(self) -> None:
        """The parts that a strategy may have are objects, not names, and made of plain numbers."""
        no_tensors(self)
        minimizer, solver = getattr(self, "minimizer", None), getattr(self, "linear_solver", None)
        if minimizer is not None and not isinstance(minimizer, Minimizer):
            raise TypeError(
                f"minimizer must be one of vm.Adam(), vm.GradientDescent() or vm.NewtonCG(), not {kind_of(minimizer)}"
            )
        if solver is not None and not isinstance(solver, LinearSolver):
            raise TypeError(f"linear_solver must be one of vm.CG(), vm.Neumann() or vm.Direct(), not {kind_of(solver)}")

    def _check_precision(self, bounded: bool, has_hyperprior: bool) -> None:
        if self.outer in ("elbo", "query_elbo") and has_hyperprior and not bounded:
            raise ValueError(
                "the hyperprior does not bound the precision under a delta guide: its density falls too slowly, so that all "
                "weights under one precision, of all tasks, still gain from meeting theta0.  Take one with an exponential "
                "tail, such as a Gamma, for every learned precision (with learn_precision='full' also an lkj above 1 + tasks "
                "/ 2), or a Gaussian guide"
            )
        if self.outer in ("elbo", "query_elbo") and not bounded:
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

    def value(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> float:
        """The outer objective at eta and the state, for the record (nats)."""
        return float(self.loss(problem, batch, {name: e.detach() for name, e in eta.items()}, state)[0].detach())

    @abstractmethod
    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        """phi of (new) tasks: the same inner problem as in training, on their support data."""

    def settled(self, state: State) -> bool:
        """Whether the stored phi are the tasks' posteriors now, and not on their way there."""
        return True

    def is_noisy(self, problem: Problem) -> bool:
        """Whether `loss` draws random numbers anew at every step."""
        return not problem.deterministic

    def moving(self, problem: Problem, batch: Batch, eta: Eta, state: State, stats: Stats) -> Tensor | None:
        """For a stochastic Alg, see `Amortised.moving`; else None."""
        return None

    def before(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> State:
        """What is done to the state between two steps; for the caller of `loss` to call first."""
        return state

    def not_captured(self, problem: Problem) -> str | None:
        """Why `loss` cannot be traced into one graph, in a sentence; None where it can."""
        return None

    def not_in_pieces(self, problem: Problem) -> str | None:
        """Why `loss` gains nothing from an inner loop whose body is a graph; None where it does."""
        return self.not_captured(problem)

    def certificate(self, batch: Batch, stats: Stats) -> Certificate | None:
        """What an implicit gradient rests on, from the stats of `loss`; None for other gradients."""
        return None

    def warning(self, batch: Batch, stats: Stats) -> str | None:
        """What the caller of `loss` should warn about (once), if anything.

        Raises RuntimeError where the strategy was told to raise.
        """
        return None

    def _total(self, problem: Problem, batch: Batch, eta: Eta, losses: Tensor) -> Tensor:
        return losses.sum() * (batch.total / len(batch)) + batch.share * problem.model.penalty(eta)


def check_kinds(model: object, tasks: object, strategy: object) -> None:
    """Raise TypeError where one of the three is something else."""
    if not isinstance(model, TaskModel):
        raise TypeError(f"model must be a TaskModel, not {kind_of(model)}")
    if not isinstance(tasks, TaskSet):
        raise TypeError(f"tasks must be a TaskSet, not {no_tasks(tasks)}")
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be one of vm.Joint(), vm.Implicit(), ..., not {strategy!r}")
