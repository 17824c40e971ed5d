"""Curves of tasks over a grid: where the mean runs, and bands around it that do not jitter."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.posteriors.observations import mean_of
from varmeta.posteriors.posterior import Posterior
from varmeta.posteriors.prediction import Prediction

# Points of the noise's distribution for each draw of the weights, and for a point, which is one
# draw; fewer show in the bands.
NOISE_POINTS, NOISE_POINTS_OF_ONE = 20, 1000


@dataclass(frozen=True)
class Curves:
    """Values over the points of a grid.

    `mean`: draws of the mean; `band`: draws that the bands are quantiles of.

    of_mean: whether the bands are of the mean too (for classes of two and counts), instead of
        single observations.
    """

    mean: Prediction
    band: Prediction
    of_mean: bool


def curves(posterior: Posterior, grid: Tensor, num_samples: int, seed: int) -> Curves:
    """The curves of a posterior on a grid.

    For continuous observations the bands are of what will be observed; for discrete ones, whose
    quantiles jump, of their mean.

    Raises ValueError where an observation is not a single number.
    """
    discrete = []

    def kind(fn: dist.TorchDistribution) -> Tensor:
        discrete.append(fn.support.is_discrete)  # type: ignore[union-attr]
        return mean_of(fn)

    mean = posterior.observed(grid, kind, num_samples, seed)
    if mean.samples.dim() > 3:
        raise ValueError(
            f"an observation has {tuple(mean.samples.shape[3:])} numbers, but a curve is drawn of "
            "one: plot posterior.expected(x).frame() yourself"
        )
    if all(discrete):
        return Curves(mean, mean, True)
    return Curves(mean, posterior.observed(grid, _spread, num_samples, seed), False)


def _spread(fn: dist.TorchDistribution) -> Tensor:
    """Values that stand for the distribution under each draw of the weights, `(draws *
    NOISE_POINTS, tasks, points)`.
    """
    number = NOISE_POINTS if fn.batch_shape[0] > 1 else NOISE_POINTS_OF_ONE
    if not isinstance(fn, dist.Normal):
        return torch.cat([fn.sample() for _ in range(number)])
    # the middles of equally likely parts: one random number for each point of the grid would make
    # the band jagged
    parts = (torch.arange(number, dtype=fn.loc.dtype, device=fn.loc.device) + 0.5) / number
    values: Tensor = fn.icdf(parts.reshape(-1, *[1] * len(fn.batch_shape)))
    return values.flatten(0, 1)
