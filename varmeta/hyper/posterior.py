"""Posteriors of tasks with eta integrated out: for each draw of eta the task's own posterior under it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._numbers import whole_number
from varmeta.hyper.conditional import CELLS, Conditionals, conditionals, log_joint
from varmeta.hyper.result import HyperPosterior
from varmeta.hyper.rows import rowwise
from varmeta.numerics import noise
from varmeta.posterior import DRAWS, Posterior
from varmeta.problem import Problem
from varmeta.tasks import Data, TaskSet

if TYPE_CHECKING:
    import pandas as pd

# Candidates for each draw of theta; the likelihood decides among them.
CANDIDATES = 16


class IntegratedPosterior(Posterior):
    """p(theta_i | y), the average of p(theta_i | y_i, eta) over draws of p(eta | y of the training tasks).

    Draws come from these, not from the guide: from the Gaussian of the curvature at each mode, chosen among several by the
    likelihood where the model is not linear-Gaussian.  `distribution` is the Gaussian with the mixture's mean and covariance.
    New tasks do not change what is known about eta: fit them together for that.
    """

    def __init__(
        self, problem: Problem, hyper: HyperPosterior, eta: Mapping[str, Tensor], tasks: TaskSet, trained: TaskSet
    ) -> None:
        super().__init__(problem, {}, eta, tasks, trained)
        self.hyper = hyper
        # a row that was resampled several times is worked out once
        self._rows, self._row_of = hyper.rows.unique(return_inverse=True)
        self._gaussian = problem.model.is_linear_gaussian
        self._parts = conditionals(
            problem.model,
            self._batch,
            {name: value[self._rows] for name, value in hyper.points.items()},
            self._gaussian,
        )

    def take(self, names: Sequence[str]) -> Posterior:
        at = self.positions(names)
        new = IntegratedPosterior.__new__(IntegratedPosterior)
        Posterior.__init__(new, self.problem, {}, self.eta, self.tasks[at], self.trained)
        new.hyper, new._rows, new._row_of, new._gaussian = self.hyper, self._rows, self._row_of, self._gaussian
        parts = self._parts
        new._parts = Conditionals(*(getattr(parts, name)[:, at] for name in parts.__dataclass_fields__))
        return new

    @property
    def converged(self) -> Tensor:
        """Whether every mode of a task was found, `(tasks,)`."""
        return self._parts.converged.all(0)

    @property
    def distribution(self) -> dist.TorchDistribution:
        share = torch.bincount(self._row_of, minlength=len(self._parts.mean)).to(self._parts.mean)
        share = (share / share.sum())[:, None, None]
        means = self._moved(self._parts.mean, {name: value[self._rows] for name, value in self.hyper.points.items()})
        mean = (share * means).sum(0)
        offset = means - mean
        spread = self._parts.covariance + offset.unsqueeze(-1) * offset.unsqueeze(-2)
        covariance = (share[..., None] * spread).sum(0)
        return dist.MultivariateNormal(mean.unsqueeze(-2), covariance.unsqueeze(-3), validate_args=False)

    @property
    def is_point(self) -> bool:
        return False

    def evidence(self, num_samples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Refused: there is no guide of one eta whose evidence could be told."""
        raise ValueError(
            "this posterior integrates over eta: fit.hyper tells how good that is; evidence and diagnose look at the guides of "
            "a fit with hyperguide='delta'"
        )

    diagnose = evidence

    def normal_predictive(self, data: Data) -> tuple[Tensor, Tensor] | None:
        """None: a mixture over eta is not normal."""
        return None

    def eta_draws(self, num_samples: int) -> dict[str, Tensor]:
        """The eta behind each of as many draws, `(num_samples, ...)`."""
        at = self._at(num_samples)
        return {name: value[at.to(value.device)] for name, value in self.hyper.draws.items()}

    def centres(self, num_samples: int) -> Tensor:
        eta = self.eta_draws(num_samples)
        theta0 = self.model.weights.flatten(eta)
        theta0 = theta0.expand(num_samples, -1)  # one row where learn_loc holds all of it
        return self._moved(theta0.unsqueeze(1), eta)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _at(self, num_samples: int) -> Tensor:
        return torch.arange(num_samples) * len(self.hyper) // num_samples

    def _theta(self, num_samples: int, seed: int) -> Tensor:
        num_samples = whole_number("num_samples", num_samples)
        at = self._at(num_samples).to(self._row_of.device)
        row = self._row_of[at]
        mode, factor = self._parts.mode[row].unsqueeze(1), self._parts.factor[row].unsqueeze(1)
        several = 1 if self._gaussian else CANDIDATES
        tasks, size = mode.shape[2:]
        z = noise.normal(seed, DRAWS, self._batch.ids, num_samples * several, size, mode.dtype).to(mode.device)
        z = z.reshape(num_samples, several, tasks, size)
        theta = mode + (factor @ z.unsqueeze(-1)).squeeze(-1)
        if several > 1:
            theta = self._chosen(theta, z, self.eta_draws(num_samples), seed)
        return self._moved(theta.reshape(num_samples, tasks, size), self.eta_draws(num_samples)).unsqueeze(-2)

    def _moved(self, theta: Tensor, eta: dict[str, Tensor]) -> Tensor:
        """theta `(K, tasks or 1, D)` with what the tasks' features add to it under each of K eta."""
        if not self.model.coefficients:
            return theta

        def one(theta: Tensor, eta: dict[str, Tensor]) -> Tensor:
            return self.model.moved(theta.unsqueeze(-2), eta, self._batch.support).squeeze(-2)

        return torch.func.vmap(one)(theta, eta)

    @torch.no_grad()
    def _chosen(self, theta: Tensor, z: Tensor, eta: dict[str, Tensor], seed: int) -> Tensor:
        """One candidate per draw and task, with probability proportional to p(theta, y | eta) over the Gaussian's density."""
        model, data = self.model, self._batch.support
        number, several, tasks = theta.shape[:3]
        fn = rowwise(lambda t, e: log_joint(model, t, e, data))
        step = max(1, CELLS // max(1, data.mask.numel() * several))
        log_p = torch.cat(
            [
                fn(theta[k : k + step], {name: value[k : k + step] for name, value in eta.items()})
                for k in range(0, number, step)
            ]
        )
        log_weight = log_p + 0.5 * z.square().sum(-1)
        uniform = noise.uniform(seed, DRAWS, self._batch.ids, number * several, 1, theta.dtype).to(theta.device)
        gumbel = -(-uniform.reshape(number, several, tasks).log()).log()
        best = (log_weight + gumbel).argmax(1)[:, None, :, None].expand(-1, 1, -1, theta.shape[-1])
        return theta.gather(1, best).squeeze(1)

    def _with_eta(self, theta: Tensor, size: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        eta = self.eta_draws(len(theta))
        for k in range(len(theta)):
            yield {name: value[k] for name, value in eta.items()}, theta[k : k + 1]
