"""Posteriors of a batch of tasks' weights, and draws from them, each with its eta."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.guides.kl import has_closed_form, location, move, moved_by, scale
from varmeta.guides.make import MAX_KNOWN_SIZE
from varmeta.models.model import TaskModel
from varmeta.numerics import noise
from varmeta.numerics.tree import Tree, take
from varmeta.posteriors.normal_mixture import Components
from varmeta.priors.structured_normal import StructuredNormal
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch

# Draws are a stream of their own, away from those of training (which counts its steps from 0).
DRAWS = 2**40


class Draws(ABC):
    """q(theta_i) of every task of a batch, with what the tasks' features add.

    eta: what the prior and the shared parameters are; a point, or the mean where eta is integrated
        out.
    guide_name: of the guide that the fit used.
    """

    def __init__(
        self, model: TaskModel, guide_name: str, batch: Batch, eta: Mapping[str, Tensor]
    ) -> None:
        self.model = model
        self.guide_name = guide_name
        self.batch = batch
        self.eta = dict(eta)

    @property
    @abstractmethod
    def distribution(self) -> dist.TorchDistribution:
        """q of every task: batch shape `(tasks, 1)`, event shape `(D,)`."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """ "delta", "gaussian" or "integrated"."""

    @abstractmethod
    def theta(self, num_samples: int, seed: int) -> Tensor:
        """Draws of the weights `(num_samples, tasks, 1, D)`.

        A task's do not depend on the others.
        """

    @abstractmethod
    def centres(self, num_samples: int) -> Tensor:
        """The prior's location for each of as many draws, `(num_samples or 1, tasks or 1, D)`."""

    @abstractmethod
    def etas(self, num_samples: int) -> dict[str, Tensor]:
        """The eta behind each of as many draws, `(num_samples, ...)`.

        Empty where eta is a point.
        """

    @abstractmethod
    def with_eta(self, theta: Tensor, size: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Draws `(num_samples, tasks, 1, D)` with the eta that they belong to.

        At most `size` at a time.
        """

    @abstractmethod
    def components(self) -> Components | None:
        """The posteriors as mixtures of Gaussians over eta, for normal predictions.

        None where the model is not known to be linear and Gaussian, or predicts by another density.
        """

    @abstractmethod
    def take(self, at: Tensor, batch: Batch) -> Draws:
        """The same for the tasks at these positions, whose data are `batch`."""

    @property
    def is_point(self) -> bool:
        return self.kind == "delta"

    def offset(self, eta: Mapping[str, Tensor]) -> Tensor | None:
        """What the tasks' features add to their weights under eta, `(tasks, 1, D)`.

        None where they add nothing.
        """
        by = self.model.offset(eta, self.batch.support)
        return None if by is None else by.unsqueeze(-2)

    @property
    def prior(self) -> dist.TorchDistribution:
        """p(theta_i | eta), event shape `(D,)`.

        Its batch shape is `(tasks, 1)` where the tasks' features move it, else `()`.
        """
        return moved_by(self.model.prior_distribution(self.eta), self.offset(self.eta))


class GuideDraws(Draws):
    """q(theta; phi_i) of the guide, under one eta."""

    def __init__(
        self, problem: Problem, phi: Tree, eta: Mapping[str, Tensor], batch: Batch
    ) -> None:
        super().__init__(problem.model, problem.guide.name, batch, eta)
        self.guide = problem.guide
        self.problem = problem
        self.phi = phi

    @property
    def distribution(self) -> dist.TorchDistribution:
        with torch.no_grad():
            q = self.guide.distribution(self.phi, self.eta, self.batch.support)
            return moved_by(q, self.offset(self.eta))

    @cached_property
    def kind(self) -> str:
        return "delta" if isinstance(self.distribution, dist.Delta) else "gaussian"

    def theta(self, num_samples: int, seed: int) -> Tensor:
        num_samples = whole_number("num_samples", num_samples)
        q, zero = self.distribution, self.batch.support.like
        size = self.model.weights.size
        if isinstance(q, dist.Delta):
            standard = zero.expand(num_samples, 1, size)
        else:
            standard = noise.normal(seed, DRAWS, self.batch.ids, num_samples, size, zero.dtype).to(
                zero.device
            )
        with torch.no_grad():
            return move(q, standard.unsqueeze(-2))

    def centres(self, num_samples: int) -> Tensor:
        return location(self.prior).reshape(1, -1, self.model.weights.size)

    def etas(self, num_samples: int) -> dict[str, Tensor]:
        return {}

    def with_eta(self, theta: Tensor, size: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        yield from ((self.eta, part) for part in theta.split(size))

    def components(self) -> Components | None:
        q = self.distribution
        if not (self.model.is_linear_gaussian and has_closed_form(q)):
            return None
        if self.model.predictive is not self.model:
            return None  # what is new is not normal
        if isinstance(q, StructuredNormal) and self.model.weights.size > MAX_KNOWN_SIZE:
            return None  # its square root is held in parts; whole, it may not fit
        loc, root = location(q).squeeze(-2), scale(q)
        if root is not None:  # (tasks, 1, D) or (tasks, 1, D, D)
            root = root.squeeze(1).expand(*loc.shape, *root.shape[3:]).unsqueeze(0)
        eta = {name: value.detach().unsqueeze(0) for name, value in self.eta.items()}
        return Components(loc.new_ones(1), eta, loc.unsqueeze(0), root)

    def take(self, at: Tensor, batch: Batch) -> GuideDraws:
        return GuideDraws(self.problem, take(self.phi, at), self.eta, batch)

    def objective(self) -> Tensor:
        """-F_i of every task, nats, `(tasks,)`: what the guide's objective says of the evidence."""
        with torch.no_grad():
            return -self.problem.losses("elbo", self.batch, 0)(self.phi, self.eta)
