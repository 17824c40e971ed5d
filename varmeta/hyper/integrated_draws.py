"""Posteriors of tasks with eta integrated out: for each draw of eta, the task's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.hyper.conditional import CELLS, Conditionals, conditionals, log_joint
from varmeta.models.ensemble import Ensemble
from varmeta.models.hyper_posterior import HyperPosterior
from varmeta.models.model import TaskModel
from varmeta.numerics import noise
from varmeta.numerics.rows import rowwise
from varmeta.numerics.triangular import root_of_covariance
from varmeta.posteriors.draws import DRAWS, Draws
from varmeta.posteriors.normal_mixture import Components
from varmeta.tasks import Batch

# Candidates for each draw of theta; the likelihood decides among them.
CANDIDATES = 16


class IntegratedDraws(Draws):
    """p(theta_i | y), the average of p(theta_i | y_i, eta) over draws of eta.

    eta is drawn from p(eta | y of the training tasks).

    Draws come from these, not from the guide: from the Gaussian of the curvature at each mode,
    chosen among several by the likelihood where the model is not linear-Gaussian.  `distribution`
    is the Gaussian with the mixture's mean and covariance.
    New tasks do not change what is known about eta: fit them together for that.
    """

    def __init__(
        self,
        model: TaskModel,
        guide_name: str,
        hyper: HyperPosterior | Ensemble,
        eta: Mapping[str, Tensor],
        batch: Batch,
        parts: Conditionals | None = None,
    ) -> None:
        super().__init__(model, guide_name, batch, eta)
        self.hyper = hyper
        # a row that was resampled several times is worked out once
        self._rows, self._row_of = hyper.rows.unique(return_inverse=True)
        self._gaussian = model.is_linear_gaussian
        if parts is None:
            points = {name: value[self._rows] for name, value in hyper.points.items()}
            parts = conditionals(model, batch, points, self._gaussian)
        found = parts.factor.isfinite() & parts.mean.isfinite().unsqueeze(-1)
        whole = found.all(-1).all(-1).all(0).tolist()
        lost = [name for name, yes in zip(batch.names, whole, strict=True) if not yes]
        if lost:
            more = f" (and of {len(lost) - 1} more)" if len(lost) > 1 else ""
            raise ValueError(
                f"the posterior of task {lost[0]!r}{more} cannot be computed: its loss or a "
                "derivative of it is not finite at the mode.  Look at its data, or standardise them"
            )
        self._parts = parts

    def take(self, at: Tensor, batch: Batch) -> IntegratedDraws:
        parts = Conditionals(
            *(getattr(self._parts, name)[:, at] for name in self._parts.__dataclass_fields__)
        )
        return IntegratedDraws(self.model, self.guide_name, self.hyper, self.eta, batch, parts)

    @property
    def kind(self) -> str:
        return "integrated"

    @property
    def converged(self) -> Tensor:
        """Whether every mode of a task was found, `(tasks,)`."""
        return self._parts.converged.all(0)

    @property
    def distribution(self) -> dist.TorchDistribution:
        share = torch.bincount(self._row_of, minlength=len(self._parts.mean)).to(self._parts.mean)
        share = (share / share.sum())[:, None, None]
        means = self._moved(
            self._parts.mean, {name: value[self._rows] for name, value in self.hyper.points.items()}
        )
        mean = (share * means).sum(0)
        offset = means - mean
        spread = self._parts.covariance + offset.unsqueeze(-1) * offset.unsqueeze(-2)
        covariance = (share[..., None] * spread).sum(0)
        factor = root_of_covariance(covariance).unsqueeze(-3)
        return dist.MultivariateNormal(mean.unsqueeze(-2), scale_tril=factor, validate_args=False)

    def components(self) -> Components | None:
        if not self._gaussian or self.model.predictive is not self.model:
            return None
        eta = {name: value[self._rows] for name, value in self.hyper.points.items()}
        share = torch.bincount(self._row_of, minlength=len(self._parts.mean)).to(self._parts.mean)
        loc = self._moved(self._parts.mean, eta)
        draws = None if isinstance(self.hyper, Ensemble) else len(self.hyper)
        return Components(share / share.sum(), eta, loc, self._parts.factor, draws)

    def etas(self, num_samples: int) -> dict[str, Tensor]:
        at = self._at(num_samples)
        return {name: value[at.to(value.device)] for name, value in self.hyper.draws.items()}

    def centres(self, num_samples: int) -> Tensor:
        eta = self.etas(num_samples)
        theta0 = self.model.weights.flatten(eta)
        theta0 = theta0.expand(num_samples, -1)  # one row where learn_loc holds all of it
        return self._moved(theta0.unsqueeze(1), eta)

    def theta(self, num_samples: int, seed: int) -> Tensor:
        num_samples = whole_number("num_samples", num_samples)
        at = self._at(num_samples).to(self._row_of.device)
        row = self._row_of[at]
        mode, factor = self._parts.mode[row].unsqueeze(1), self._parts.factor[row].unsqueeze(1)
        several = 1 if self._gaussian else CANDIDATES
        tasks, size = mode.shape[2:]
        z = noise.normal(seed, DRAWS, self.batch.ids, num_samples * several, size, mode.dtype).to(
            mode.device
        )
        z = z.reshape(num_samples, several, tasks, size)
        theta = mode + (factor @ z.unsqueeze(-1)).squeeze(-1)
        if several > 1:
            theta = self._chosen(theta, z, self.etas(num_samples), seed)
        return self._moved(
            theta.reshape(num_samples, tasks, size), self.etas(num_samples)
        ).unsqueeze(-2)

    def with_eta(self, theta: Tensor, size: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        eta = self.etas(len(theta))
        for k in range(len(theta)):
            yield {name: value[k] for name, value in eta.items()}, theta[k : k + 1]

    # -- inside ------------------------------------------------------------------------------------

    def _at(self, num_samples: int) -> Tensor:
        return torch.arange(num_samples) * len(self.hyper) // num_samples

    def _moved(self, theta: Tensor, eta: dict[str, Tensor]) -> Tensor:
        """theta `(K, tasks or 1, D)` with what the tasks' features add to it under each of K
        eta.
        """
        if not self.model.coefficients:
            return theta

        def one(theta: Tensor, eta: dict[str, Tensor]) -> Tensor:
            return self.model.moved(theta.unsqueeze(-2), eta, self.batch.support).squeeze(-2)

        return torch.func.vmap(one)(theta, eta)

    @torch.no_grad()
    def _chosen(self, theta: Tensor, z: Tensor, eta: dict[str, Tensor], seed: int) -> Tensor:
        """One candidate per draw and task, with probability proportional to p(theta, y | eta) over
        the Gaussian's density.
        """
        model, data = self.model, self.batch.support
        number, several, tasks = theta.shape[:3]
        fn = rowwise(lambda t, e: log_joint(model, t, e, data))
        step = max(1, CELLS // max(1, data.cells * several))
        log_p = torch.cat(
            [
                fn(theta[k : k + step], {name: value[k : k + step] for name, value in eta.items()})
                for k in range(0, number, step)
            ]
        )
        log_weight = log_p + 0.5 * z.square().sum(-1)
        uniform = noise.uniform(seed, DRAWS, self.batch.ids, number * several, 1, theta.dtype).to(
            theta.device
        )
        gumbel = -(-uniform.reshape(number, several, tasks).log()).log()
        best = (log_weight + gumbel).argmax(1)[:, None, :, None].expand(-1, 1, -1, theta.shape[-1])
        return theta.gather(1, best).squeeze(1)
