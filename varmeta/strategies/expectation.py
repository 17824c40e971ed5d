"""How an expectation under a task's Gaussian guide is taken: at which standardised points.

A rule makes *noise*: standardised points `(points, tasks or 1, D)` of N(0, I), weighted equally but
for `GaussHermite`. The guide moves them to theta = loc + scale @ noise.  So a rule without
randomness (cubature) and Monte Carlo are the same thing to everybody else, and the objective stays
a pure function of its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import one_of
from varmeta.numerics import noise
from varmeta.numerics.quadrature import nodes

# Up to here 2 D points cost less than the accuracy is worth; beyond, draws (measured:
# docs/choices.md).
MAX_CUBATURE_SIZE = 24
# With frozen noise draws are no alternative, so more points are worth it; by whether the predictor
# is linear in the weights.
MAX_FROZEN_SIZE = {True: 512, False: 64}
ROTATIONS = 8
# Gauss-Hermite's points for each weight, by the number of weights.
HERMITE = {1: 32, 2: 12, 3: 8}


ExpectationName = Literal["auto", "quadrature", "cubature", "quantiles", "monte_carlo"]
EXPECTATIONS: tuple[ExpectationName, ...] = get_args(ExpectationName)


class Expectation(Protocol):
    """A rule for E_{N(0, I)}.

    `deterministic` says that the points do not depend on seed and step.
    """

    deterministic: bool

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        """Standardised points `(points, tasks or 1, size)`.

        `ids` `(tasks,)` name the tasks' own noise.
        """
        ...


@dataclass(frozen=True)
class Point:
    """The mean alone: what a delta guide needs."""

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        return like.new_zeros(1, 1, size)


@dataclass(frozen=True)
class Cubature:
    """Spherical cubature of third degree: the 2 D points +-sqrt(D) e_j.

    Exact for quadratics, and without noise.

    rotations: 0 takes the axes e_j; R takes R random orthonormal bases instead, always the same
        ones, 2 D R points in all. A point on an axis moves one weight by sqrt(D) standard
        deviations and leaves the others alone, which says little about a network; along a rotated
        basis every weight moves by about one, as in a draw of the guide.

    Source: Arasaratnam and Haykin, Cubature Kalman Filters, IEEE Trans. Automatic Control 54
        (2009), section III.

    >>> Cubature().points(2, torch.zeros(()), torch.zeros(1), 0, 0)[:, 0].square().mean(0)
    tensor([1.0000, 1.0000])
    """

    rotations: int = 0

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        return _sphere(size, self.rotations, like.dtype, like.device).unsqueeze(1)


@lru_cache(maxsize=32)
def _sphere(size: int, rotations: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # by numpy: a traced graph then takes the points as a constant
    normal = np.random.default_rng(0).standard_normal((rotations, size, size))
    axes = np.linalg.qr(normal)[0].swapaxes(-1, -2).reshape(-1, size) if rotations else np.eye(size)
    points = torch.from_numpy(math.sqrt(size) * np.concatenate([axes, -axes]))
    return points.to(dtype=dtype, device=device)


@dataclass(frozen=True)
class Quantiles:
    """For one weight a task: the means of `number` equally likely parts of N(0, 1).

    They are widened a little, to variance 1.

    Cubature's two points, one sd to either side, say too little of a likelihood that is far from
    quadratic over the guide's width: of 0 and 1 with random intercepts of sd 4 its "bound" lies 10
    nats above the log likelihood (docs/guides.md).

    >>> at = torch.zeros((), dtype=torch.float64)
    >>> z = Quantiles().points(1, at, torch.zeros(1), 0, 0).flatten()
    >>> round(float(z.square().mean()), 6), round(float(z.exp().mean()), 2)  # E exp(z) = 1.65
    (1.0, 1.64)
    """

    number: int = 64

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        return _quantiles(self.number, like.dtype, like.device)


@lru_cache(maxsize=32)
def _quantiles(number: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    normal = NormalDist()
    # the mean of each of `number` equally likely parts is the difference of the density at its
    # ends, times `number`
    density = [0.0, *(normal.pdf(normal.inv_cdf(k / number)) for k in range(1, number)), 0.0]
    z = -number * np.diff(density)
    return (
        torch.from_numpy(z / np.sqrt((z**2).mean()))
        .to(dtype=dtype, device=device)
        .reshape(-1, 1, 1)
    )


@dataclass(frozen=True)
class GaussHermite:
    """Gauss-Hermite's points, with weights of their own.

    `number` points for each of up to three weights a task.

    Where a guide is wide and log p(y | theta) is no parabola over its width: E_q log p is then
        exact to many digits.

    >>> rule = GaussHermite(32)
    >>> z = rule.points(1, torch.zeros((), dtype=torch.float64), torch.zeros(1), 0, 0).flatten()
    >>> weights = torch.tensor(rule.weights(1))
    >>> round(float((weights * (2 * z).exp()).sum()), 6)  # E exp(2 z) = exp(2)
    7.389056
    """

    number: int = 32

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        return nodes(size, self.number)[0].to(like).unsqueeze(1)

    def weights(self, size: int) -> tuple[float, ...]:
        return tuple(nodes(size, self.number)[1].exp().tolist())


@dataclass(frozen=True)
class MonteCarlo:
    """`num_particles` antithetic draws (an even number): every draw comes with its mirror image.

    The draws are a function of (seed, step, task) alone, whichever tasks share the batch.
    """

    num_particles: int = 2

    deterministic = False

    def __post_init__(self) -> None:
        if self.num_particles < 2 or self.num_particles % 2:
            raise ValueError(
                "num_particles must be an even number of at least 2 (antithetic pairs), not "
                f"{self.num_particles}"
            )

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        half = noise.normal(seed, step, ids, self.num_particles // 2, size, like.dtype)
        # not concatenated: in a compiled step that would be written to memory and read again
        signs = torch.from_numpy(np.array([1.0, -1.0])).to(half).reshape(2, 1, 1, 1)
        return (signs * half).flatten(0, 1)


def make_expectation(
    name: ExpectationName | Expectation,
    size: int,
    num_particles: int,
    linear: bool,
    frozen: bool,
    quadratic: bool = True,
) -> Expectation:
    """The rule behind a name, for D = `size` weights a task.

    linear: the predictor is linear in the weights.  frozen: the noise is held fixed while phi is
    minimised; then a few draws would be fitted instead of the expectation, which the scales of the
    guide can escape along all the other directions.
    quadratic: log p(y | theta) is known to be quadratic in theta, so that cubature is exact.
    """
    if not isinstance(name, str):
        if not hasattr(name, "points") or not hasattr(name, "deterministic"):
            raise TypeError(
                f"expectation must be a name or a rule with `points`, not {type(name).__name__}"
            )
        return name
    one_of("expectation", name, EXPECTATIONS)
    if name == "auto" and size == 1 and not quadratic and (linear or frozen):
        name = "quadrature"
    if name == "auto":
        small = size <= (MAX_FROZEN_SIZE[linear] if frozen else MAX_CUBATURE_SIZE)
        name = "cubature" if small and (linear or frozen) else "monte_carlo"
    if name == "cubature":
        return Cubature(0 if linear else ROTATIONS)
    if name == "quadrature":
        if size not in HERMITE:
            raise ValueError(
                f"expectation='quadrature' serves models with up to {max(HERMITE)} weights per "
                f"task, and this has {size}: use 'cubature', or 'monte_carlo' with more particles"
            )
        return GaussHermite(HERMITE[size])
    if name == "monte_carlo":
        return MonteCarlo(num_particles)
    if size != 1:
        raise ValueError(
            "expectation='quantiles' serves models with one weight per task, and this has "
            f"{size}: use 'cubature', or 'monte_carlo' with more particles"
        )
    return Quantiles()
