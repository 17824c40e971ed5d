"""Points and weights for E under N(0, I): Gauss-Hermite for few numbers, else quasi-random."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Nodes for each of a few numbers; beyond three numbers, so many quasi-random points.
NODES = {1: 15, 2: 7, 3: 5}
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
    z = torch.tensor(list(itertools.product(point, repeat=size)), dtype=torch.float64)
    return z, torch.tensor(
        list(itertools.product(log_weight, repeat=size)), dtype=torch.float64
    ).sum(-1)


def normal_points(number: int, size: int, seed: int) -> Tensor:
    """A scrambled Sobol sequence as standard normal points `(number, size)`, float64.

    A function of its arguments alone.
    """
    engine = torch.quasirandom.SobolEngine(size, scramble=True, seed=seed)
    uniform = engine.draw(number, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal
