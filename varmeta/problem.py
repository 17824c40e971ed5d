"""One model under one guide, with its rule for expectations and its seed: everything a strategy needs to make losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor

from varmeta.bayes.expectation import Expectation, MonteCarlo, Point, make_expectation
from varmeta.bayes.guide import Delta, Guide, make_guide
from varmeta.bayes.model import TaskModel
from varmeta.bayes.objective import Objective
from varmeta.numerics.tree import Tree
from varmeta.tasks import Batch, Data

Losses = Callable[[Tree, Mapping[str, Tensor]], Tensor]

# E_q p(query | theta) is no low-order polynomial of theta, so cubature does not serve it; draws do.
PREDICTIVE_PARTICLES = 64


@dataclass(frozen=True)
class Problem:
    """The inner problem F_i(phi, eta) and the outer objectives of a model, with noise fixed by (seed, step, task)."""

    model: TaskModel
    guide: Guide
    expectation: Expectation
    seed: int

    @classmethod
    def make(cls, model: TaskModel, guide: object, expectation: object, num_particles: int, seed: int) -> Problem:
        made = make_guide(guide)  # type: ignore[arg-type]
        size = model.weights.size
        rule = Point() if isinstance(made, Delta) else make_expectation(expectation, size, num_particles)  # type: ignore[arg-type]
        return cls(model, made, rule, int(seed))

    @property
    def objective(self) -> Objective:
        return Objective(self.model, self.guide)

    @property
    def deterministic(self) -> bool:
        return self.expectation.deterministic

    def losses(self, name: str, batch: Batch, step: int) -> Losses:
        """`fn(phi, eta) -> (tasks,)` for the objective of that name, on this batch and with this step's noise."""
        function = self.objective.outer(name)
        rule = self.expectation
        if name == "query_predictive" and not isinstance(rule, Point) and self.deterministic:
            # the same draws at every step: quasi-Newton steps and line searches need one function
            rule, step = MonteCarlo(PREDICTIVE_PARTICLES), 0
        noise = rule.points(self.model.weights.size, batch.support.x.new_zeros(()), batch.ids, self.seed, step)
        return lambda phi, eta: function(phi, eta, batch, noise)

    def scaled_losses(self, data: Data, share: Tensor) -> Losses:
        """F_i under a delta guide, the likelihood of `data` (a minibatch of each task) counted `share` `(tasks,)` times."""
        noise = data.x.new_zeros(1, 1, self.model.weights.size)

        def fn(phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
            divergence, nll = self.objective.terms(phi, eta, data, noise)
            return divergence + share * nll.mean(0)

        return fn

    def is_point(self, batch: Batch, eta: Mapping[str, Tensor]) -> bool:
        """Whether q is a point, also where a user's own guide puts a Delta on theta: its elbo is then no bound."""
        phi = self.start(batch, eta)
        return isinstance(self.guide.distribution(phi, eta, batch.support), dist.Delta)

    def start(self, batch: Batch, eta: Mapping[str, Tensor]) -> Tree:
        """phi at the prior, differentiable in eta."""
        return self.guide.init(self.model, eta, batch.support)
