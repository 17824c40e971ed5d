"""The posterior of eta: draws, a readable table, and how far the Gaussian was from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from varmeta._checks import probability
from varmeta.models.labels import parameter_labels
from varmeta.models.model import TaskModel

if TYPE_CHECKING:
    import pandas as pd

Hyperguide = Literal["delta", "normal", "multivariate_normal", "reml"]
HYPERGUIDES: tuple[Hyperguide, ...] = get_args(Hyperguide)
# Fewer effective draws than this make no posterior.
MIN_ESS = 100.0


@dataclass(frozen=True, repr=False)
class HyperPosterior:
    """p(eta | y): theta0, shared parameters, precisions and scales.

    hyperguide: the family of Gaussians.
    points, log_weights: weighted draws of eta, by name `(N, ...)`, on the scales on which it is
        learned, and `(N,)`.
    rows: which of them were resampled as `draws` of equal weight, `(S,)`.
    mean, factor: the fitted Gaussian in the coordinates of `varmeta.hyper.coordinates`, `(size,)`
        and `(size, size)`.
    pareto_k: k-hat of the Gaussian's importance weights: below 0.5 it is near the posterior, above
        0.7 it is not.
    final_k, ess: k-hat and effective number of the weighted draws.
    log_evidence, evidence_error: log p(y), nats, with eta integrated out, and its standard error;
        proper only where every hyperprior is.
    """

    hyperguide: Hyperguide
    points: dict[str, Tensor]
    log_weights: Tensor
    rows: Tensor
    mean: Tensor
    factor: Tensor
    pareto_k: float
    final_k: float
    ess: float
    log_evidence: float
    evidence_error: float

    def __len__(self) -> int:
        """The number of draws of equal weight."""
        return len(self.rows)

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws of eta, `(S, ...)`."""
        return {name: value[self.rows] for name, value in self.points.items()}

    @property
    def is_reliable(self) -> bool:
        """Whether enough draws carry weight."""
        return self.ess >= MIN_ESS

    def frame(
        self, model: TaskModel, x_names: tuple[str, ...] | None = None, level: float = 0.9
    ) -> pd.DataFrame:
        """Mean, sd, median and central interval of each quantity of `natural`.

        From the weighted draws; of the interval its ends.
        """
        import pandas as pd

        level = probability("level", level)
        named = natural(model, self.points, x_names)
        values, weight = torch.stack(list(named.values()), -1), self.log_weights.exp()[:, None]
        mean = (weight * values).sum(0)
        sd = (weight * (values - mean).square()).sum(0).sqrt()
        ordered, order = values.sort(0)
        share = weight.expand_as(values).gather(0, order).cumsum(0)
        quantiles = [
            ordered.gather(
                0, (share < q * share[-1]).sum(0, keepdim=True).clamp(max=len(values) - 1)
            ).squeeze(0)
            for q in ((1 - level) / 2, 0.5, (1 + level) / 2)
        ]
        columns = dict(
            zip(("mean", "sd", "low", "median", "high"), (mean, sd, *quantiles), strict=True)
        )
        return pd.DataFrame(
            {name: value.tolist() for name, value in columns.items()}, index=list(named)
        )

    def __repr__(self) -> str:
        return (
            f"<HyperPosterior: {len(self)} draws, {self.hyperguide}, k-hat {self.pareto_k:.2f}, "
            f"{self.ess:.0f} effective>"
        )


def natural(
    model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """What eta, with a leading axis S, says in readable units and names, `(S,)` each.

    theta0 as its weight is called, shared parameters, coefficients of covariates, `sd(...)`,
    `cor(..., ...)`, and what the likelihood learned (`noise scale`).
    """
    labels = parameter_labels(model, x_names)
    names = [label for name in model.weights.names for label in labels[name]]

    def moments(one: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        prior = model.prior_distribution(one)
        covariance = (
            prior.covariance_matrix
            if model.prior.dense or model.prior.correlates
            else torch.diag(prior.variance)
        )
        return model.weights.flatten(one), covariance

    with torch.no_grad():
        loc, covariance = torch.func.vmap(moments)(dict(eta))
    found = dict(zip(names, loc.unbind(-1), strict=True))
    for name in (*model.shared, *model.coefficients):
        found |= dict(
            zip(labels[name], eta[name].reshape(len(eta[name]), -1).unbind(-1), strict=True)
        )
    if model.prior.learn_precision is not None:
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        found |= {
            f"sd({label})": column for label, column in zip(names, sd.unbind(-1), strict=True)
        }
        if model.prior.correlates:
            for i in range(len(names)):
                # weights of other blocks have none
                for j in [j for j in range(i) if bool(covariance[:, i, j].any())]:
                    found[f"cor({names[j]}, {names[i]})"] = covariance[:, i, j] / (
                        sd[:, i] * sd[:, j]
                    )
    return found | (model.likelihood.learned(eta) if model.likelihood is not None else {})
