"""Linear Gaussian tasks in closed form: y_i = X_i theta_i + s e, theta_i ~ N(m, L L'), e ~ N(0, I).

With theta = m + L u the prior of u is N(0, I), and given y it is N(u*, A^-1) with

    B = X L / s,   e = (y - X m) / s,   A = I + B'B,   u* = A^-1 B'e,
    -2 log p(y) = n log(2 pi s^2) + log|A| + |e - B u*|^2 + |u*|^2,

so that nothing is searched for.  A is had by QR, so that B is never squared, and the last two terms
are sums of squares instead of a difference of large numbers: far origins, other units, collinear
rows and nearly exact fits cost no digits.  Where a task has fewer rows than weights the same comes
from I + BB', `(n, n)`.
Rows of padding are rows of zeros in B and e.
Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 2.1.1 and
equation 2.8; in mixed models Bates et al., J. Stat. Softw. 67 (2015), section 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Standardised(NamedTuple):
    """Tasks in units of the prior and of their noise.

    design: B `(tasks, n, D)`; residual: e `(tasks, n)`.
    log_scale: the log of the volume that this took, sum log s `(tasks,)`.
    rows: how many of each task are no padding, `(tasks,)`.
    """

    design: Tensor
    residual: Tensor
    log_scale: Tensor
    rows: Tensor


class Posterior(NamedTuple):
    """N(u*, G G') of u given y: `(tasks, D)` and lower triangular `(tasks, D, D)`."""

    mean: Tensor
    factor: Tensor


def posterior(tasks: Standardised) -> Posterior:
    """Of u, the weights in units of the prior.

    >>> one = torch.ones(1, 1, 1, dtype=torch.float64)  # one row: y = theta + e, y = 1
    >>> found = posterior(Standardised(one, one[..., 0], one[0, 0], one[0, 0]))
    >>> round(found.mean.item(), 6), round(found.factor.item() ** 2, 6)
    (0.5, 0.5)
    """
    design, residual = tasks.design, tasks.residual
    upper = _factored(design.flip(-1))[1].mT.flip(-1, -2)
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    factor = _inverse(upper * signs.unsqueeze(-2))
    mean = _apply(factor, (design.mT @ residual.unsqueeze(-1)).squeeze(-1))
    # once more, of what is left: the products above are as large as the square
    left = residual - (design @ mean.unsqueeze(-1)).squeeze(-1)
    mean = mean + _apply(factor, (design.mT @ left.unsqueeze(-1)).squeeze(-1) - mean)
    return Posterior(mean, factor)


def mean(tasks: Standardised) -> Tensor:
    """u* `(tasks, D)` alone: of fewer rows than weights nothing is `(D, D)`.

    >>> one = torch.ones(1, 1, 1, dtype=torch.float64)
    >>> two = one.expand(1, 1, 2)  # y = theta_1 + theta_2 + e, y = 1
    >>> mean(Standardised(two, one[..., 0], one[0, 0], one[0, 0])).round(decimals=4).tolist()
    [[0.3333, 0.3333]]
    """
    design, residual = tasks.design, tasks.residual
    if design.shape[-2] >= design.shape[-1]:
        return posterior(tasks).mean
    # u* = B'w, w = (I + BB')^-1 e, the residual that is left
    upper = _factored(design.mT)[1]
    turned = _inverse(upper).mT
    left = _apply(turned, residual)
    # once more, of what is left: the products are as large as the square
    along = (design.mT @ left.unsqueeze(-1)).squeeze(-1)
    again = residual - left - (design @ along.unsqueeze(-1)).squeeze(-1)
    return along + (design.mT @ _apply(turned, again).unsqueeze(-1)).squeeze(-1)


def log_evidence(tasks: Standardised) -> Tensor:
    """log p(y_i) `(tasks,)`, nats; NaN where numbers are lost."""
    design, residual = tasks.design, tasks.residual
    number, size = design.shape[-2:]
    if number < size:
        _, triangle = _factored(design.mT)  # R'R = I + BB'
        white = torch.linalg.solve_triangular(triangle.mT, residual.unsqueeze(-1), upper=False)
        squares = white.square().sum((-2, -1))
    else:
        q, triangle = _factored(design)
        along = q[..., :number, :].mT @ residual.unsqueeze(-1)
        mean = torch.linalg.solve_triangular(triangle, along, upper=True)
        left = residual - (design @ mean).squeeze(-1)
        squares = left.square().sum(-1) + mean.square().sum((-2, -1))
    log_det = triangle.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = 0.5 * math.log(2 * math.pi) * tasks.rows
    found: Tensor = -(constant + tasks.log_scale + log_det + 0.5 * squares)
    return found


def _factored(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Q and upper triangular R of A over I, so that R'R = I + A'A, of A `(tasks, n, k)`.

    A is never squared: it may be 1e9 times the noise, and its square leaves nothing of I.
    """
    size = rows.shape[-1]
    identity = torch.eye(size, dtype=rows.dtype, device=rows.device)
    stacked = torch.cat([rows, identity.expand(*rows.shape[:-2], size, size)], -2)
    q, r = torch.linalg.qr(stacked)
    return q, r


def _inverse(upper: Tensor) -> Tensor:
    """The transposed inverse of upper triangles, lower triangular."""
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    lower: Tensor = torch.linalg.solve_triangular(upper.mT, identity.expand_as(upper), upper=False)
    return lower


def _apply(factor: Tensor, vector: Tensor) -> Tensor:
    """G G' v."""
    product: Tensor = factor @ (factor.mT @ vector.unsqueeze(-1))
    return product.squeeze(-1)
