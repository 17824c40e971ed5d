"""Curves of tasks over a grid: where the mean runs, and bands around it that do not jitter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.observations import mean_of
from varmeta.posterior import Posterior
from varmeta.prediction import Prediction

# Points of the noise's distribution for each draw of the weights; fewer show in the bands.
NOISE_POINTS = 20


@dataclass(frozen=True)
class Curves:
    """Over the points of a grid: `mean` draws of the mean, `band` draws that the bands are quantiles of.

    of_mean: whether the bands are of the mean too (for classes of two and counts), instead of single observations.
    """

    mean: Prediction
    band: Prediction
    of_mean: bool


def curves(posterior: Posterior, grid: Tensor, num_samples: int, seed: int) -> Curves:
    """For continuous observations bands of what will be observed; for discrete ones, whose quantiles jump, of their mean.

    Raises ValueError where an observation is not a single number.
    """
    discrete = []

    def kind(site: Any) -> Tensor:
        discrete.append(site["fn"].support.is_discrete)
        return mean_of(site["fn"])

    mean = posterior.observed(grid, kind, num_samples, seed)
    if mean.samples.dim() > 3:
        raise ValueError(
            f"an observation has {tuple(mean.samples.shape[3:])} numbers, but a curve is drawn of one: plot "
            "posterior.expected(x).frame() yourself"
        )
    if all(discrete):
        return Curves(mean, mean, True)
    return Curves(mean, posterior.observed(grid, lambda site: _spread(site["fn"]), num_samples, seed), False)


def _spread(fn: dist.TorchDistribution) -> Tensor:
    """Values that stand for the distribution under each draw of the weights, `(draws * NOISE_POINTS, tasks, points)`."""
    if not isinstance(fn, dist.Normal):
        return fn.sample((NOISE_POINTS,)).flatten(0, 1)
    # the middles of equally likely parts: one random number for each point of the grid would make the band jagged
    parts = (torch.arange(NOISE_POINTS, dtype=fn.loc.dtype, device=fn.loc.device) + 0.5) / NOISE_POINTS
    return fn.icdf(parts.reshape(-1, *[1] * len(fn.batch_shape))).flatten(0, 1)
