"""The posterior of eta: draws of it, a table that a person can read, and how far the Gaussian was from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.bayes.likelihood import SCALE
from varmeta.bayes.model import TaskModel
from varmeta.labels import parameter_labels

if TYPE_CHECKING:
    import pandas as pd

HYPERGUIDES = ("delta", "normal", "multivariate_normal", "reml")
# k-hat above this: the Gaussian is not near enough for its own draws to be corrected.
MAX_K = 0.7
# Fewer effective draws than this make no posterior.
MIN_ESS = 100.0


@dataclass(frozen=True, repr=False)
class HyperPosterior:
    """p(eta | y): theta0, shared parameters, precisions and scales.

    hyperguide: the family of Gaussians.
    draws: of eta, by name, `(S, ...)`, on the scales on which it is learned; `natural` has means, sds and correlations.
    mean, factor: the fitted Gaussian in the coordinates of `varmeta.hyper.coordinates`, `(size,)` and `(size, size)`.
    pareto_k: k-hat of the Gaussian's importance weights: below 0.5 it is near the posterior, above 0.7 it is not.
    final_k, ess: k-hat and effective number of the weighted draws that `draws` were resampled from.
    log_evidence, evidence_error: log p(y), nats, with eta integrated out, and its standard error; proper only where every
        hyperprior is.
    """

    hyperguide: str
    draws: dict[str, Tensor]
    mean: Tensor
    factor: Tensor
    pareto_k: float
    final_k: float
    ess: float
    log_evidence: float
    evidence_error: float

    def __len__(self) -> int:
        """The number of draws."""
        return len(next(iter(self.draws.values())))

    @property
    def is_reliable(self) -> bool:
        """Whether enough draws carry weight."""
        return self.ess >= MIN_ESS

    def natural(self, model: TaskModel, x_names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Draws `(S,)` by readable name: theta0 as its weight is called, shared parameters, `sd(...)`, `cor(..., ...)`, `noise
        scale`."""
        return natural(model, self.draws, x_names)

    def frame(self, model: TaskModel, x_names: tuple[str, ...] | None = None, level: float = 0.9) -> pd.DataFrame:
        """Mean, sd, median and the ends of the central interval of each quantity."""
        import pandas as pd

        named = self.natural(model, x_names)
        values = torch.stack(list(named.values()), -1)
        levels = torch.tensor([(1 - level) / 2, 0.5, (1 + level) / 2]).to(values)
        low, middle, high = values.quantile(levels, 0)
        columns = {"mean": values.mean(0), "sd": values.std(0), "median": middle, "low": low, "high": high}
        return pd.DataFrame({name: value.tolist() for name, value in columns.items()}, index=list(named))

    def __repr__(self) -> str:
        return f"<HyperPosterior: {len(self)} draws, {self.hyperguide}, k-hat {self.pareto_k:.2f}, {self.ess:.0f} effective>"


def natural(model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
    """What eta with a leading axis S says, `(S,)` each: see `HyperPosterior.natural`."""
    labels = parameter_labels(model, x_names)
    names = [label for name in model.weights.names for label in labels[name]]

    def moments(one: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        prior = model.prior_distribution(one)
        covariance = prior.covariance_matrix if model.prior.dense else torch.diag(prior.variance)
        return model.weights.flatten(one), covariance

    with torch.no_grad():
        loc, covariance = torch.func.vmap(moments)(dict(eta))
    found = dict(zip(names, loc.unbind(-1), strict=True))
    for name in model.shared:
        found |= dict(zip(labels[name], eta[name].reshape(len(eta[name]), -1).unbind(-1), strict=True))
    if model.prior.learn_precision is not None:
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        found |= {f"sd({label})": column for label, column in zip(names, sd.unbind(-1), strict=True)}
        if model.prior.learn_precision == "full":
            for i in range(len(names)):
                for j in range(i):
                    found[f"cor({names[j]}, {names[i]})"] = covariance[:, i, j] / (sd[:, i] * sd[:, j])
    if SCALE in eta:
        found["noise scale"] = eta[SCALE].exp()
    return found
