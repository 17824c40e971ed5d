"""What every comparison stands beside: one set of weights for all, and each task alone.

Of classes also what the field calls baselines: the nearest neighbour, and two heads on a shared
body that take no inner steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.fitting.pooled_start import is_regression, pooled_fit
from varmeta.guides.delta import Delta
from varmeta.guides.make import default_guide
from varmeta.likelihoods.discrete import Categorical
from varmeta.likelihoods.least_squares import LeastSquaresClasses
from varmeta.models.model import TaskModel
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import detach
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.expectation import Point
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.joint import Joint
from varmeta.strategies.problem import Problem
from varmeta.strategies.prototypes import Prototypes, unsuited
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.tasks import Batch, TaskSet

BASELINES = ("pooled", "no pooling")
NEAREST, PROTOTYPES, HEAD = "nearest neighbour", "prototypes", "closed-form head"
# "No pooling" still needs a proper prior: one that weighs as much as this share of one observation,
# or, for a network, that has this share of the model's own precision.
WEAK = 1e-2


@dataclass(frozen=True)
class Pooled(Strategy):
    """Every task has the weights theta0, fitted to all support data at once; nothing is adapted."""

    def traits(self, problem: Problem) -> Traits:
        return Traits(noisy=not problem.deterministic)

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return State()

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        losses = problem.losses("elbo", batch, state.step)(problem.start(batch, eta), eta)
        return self.total(problem, batch, eta, losses), state, Stats(losses.detach(), 1.0)

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        phi = detach(problem.start(batch, eta))
        return Solution(
            phi, torch.zeros(len(batch), dtype=torch.int64, device=batch.ids.device), {}
        )


def baselines_of(model: TaskModel, train: TaskSet) -> tuple[str, ...]:
    """The baselines of a model's comparison, in the table's order.

    Of classes the nearest neighbour too.  Where the weights that vary are those of the last linear
    layer, and the training tasks have query rows to learn from, also two heads on its body: the
    prototypes and `ClosedForm`'s.
    """
    if model.likelihood is None or not isinstance(model.likelihood.predictive, Categorical):
        return BASELINES
    learned = unsuited(model) is None and not train.query_rows.bare(train.names)
    return (*BASELINES, NEAREST, *((PROTOTYPES, HEAD) if learned else ()))


def baseline(
    name: str, model: TaskModel, train: TaskSet, strategies: Iterable[Strategy]
) -> tuple[TaskModel, Strategy]:
    """The model and strategy of a baseline; the nearest neighbour has none.

    "no pooling" steps and adapts its posteriors as the first `Joint` does.
    """
    alone = copy.copy(model)
    # theta0 is what all tasks have in common here, also where the model holds it at a value of its
    # own
    alone.weights = replace(model.weights, fixed={})
    if name in (PROTOTYPES, HEAD):
        return _head(name, alone, train)
    if model.likelihood is not None:  # all rows are support
        alone.likelihood = model.likelihood.without_query()
    batch = train.batch()
    eta = model.init(batch.support.like)
    precision = WEAK * _precision(model, eta)
    if is_regression(model, train, eta):
        found = pooled_fit(model, batch, eta)
        if found is not None:
            smallest = torch.finfo(precision.dtype).tiny
            precision = WEAK * found[1].diagonal().clamp(min=smallest)
    alone.prior = GaussianPrior(model.weights.unflatten(precision), loc=model.prior.start_loc)
    if name == "pooled":
        return alone, Pooled()
    joints = [strategy for strategy in strategies if isinstance(strategy, Joint)]
    guide = default_guide(model)
    if not joints:
        return alone, Joint(guide)
    return alone, Joint(guide, minimizer=joints[0].minimizer, adapt_steps=joints[0].adapt_steps)


def _head(name: str, alone: TaskModel, train: TaskSet) -> tuple[TaskModel, Strategy]:
    """The same body under a head that is known without a search, learned from the query rows.

    The prior's precision is that of the model's start: prototypes have no use for it, and the
    scale that is learned beside it is enough for the other.
    """
    precision = _precision(alone, alone.init(train.support_rows.x.new_zeros(())))
    start = alone.prior.start_loc
    alone.prior = GaussianPrior(alone.weights.unflatten(precision), loc=start)
    alone.graphs = {}  # those of another likelihood
    alone.__dict__.pop("is_linear_gaussian", None)
    if name == PROTOTYPES:
        return alone, Prototypes()
    assert alone.likelihood is not None and isinstance(alone.likelihood.predictive, Categorical)
    if not isinstance(alone.likelihood, LeastSquaresClasses):
        classes = alone.weights.shapes[alone.weights.names[0]][0]
        ways = alone.likelihood.predictive.ways
        alone.likelihood = LeastSquaresClasses(classes, ways=ways)
    return alone, Implicit("delta", "query", minimizer=ClosedForm())


def _precision(model: TaskModel, eta: Eta) -> Tensor:
    """Of each weight under the prior, `(D,)`."""
    return model.prior.log_precision(model.weights, eta, model.weights.flatten(eta)).exp()


def no_pooling(model: TaskModel, tasks: TaskSet, eta: Eta, seed: int) -> Tensor:
    """Every task fitted on its own, `(tasks, D)`.

    That is its mode under a prior that weighs 1 % of one observation.

    eta: of a fit; shared parameters and the noise scale are taken from it.
    """
    alone, _ = baseline("no pooling", model, tasks, [])
    alone.prior.start_loc = {}
    batch = tasks.batch()
    own = {name: eta[name] for name in alone.init(batch.support.like)}
    problem = Problem(alone, Delta(), Point(), seed)
    inner = elbo_losses(problem, batch, "inner")
    found = minimize(lambda phi: inner(phi, own), detach(problem.start(batch, own)), NewtonCG())
    return model.moved(found.value["loc"].unsqueeze(-2), eta, batch.support).squeeze(-2)
