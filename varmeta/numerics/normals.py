"""Normals and mixtures of them: moments, quantiles, mean distances.

A mixture has weights `share` `(K,)`, which sum to 1, and K normals' means and sds `(K, ...)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varmeta.numerics.triangular import cholesky

# Steps to a quantile, at most; three or four do where the normals are alike.
STEPS = 200
# The last one's size over the smallest sd.  A step leaves the cube of what it goes.
CLOSE = 1e-4
# The least sd of a component, over the mixture's: steps of a staircase are that wide.
NARROWEST = 1e-9
# Numbers that are worked on at once: as many as a processor's cache holds.
CELLS = 50_000
_ROOT_OF_2_PI = math.sqrt(2 * math.pi)


def moments(share: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of mixtures.

    >>> half = torch.tensor([0.5, 0.5])
    >>> moments(half, torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 3.0]))
    (tensor(0.), tensor(2.))
    """
    centre = torch.tensordot(share, mean, 1)
    spread = torch.tensordot(share, variance + (mean - centre).square(), 1)
    return centre, spread.sqrt()


def log_density(mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
    """log N(y; mean, covariance) of vectors `(..., k)`, covariances `(..., k, k)`: `(...)`, nats.

    NaN where a covariance is none.

    >>> log_density(torch.zeros(1), torch.eye(1), torch.zeros(1)).exp()  # 1 / sqrt(2 pi)
    tensor(0.3989)
    """
    root = cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (y - mean).unsqueeze(-1), upper=False)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * y.shape[-1] * math.log(2 * math.pi)
    found: Tensor = -0.5 * white.square().sum((-2, -1)) - log_det - constant
    return found


def quantiles(share: Tensor, mean: Tensor, sd: Tensor, probabilities: tuple[float, ...]) -> Tensor:
    """Of n mixtures, means and sds `(K, n)`: `(len(probabilities), n)`.

    By Halley's steps from the quantile of the normal with the mixture's moments, inside an interval
    that holds the mixture's.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> round(quantiles(one[0], 0 * one, one, (0.975,)).item(), 4)
    1.96
    """
    z = torch.special.ndtri(torch.tensor(probabilities, dtype=torch.float64)).to(mean)
    if len(share) == 1:
        found: Tensor = mean + z[:, None] * sd
        return found
    step = max(1, CELLS // (len(share) * len(z)))
    parts = zip(mean.split(step, 1), sd.split(step, 1), strict=True)
    return torch.cat([_quantiles(share, *part, z) for part in parts], 1)


def _quantiles(share: Tensor, mean: Tensor, sd: Tensor, z: Tensor) -> Tensor:
    """The same of normal quantiles z `(J,)`, all at once; within as `(K, J, n)`."""
    centre, spread = moments(share, mean, sd.square())
    mean, sd = mean.unsqueeze(1), torch.maximum(sd, NARROWEST * spread).unsqueeze(1)
    z, narrowest = z.unsqueeze(-1), sd.amin(0)
    ends = mean + z * sd
    low, high = ends.amin(0), ends.amax(0)
    probability, precision = torch.special.ndtr(z), sd.reciprocal()
    at = torch.minimum(torch.maximum(centre + z * spread, low), high)
    for step in range(STEPS):
        u = (at - mean) * precision
        over = torch.tensordot(share, torch.special.ndtr(u), 1) - probability
        density = torch.exp(-0.5 * u.square()).mul_(precision)
        slope = torch.tensordot(share, density, 1) / _ROOT_OF_2_PI
        bend = -torch.tensordot(share, density.mul_(u).mul_(precision), 1) / _ROOT_OF_2_PI
        low, high = torch.where(over < 0, at, low), torch.where(over < 0, high, at)
        newton = over / slope
        to = at - newton / (1 - 0.5 * newton * bend / slope).clamp(0.5, 2.0)
        far = (to - at).abs() > CLOSE * narrowest
        # where steps leave the interval, or creep along a tail, it is halved
        kept = (low <= to) & (to <= high) & ~(far & (step % 3 == 2))
        at = torch.where(kept, to, 0.5 * (low + high))
        if not bool((far | ~kept & (low < high)).any()):
            break
    return at


def absolute(mean: Tensor, variance: Tensor) -> Tensor:
    """E|X| of normals.

    >>> round(float(absolute(torch.tensor(0.0), torch.tensor(1.0))), 4)
    0.7979
    """
    sd = variance.sqrt()
    z = mean / sd
    density = torch.exp(-0.5 * z.square()) / _ROOT_OF_2_PI
    found: Tensor = 2 * sd * density + mean * (2 * torch.special.ndtr(z) - 1)
    return found
