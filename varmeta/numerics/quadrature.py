"""Points and weights for expectations under N(0, I).

Gauss-Hermite and its products for one, two and three numbers, the sphere's points, and quasi-random
ones:

    E g(z) ~ sum_j w_j g(z_j),   sum_j w_j = 1.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Gauss-Hermite's nodes for each of so many numbers, by what is integrated.
# log p(y | theta) over a Gaussian guide: 32 give E exp(2 z) to 2e-12.
EXPECTATION = {1: 32, 2: 12, 3: 8}
# p(y, theta) around its mode.  On toenail, the hardest case at hand, 31 nodes end 1e-3 nats off
# over 294 patients; with two weights, where they are skewed, see docs/guides.md.
EVIDENCE = {1: 51, 2: 15, 3: 7}
# The same at hundreds of values of eta, or on the way to one.
NODES = {1: 15, 2: 7, 3: 5}
# Beyond three numbers, so many quasi-random points.
MANY = 128


@lru_cache(maxsize=16)
def nodes(size: int, number: int | None = None) -> tuple[Tensor, Tensor]:
    """Points z `(J, size)` and log weights `(J,)` for expectations under N(0, I), float64.

    sum_j exp(w_j) g(z_j) is near E g(z) for z ~ N(0, I).

    Gauss-Hermite's product rule with `number` nodes for each number, exact for polynomials of
    degree 2 n - 1 in each; by default `NODES` for up to three numbers, and beyond a quasi-random
    sequence.

    >>> z, w = nodes(1)
    >>> round(float((w.exp() * z[:, 0] ** 4).sum()), 6)
    3.0
    """
    number = NODES.get(size) if number is None else number
    if number is None:
        return normal_points(MANY, size, 0), torch.full(
            (MANY,), -math.log(MANY), dtype=torch.float64
        )
    point, weight = np.polynomial.hermite_e.hermegauss(number)
    log_weight = np.log(weight / math.sqrt(2 * math.pi))
    # by numpy: a traced graph then takes the points as a constant
    z = np.array(list(itertools.product(point, repeat=size)))
    log_weights = np.array(list(itertools.product(log_weight, repeat=size))).sum(-1)
    return torch.from_numpy(z), torch.from_numpy(log_weights)


def placed(mode: Tensor, factor: Tensor, number: int | None = None) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite's nodes, placed around a mode: points `(J, ..., D)` and log weights `(J, ...)`.

    The integral of f is near sum_j exp(w_j) f(z_j) where f is a polynomial times N(mode, factor
    factor').

    mode: `(..., D)`.
    factor: lower triangular, `(..., D, D)`.  number: see `nodes`.
    Source: Naylor and Smith, Applications of a method for the efficient computation of posterior
    distributions, J. Royal Statistical Society C 31 (1982).

    >>> z, w = placed(torch.tensor([1.0]), torch.tensor([[0.5]]))
    >>> round(float((w + torch.distributions.Normal(1.0, 0.5).log_prob(z[:, 0])).logsumexp(0)), 6)
    0.0
    """
    size = mode.shape[-1]
    z, log_weight = (part.to(mode) for part in nodes(size, number))
    shape = (len(z), *(1,) * (mode.dim() - 1))
    points = mode + (factor @ z.reshape(*shape, size, 1)).squeeze(-1)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = log_weight + 0.5 * z.square().sum(-1) + 0.5 * size * math.log(2 * math.pi)
    return points, constant.reshape(shape) + log_det


@lru_cache(maxsize=32)
def sphere(size: int, rotations: int = 0) -> Tensor:
    """The points +-sqrt(size) e_j, all of one weight: `(2 size, size)`, float64.

    rotations: along so many random orthonormal bases instead, always the same.  Exact for
        quadratics.

    >>> sphere(2).square().mean(0)
    tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    normal = np.random.default_rng(0).standard_normal((rotations, size, size))
    axes = np.linalg.qr(normal)[0].swapaxes(-1, -2).reshape(-1, size) if rotations else np.eye(size)
    return torch.from_numpy(math.sqrt(size) * np.concatenate([axes, -axes]))


def normal_points(number: int, size: int, seed: int) -> Tensor:
    """A scrambled Sobol sequence as standard normal points `(number, size)`, float64.

    A function of its arguments alone.
    """
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    uniform = engine.draw(number, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal
