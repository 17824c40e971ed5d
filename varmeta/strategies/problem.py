"""One model under one guide, with its rule for expectations and its seed.

It is everything that a strategy needs to make losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, fx

from varmeta.graphs.pieces import Graphed, at
from varmeta.guides.guide import Guide
from varmeta.guides.make import make_guide
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.models.model import TaskModel
from varmeta.numerics.adjoint import losses_and_gradient
from varmeta.numerics.minimize import Minimizer, minimize
from varmeta.numerics.solution import Solution
from varmeta.numerics.steps import Pace
from varmeta.numerics.tree import Tree, detach
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.expectation import (
    Expectation,
    ExpectationName,
    MonteCarlo,
    Point,
    make_expectation,
)
from varmeta.strategies.inner_rates import inner_rates
from varmeta.strategies.objective import Objective, Outer
from varmeta.tasks import Batch, Data, TaskSet
from varmeta.tasks.tensors import batch_of, tensors_of

Losses = Callable[[Tree, Mapping[str, Tensor]], Tensor]

# E_q p(query | theta) is no low-order polynomial of theta, so cubature does not serve it; draws do.
PREDICTIVE_PARTICLES = 64


@dataclass(frozen=True)
class Problem:
    """The inner problem F_i(phi, eta) and the outer objectives of a model.

    Their noise is fixed by (seed, step, task).
    """

    model: TaskModel
    guide: Guide
    expectation: Expectation
    seed: int
    # whether the losses are to be run as compiled graphs, piece by piece (graphs/pieces.py)
    graphed: bool = False

    @classmethod
    def make(
        cls,
        model: TaskModel,
        tasks: TaskSet,
        guide: object,
        expectation: ExpectationName | Expectation,
        num_particles: int,
        frozen: bool,
        seed: int,
    ) -> Problem:
        """frozen: see `make_expectation`."""
        made = make_guide(guide).bound(model)  # type: ignore[arg-type]
        problem = cls(model, made, Point(), int(seed))
        if problem.is_point(tasks):
            return problem
        linear = model.looks_linear(tasks)
        quadratic = model.is_linear_gaussian and model.predictive is model
        known = quadratic, model.is_linear
        size = model.weights.size
        rule = make_expectation(expectation, size, num_particles, linear, frozen, *known)
        return cls(model, made, rule, int(seed))

    @property
    def objective(self) -> Objective:
        return Objective(self.model, self.guide, self.weights)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of the points of the expectation, where they are not equal."""
        weights = getattr(self.expectation, "weights", None)
        return None if weights is None else weights(self.model.weights.size)

    @property
    def deterministic(self) -> bool:
        return self.expectation.deterministic

    def ahead(self, batch: Batch, eta: Mapping[str, Tensor]) -> Problem:
        """The same problem, what the batch's losses at this eta have in common worked out once.

        That is the layers that come before all weights that vary, see `TaskModel.ahead`.  Where the
        problem is `graphed` they are constants: its losses are to be differentiated in phi alone.
        """
        if self.model.ahead(eta, []) is self.model:
            return self  # nothing is looked at
        data = [part for part in (batch.support, batch.query) if part is not None]
        rows = [part.filled[0] for part in data if part.width]
        return self._of(self.model.ahead(eta, rows))

    def _of(self, model: TaskModel) -> Problem:
        if model is self.model:
            return self
        return replace(self, model=model, guide=self.guide.bound(model))

    def losses(self, name: Outer | Literal["inner"], batch: Batch, step: int) -> Losses:
        """`fn(phi, eta) -> (tasks,)` for that objective, on this batch and with this step's noise.

        name: one of the four, or a function of the user's own; "inner" is what phi minimises: F_i,
            as "elbo", unless the guide is Laplace's.
        """
        function = self.objective.outer(name)
        noise = self.noise(name, batch, step)
        if not self.graphed:
            return lambda phi, eta: function(phi, eta, batch, noise)
        total, x = batch.total, batch.support.filled[0]
        features = self.model.features(None, x)
        # kept with the graphs, it must not keep these data's features
        plain = self if features is None else self._of(self.model.ahead({}, []))
        graphs = self.model.graphs.setdefault(
            (name, self.guide.key, self.model.prior, total, self.weights, features is None), {}
        )

        def losses(known: Any, phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
            here = batch_of(known[0], total)
            rows = [here.support.filled[0]] if known[2] else []
            ahead = plain.model.ahead(eta, rows, known=known[2]) if rows else plain.model
            return plain._of(ahead).objective.outer(name)(phi, eta, here, known[1])

        known = () if features is None else tuple(value.detach() for value in features)
        return Graphed(losses, (tensors_of(batch), noise, known), graphs)

    def gradient_graph(
        self, name: Literal["inner", "elbo"], batch: Batch, eta: Mapping[str, Tensor]
    ) -> fx.GraphModule:
        """The traced graph of those losses and their gradient in phi, to judge by what they cost.

        It is kept with the model.

        Raises CaptureError where they cannot be traced.
        """
        known = detach(dict(eta))
        losses = replace(self, graphed=True).losses(name, batch, 0)
        assert isinstance(losses, Graphed)
        return losses.traced(losses_and_gradient, detach(self.start(batch, known)), known)

    def noise(self, name: Outer | Literal["inner"], batch: Batch, step: int) -> Tensor:
        """The standardised points at which that objective takes its expectation.

        `(points, tasks or 1, D)`.
        """
        rule = self.expectation
        if name == "query_predictive" and not isinstance(rule, Point):
            if self.deterministic:
                # the same draws at every step: quasi-Newton steps and line searches need one
                # function
                step = 0
            known = rule.num_particles if isinstance(rule, MonteCarlo) else 0
            rule = MonteCarlo(max(PREDICTIVE_PARTICLES, known))
        return rule.points(self.model.weights.size, batch.support.like, batch.ids, self.seed, step)

    def scaled_losses(self, data: Data, share: Tensor) -> Losses:
        """F_i under a delta guide, its likelihood counted `share` `(tasks,)` times.

        The likelihood is that of `data`, a minibatch of each task.
        """
        noise = data.like.new_zeros(1, 1, self.model.weights.size)

        def fn(phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
            divergence, nll = self.objective.terms(phi, eta, data, noise)
            return divergence + share * nll.mean(0)

        return fn

    def is_point(self, tasks: TaskSet | Batch, eta: Mapping[str, Tensor] | None = None) -> bool:
        """Whether q is a point, also where a user's own guide puts a Delta on theta.

        Its elbo is then no bound.  eta: None: where the model starts.
        """
        if self.guide.is_point is not None:
            return self.guide.is_point
        batch = tasks
        if isinstance(batch, TaskSet):
            # a user's guide shows only with several tasks whether it keeps them apart
            batch = batch.batch() if isinstance(self.guide, PyroGuide) else batch[:1].batch()
        eta = self.model.init(batch.support.like) if eta is None else eta
        phi = self.start(batch, eta)
        return isinstance(self.guide.distribution(phi, eta, batch.support), dist.Delta)

    def units(self, batch: Batch, phi: Tree, eta: Mapping[str, Tensor]) -> Tree | None:
        """The size of a usual change of each entry of phi.

        It is the prior's sd of a location, 1 of the rest.

        In them F's Hessian is 1 but for as many directions as a task has rows.  None where these
        are more than half the weights, so that the data, not the prior, say how large changes are;
        where all would be one number; and of a user's own guide, of which nothing is known.
        """
        one = self.model.prior.uniform and phi.keys() == {"loc"}
        many = 2 * batch.support.widest > self.model.weights.size
        if one or many or not self.has_location(phi):
            return None
        with validation_enabled(False):
            sd = self.model.prior_distribution(eta).stddev.detach()
        # a wider range would leave rounding to say what happens along the smallest
        sd = sd.clamp(min=sd.max() * torch.finfo(sd.dtype).eps ** 0.25)
        return {
            name: sd.expand_as(x) if name == "loc" else torch.ones_like(x)
            for name, x in phi.items()
        }

    def has_location(self, phi: Tree) -> bool:
        """Whether phi["loc"] is q's mean, `(tasks, D)`, as in all guides but a Pyro guide's."""
        size = self.model.weights.size
        return (
            not isinstance(self.guide, PyroGuide)
            and "loc" in phi
            and phi["loc"].shape[1:] == (size,)
        )

    def pace(
        self, batch: Batch, minimizer: Minimizer, eta: Mapping[str, Tensor], phi: Tree
    ) -> Pace:
        """How long the steps of a rule are: 1 / a task's support points of one that is `per_point`.

        Of one whose weights have rates of their own those too, differentiable in eta.
        """
        points = batch.support.num_points.clamp(min=1).to(batch.support.like)
        return Pace(
            points.reciprocal() if minimizer.per_point else None,
            inner_rates(self.model.weights, minimizer, eta, phi),
        )

    def start(self, batch: Batch, eta: Mapping[str, Tensor]) -> Tree:
        """phi at the prior, differentiable in eta."""
        with validation_enabled(False):  # a line search may ask for a point without a finite scale
            return self.guide.init(self.model, eta, batch.support)

    def minimize(
        self,
        batch: Batch,
        eta: Mapping[str, Tensor],
        minimizer: Minimizer,
        *,
        start: Tree | None = None,
        step: int = 0,
        steps: int | None = None,
        tolerance: float | None = None,
    ) -> Solution:
        """phi where F_i is least, without a graph to eta.

        start: where phi starts; None: at the prior.  step: the outer step, whose noise is taken.
        steps, tolerance: as in `numerics.minimize.minimize`.
        """
        known = detach(dict(eta))
        phi = detach(self.start(batch, known)) if start is None else start
        return minimize(
            at(self.losses("inner", batch, step), known),
            phi,
            minimizer,
            steps=steps,
            tolerance=tolerance,
            units=self.units(batch, phi, known),
            **self.pace(batch, minimizer, known, phi)._asdict(),
        )
