"""Strategies: one variational objective, handled in different ways.

A strategy answers four questions: where phi starts, how many inner steps it takes, how the
derivative with respect to eta comes back through them, and which outer objective is differentiated.

`joint.py` and `reinit.py` hold the strategies that store phi, `implicit.py` and `unrolled.py` those
for which it is a function of eta, `prototypes.py` the one for which it is made of means of a task's
classes; `stochastic.py` wraps some of these with an Alg that is a distribution:

| strategy     | start of phi     | inner steps       | derivative           | outer objective |
| `Joint`      | stored per task  | phi and eta move together                | elbo            |
| `Reinit`     | stored; back to the prior every k steps                    | elbo            |
| `Implicit`   | the prior        | to tolerance or K | implicit             | any of the four |
| `Unrolled`   | the prior        | K                 | through the iterates | any of the four |
| `FirstOrder` | the prior        | K                 | d phi_K/d phi_0 = 1  | any of the four |
| `Reptile`    | the prior        | K                 | phi_K held fixed     | elbo            |
| `Prototypes` | means of classes | none              | through the means    | query           |

In the place of any of the four a function of the user's own may stand (`objective.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from varmeta._checks import name_of
from varmeta.guides.guide import Guide
from varmeta.guides.laplace import Laplace
from varmeta.guides.make import GUIDE_NAMES, GuideName, make_guide
from varmeta.models.model import TaskModel
from varmeta.numerics.minimize import Minimizer
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree
from varmeta.strategies.expectation import ExpectationName
from varmeta.strategies.objective import Outer
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch, TaskSet

Eta = dict[str, Tensor]
OnUnconverged = Literal["warn", "raise", "ignore"]
ON_UNCONVERGED: tuple[OnUnconverged, ...] = get_args(OnUnconverged)


@dataclass(frozen=True)
class State:
    """What a strategy keeps between outer steps.

    Every tree has one row for each task of the whole set.

    phi: the stored guide parameters (None where phi starts afresh at each step).
    inner: the inner minimiser's state for them.
    step: the outer step, which also numbers the noise.
    lr_scale: the schedule's present multiplier, for steps that the strategy takes itself.
    certify: whether to work out what an implicit gradient rests on; None: as the strategy was told.

    >>> State().step, State(certify=True).phi
    (0, None)
    """

    phi: Tree | None = None
    inner: Tree | None = None
    step: int = 0
    lr_scale: float = 1.0
    certify: bool | None = None


@dataclass(frozen=True)
class Stats:
    """What one call of `loss` tells beside its scalar.

    losses: G_i of every task, `(tasks,)`, without a graph.
    evaluations: gradient evaluations per task that the call took, a number or a scalar tensor.
    inner, linear: the end of an inner solve and what is known of the linear system behind an
        implicit gradient.
    diverged: whether a task's inner steps ended above where they started, `(tasks,)` or one for
        each draw and task.
    ends: where the draws of a stochastic Alg ended.  unsettled: the share of them that ended on a
        ridge.

    >>> import torch
    >>> Stats(losses=torch.zeros(3), evaluations=2.0).losses.shape
    torch.Size([3])
    """

    losses: Tensor
    evaluations: Tensor | float
    inner: Solution | None = None
    linear: dict[str, Tensor] | None = None
    diverged: Tensor | None = None
    ends: Tree | None = None
    unsettled: Tensor | None = None


@dataclass(frozen=True)
class Traits:
    """What a fit must know of a strategy on a problem before it takes steps.

    noisy: `loss` draws random numbers anew at every step.
    line_search: the scalar's gradient is that of its value, so that a line search may trust both.
    stored: each task's phi is kept from step to step, and is its posterior in the end; else it is
        found anew from the prior.
    period: phi goes back to the prior every so many steps; None: never.
    closed_form: phi is known, so that nothing is searched for (`ClosedForm`).
    at_minimum: phi is a minimum of F_i, around which Laplace's evidence and quadrature's are
        defined.
    moves_precision: the gradient of a query objective reaches the precision under a delta guide
        too.
    copies: how many etas `loss` works at, each with its own intermediate results.
    memory: in how many gradients' worth of memory `loss` and `adapt` find room, for chunks of
        tasks.
    not_captured: why `loss` cannot be traced into one graph, in a sentence; None where it can.
    not_in_pieces: why it gains nothing from an inner loop whose body is a graph; None where it
        does.
    minimizer: whose steps may diverge; None: nobody's.
    on_unconverged: what is done about an implicit gradient whose certificate is out of tolerance.

    >>> traits = Traits(noisy=False, stored=True)
    >>> traits.line_search, traits.settled(State(step=3))
    (True, True)
    """

    noisy: bool
    line_search: bool = True
    stored: bool = False
    period: int | None = None
    closed_form: bool = False
    at_minimum: bool = False
    moves_precision: bool = True
    copies: int = 1
    memory: int = 4
    not_captured: str | None = None
    not_in_pieces: str | None = None
    minimizer: Minimizer | None = None
    on_unconverged: OnUnconverged = "ignore"

    def settled(self, state: State) -> bool:
        """Whether the stored phi are the tasks' posteriors now, and not on their way there."""
        return self.period is None or state.step % self.period == 0


