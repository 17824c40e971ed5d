"""How an expectation under a task's Gaussian guide is taken: at which standardised points.

A rule makes *noise*: standardised points `(points, tasks or 1, D)` of N(0, I), and their weights
where they are not equal.  The guide moves them to theta = loc + scale @ noise.  So a rule without
randomness and Monte Carlo are the same thing to everybody else, and the objective stays a pure
function of its arguments.  The points themselves are made in `numerics/quadrature.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import one_of
from varmeta.numerics import noise
from varmeta.numerics.quadrature import EXPECTATION, nodes, sphere

# Up to here 2 D points cost less than the accuracy is worth; beyond, draws (measured:
# docs/choices.md).
MAX_CUBATURE_SIZE = 24
# With frozen noise draws are no alternative, so more points are worth it; by whether the predictor
# is linear in the weights.
MAX_FROZEN_SIZE = {True: 512, False: 64}
ROTATIONS = 8


ExpectationName = Literal["auto", "quadrature", "cubature", "monte_carlo"]
EXPECTATIONS: tuple[ExpectationName, ...] = get_args(ExpectationName)


class Expectation(Protocol):
    """A rule for E_{N(0, I)}.

    `deterministic` says that the points do not depend on seed and step.  A rule with
    `weights(size)`, one for each point, as `GaussHermite` has, weights them.
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
        return sphere(size, self.rotations).to(like).unsqueeze(1)


@dataclass(frozen=True)
class GaussHermite:
    """Gauss-Hermite's points, with weights of their own.

    `number` points for each of up to three weights a task.

    Where a guide is wide and log p(y | theta) is no parabola over its width: E_q log p is then
        exact to many digits.  Cubature's two points, one sd to either side, say too little of it:
        of 0 and 1 with random intercepts of sd 4 their "bound" lies 10 nats above the log
        likelihood (docs/guides.md).

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
    straight: bool = True,
) -> Expectation:
    """The rule behind a name, for D = `size` weights a task.

    linear: the predictor is linear in the weights.  frozen: the noise is held fixed while phi is
    minimised; then a few draws would be fitted instead of the expectation, which the scales of the
    guide can escape along all the other directions.
    quadratic: log p(y | theta) is known to be quadratic in theta, so that cubature is exact.
    straight: the predictor is linear by construction, so that it means something at the outermost
    of many nodes; a program's curve may not, so that "auto" looks so far along one weight only.
    """
    if not isinstance(name, str):
        if not hasattr(name, "points") or not hasattr(name, "deterministic"):
            raise TypeError(
                f"expectation must be a name or a rule with `points`, not {type(name).__name__}"
            )
        return name
    if str(name) == "quantiles":
        raise ValueError(
            "expectation='quantiles' has gone: 'quadrature' is exact where it was near"
        )
    one_of("expectation", name, EXPECTATIONS)
    few = size in EXPECTATION if straight else size == 1
    if name == "auto" and few and not quadratic and (linear or frozen):
        name = "quadrature"
    if name == "auto":
        small = size <= (MAX_FROZEN_SIZE[linear] if frozen else MAX_CUBATURE_SIZE)
        name = "cubature" if small and (linear or frozen) else "monte_carlo"
    if name == "cubature":
        return Cubature(0 if linear else ROTATIONS)
    if name == "quadrature":
        if size not in EXPECTATION:
            raise ValueError(
                f"expectation='quadrature' serves models with up to {max(EXPECTATION)} weights per "
                f"task, and this has {size}: use 'cubature', or 'monte_carlo' with more particles"
            )
        return GaussHermite(EXPECTATION[size])
    return MonteCarlo(num_particles)
