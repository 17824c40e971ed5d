"""How an expectation under a task's Gaussian guide is taken: at which standardised points.

A rule makes *noise*: standardised points `(points, tasks or 1, D)` of N(0, I), weighted equally.  The guide moves them
to theta = loc + scale @ noise.  So a rule without randomness (cubature) and Monte Carlo are the same thing to everybody
else, and the objective stays a pure function of its arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varmeta.numerics import noise

# Up to here 2 D points cost less than the accuracy is worth; beyond, draws (measured: docs/choices.md).
MAX_CUBATURE_SIZE = 24


class Expectation(Protocol):
    """A rule for E_{N(0, I)}; `deterministic` says that the points do not depend on seed and step."""

    deterministic: bool

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        """Standardised points `(points, tasks or 1, size)`; `ids` (tasks,) name the tasks' own noise."""
        ...


@dataclass(frozen=True)
class Point:
    """The mean alone: what a delta guide needs."""

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        return like.new_zeros(1, 1, size)


@dataclass(frozen=True)
class Cubature:
    """Spherical cubature of third degree: the 2 D points +-sqrt(D) e_j.  Exact for quadratics, and without noise.

    Source: Arasaratnam and Haykin, Cubature Kalman Filters, IEEE Trans. Automatic Control 54 (2009), section III.

    >>> Cubature().points(2, torch.zeros(()), torch.zeros(1), 0, 0)[:, 0].square().mean(0)
    tensor([1.0000, 1.0000])
    """

    deterministic = True

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        axes = math.sqrt(size) * torch.eye(size, dtype=like.dtype, device=like.device)
        return torch.cat([axes, -axes]).unsqueeze(1)


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
                f"num_particles must be an even number of at least 2 (antithetic pairs), not {self.num_particles}"
            )

    def points(self, size: int, like: Tensor, ids: Tensor, seed: int, step: int) -> Tensor:
        half = noise.normal(seed, step, ids, self.num_particles // 2, size, like.dtype)
        return torch.cat([half, -half])


def make_expectation(name: str | Expectation, size: int, num_particles: int) -> Expectation:
    """The rule behind "auto", "cubature" or "monte_carlo"; "auto" takes cubature up to 24 weights."""
    if not isinstance(name, str):
        if not hasattr(name, "points") or not hasattr(name, "deterministic"):
            raise TypeError(f"expectation must be a name or a rule with `points`, not {type(name).__name__}")
        return name
    if name == "auto":
        name = "cubature" if size <= MAX_CUBATURE_SIZE else "monte_carlo"
    if name == "cubature":
        return Cubature()
    if name == "monte_carlo":
        return MonteCarlo(num_particles)
    raise ValueError(f"expectation must be 'auto', 'cubature' or 'monte_carlo', not {name!r}")
