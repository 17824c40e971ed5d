"""KL[q || p] in closed form, for a task's guide q and the prior p; never sampled.

One frozen draw with a sampled KL has no minimum, and a sampled KL adds noise to theta0's gradient where the closed form
has none; so a pair without a closed form raises instead of falling back.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, Normal


def location(q: dist.TorchDistribution) -> Tensor:
    """The mean of a point or Gaussian, `(..., D)`."""
    return q.v if isinstance(q, dist.Delta) else q.mean


def has_closed_form(q: dist.TorchDistribution) -> bool:
    """Whether q is one of the families whose KL to a Gaussian prior is known here."""
    gaussian = isinstance(q, Independent) and isinstance(q.base_dist, Normal)
    return gaussian or isinstance(q, (dist.Delta, torch.distributions.MultivariateNormal))


def scale(q: dist.TorchDistribution) -> Tensor | None:
    """sd `(..., D)` of a diagonal normal, the factor `(..., D, D)` of a dense one, None for a point.

    Raises TypeError for any other distribution.
    """
    if isinstance(q, dist.Delta):
        return None
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        return q.base_dist.scale
    if isinstance(q, torch.distributions.MultivariateNormal):
        return q.scale_tril
    raise TypeError(
        f"a task's guide must put a Delta, Normal or MultivariateNormal on theta, not {type(q).__name__}: "
        "the KL to the Gaussian prior has no closed form for it"
    )


def kl(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """KL[q || p] per task, in nats; for a point q = delta(theta): -log p(theta), which is no divergence and gives no bound.

    With p = N(mu, S S') and q = N(m, L L'):
    KL = 1/2 |S^-1 L|^2 + 1/2 |S^-1 (m - mu)|^2 - D/2 + log det S - log det L.
    """
    q_scale, p_scale = scale(q), scale(p)
    assert p_scale is not None  # the prior is a Gaussian
    diagonal_p = isinstance(p, Independent)
    offset = location(q) - location(p)
    size = offset.shape[-1]
    if diagonal_p:
        whitened, log_det_p = offset / p_scale, p_scale.log().sum(-1)
    else:
        whitened = torch.linalg.solve_triangular(
            p_scale.expand(*offset.shape, size), offset.unsqueeze(-1), upper=False
        ).squeeze(-1)
        log_det_p = p_scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if q_scale is None:
        # not p.log_prob, which takes the logarithm of every weight's scale for every task
        return 0.5 * (whitened.square().sum(-1) + size * math.log(2 * math.pi)) + log_det_p
    diagonal_q = isinstance(q, Independent)
    if diagonal_p:
        ratio = q_scale / (p_scale if diagonal_q else p_scale.unsqueeze(-1))
    else:
        factor = torch.diag_embed(q_scale) if diagonal_q else q_scale
        batch = torch.broadcast_shapes(p_scale.shape, factor.shape)
        ratio = torch.linalg.solve_triangular(p_scale.expand(batch), factor.expand(batch), upper=False)
    diagonal_of_q = q_scale if diagonal_q else q_scale.diagonal(dim1=-2, dim2=-1)
    squares = ratio.square().sum(-1) if diagonal_q and diagonal_p else ratio.square().sum((-2, -1))
    return 0.5 * (squares + whitened.square().sum(-1) - size) + log_det_p - diagonal_of_q.log().sum(-1)


def move(q: dist.TorchDistribution, noise: Tensor) -> Tensor:
    """theta = loc + scale @ noise for standardised points `(points, ..., D)`."""
    q_scale = scale(q)
    if q_scale is None:
        # a point has no spread, whatever the noise: every point of the rule is its location
        return location(q) + torch.zeros_like(noise)
    if isinstance(q, Independent):
        return location(q) + q_scale * noise
    return location(q) + (q_scale @ noise.unsqueeze(-1)).squeeze(-1)