@dataclass(frozen=True)
class Strategy(ABC):
    """How phi and eta are found; see the table above.

    guide: "delta", "normal", "multivariate_normal", "low_rank", "laplace", "quadrature", one of
        `vm.guides`, or a factory of a Pyro guide.
    expectation, num_particles: how E_q is taken: "quadrature" (Gauss-Hermite, for up to three
        weights per task), "cubature" (exact for quadratics) or "monte_carlo" (antithetic draws);
        "auto" is the first of these that serves, see docs/choices.md.

    The contract of a subclass is `init`, `loss`, `adapt` and `traits`.

    A whole one stands in docs/extend.md.

    >>> import varmeta as vm
    >>> isinstance(vm.Joint("normal"), Strategy), vm.Joint("normal").describe()
    (True, 'Joint(normal, outer=elbo)')
    """

    guide: GuideName | Guide | Callable[..., Any] = "delta"
    expectation: ExpectationName = field(default="auto", kw_only=True)
    num_particles: int = field(default=2, kw_only=True)

    # not annotated: a constant of the class
    frozen = True  # the noise of the expectation is held fixed while phi is minimised

    @property
    def outer(self) -> Outer:
        """The outer objective; a field where a strategy lets its user choose."""
        return "elbo"

    @abstractmethod
    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        """The state before the first step, for the batch of all tasks."""

    @abstractmethod
    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        """The outer objective (nats, summed over all tasks).

        Its gradient in eta is the meta-gradient.

        Backpropagating the scalar into eta gives that of `sum_i G_i + hyperprior`; for a minibatch,
        its unbiased estimate.
        """

    @abstractmethod
    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        """phi of (new) tasks: the same inner problem as in training, on their support data."""

    @abstractmethod
    def traits(self, problem: Problem) -> Traits:
        """What a fit must know before it takes steps.

        Raises ValueError where the guide does not suit the strategy.
        """

    def problem(self, model: TaskModel, tasks: TaskSet, seed: int) -> Problem:
        return Problem.make(
            model, tasks, self.guide, self.expectation, self.num_particles, self.frozen, seed
        )

    def total(self, problem: Problem, batch: Batch, eta: Eta, losses: Tensor) -> Tensor:
        """The sum over all tasks of losses `(tasks,)` of the batch, and the hyperprior's part."""
        return losses.sum() * (batch.total / len(batch)) + batch.share * problem.model.penalty(eta)

    def describe(self) -> str:
        guide = self.guide if isinstance(self.guide, (str, Guide)) else name_of(self.guide)
        known = isinstance(self.guide, Guide) or self.guide in GUIDE_NAMES
        made = make_guide(self.guide) if known else None
        outer = self.outer if isinstance(self.outer, str) else name_of(self.outer)
        if isinstance(made, Laplace) and outer == "elbo":
            outer = made.evidence_name
        return f"{type(self).__name__}({guide}, outer={outer})"
