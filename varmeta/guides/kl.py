"""KL[q || p] in closed form, for a task's guide q and the prior p; never sampled.

One frozen draw with a sampled KL has no minimum, and a sampled KL adds noise to theta0's gradient
where the closed form has none; so a pair without a closed form raises instead of falling back.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from varmeta.guides.gaussian import times
from varmeta.numerics.roots import DiagonalRoot, Root, TriangularRoot
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.structured_normal import StructuredNormal


def location(q: dist.TorchDistribution) -> Tensor:
    """The mean of a point or Gaussian, `(..., D)`."""
    return q.v if isinstance(q, dist.Delta) else q.mean


def moved_by(q: dist.TorchDistribution, offset: Tensor | None) -> dist.TorchDistribution:
    """A point or Gaussian whose location `(..., D)` is moved by `offset`, which broadcasts.

    Itself for None.
    """
    if offset is None:
        return q
    loc = location(q) + offset
    if isinstance(q, dist.Delta):
        return dist.Delta(loc, event_dim=1)
    if isinstance(q, StructuredNormal):
        return q.moved(loc)
    if isinstance(q, Independent):
        moved: dist.TorchDistribution = dist.Normal(loc, q.base_dist.scale).to_event(1)
        return moved
    return dist.MultivariateNormal(loc, scale_tril=q.scale_tril)


def has_closed_form(q: dist.TorchDistribution) -> bool:
    """Whether q is one of the families whose KL to a Gaussian prior is known here."""
    gaussian = isinstance(q, Independent) and isinstance(q.base_dist, Normal)
    return gaussian or isinstance(
        q, (dist.Delta, torch.distributions.MultivariateNormal, StructuredNormal)
    )


def require_closed_form(q: dist.TorchDistribution) -> None:
    """Raises TypeError for a family whose KL is not known."""
    if not has_closed_form(q):
        raise TypeError(
            "a task's guide must put a Delta, Normal or MultivariateNormal on theta, not "
            f"{type(q).__name__}: the KL to the Gaussian prior has no closed form for it"
        )


def scale(q: dist.TorchDistribution) -> Tensor | None:
    """The scale of q: sd `(..., D)`, factor `(..., D, D)`, or None.

    The sd of a diagonal normal, the factor of a dense one, None for a point.

    Of a structured one its whole matrix A, which only few weights allow; of a low-rank prior its
    lower factor.  Raises TypeError for any other distribution.
    """
    require_closed_form(q)
    if isinstance(q, dist.Delta):
        return None
    if isinstance(q, StructuredNormal):
        return q.scale_matrix
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
        sd: Tensor = q.base_dist.scale
        return sd
    factor: Tensor = q.scale_tril
    return factor


def root_of(p: dist.TorchDistribution) -> Root:
    """A square root of the covariance of a Gaussian prior, by its products."""
    if isinstance(p, FactorNormal):
        return p.root
    found = scale(p)
    assert found is not None  # the prior is a Gaussian
    return DiagonalRoot(found) if found.dim() == 1 else TriangularRoot(found)


def kl(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """KL[q || p] per task, in nats.

    For a point q = delta(theta) it is -log p(theta), which is no divergence and gives no bound.

    With p = N(mu, S S') and q = N(m, L L'):
    KL = 1/2 |S^-1 L|^2 + 1/2 |S^-1 (m - mu)|^2 - D/2 + log det S - log det L.
    """
    offset = location(q) - location(p)
    size = offset.shape[-1]
    if isinstance(p, FactorNormal):  # of which no matrix of all weights is made
        whitened, log_det_p = p.whitened(offset), p.log_det
    elif isinstance(p, Independent):
        # of the prior's own numbers, not of every task's: one division instead of one for each
        # weight of each task
        sd = _once(p.base_dist.scale)
        whitened = offset * sd.reciprocal()
        log_det_p = sd.log().sum(-1) * (size / sd.shape[-1])
    else:
        whitened = torch.linalg.solve_triangular(
            p.scale_tril.expand(*offset.shape, size), offset.unsqueeze(-1), upper=False
        ).squeeze(-1)
        log_det_p = p.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    if isinstance(q, dist.Delta):
        # not p.log_prob, which takes the logarithm of every weight's scale for every task
        return 0.5 * (whitened.square().sum(-1) + size * math.log(2 * math.pi)) + log_det_p
    squares, log_det_q = _squares(q, p), _log_det(q)
    return 0.5 * (squares + whitened.square().sum(-1) - size) + log_det_p - log_det_q


def _once(x: Tensor) -> Tensor:
    """x without the copies that expanding made: what is taken of it is not taken for every task, or
    weight.
    """
    for axis in range(x.dim()):
        if x.stride(axis) == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    return x


def _squares(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """|S^-1 L|^2."""
    if isinstance(p, FactorNormal):
        return _low_rank_squares(q, p)
    p_scale = scale(p)
    assert p_scale is not None  # the prior is a Gaussian
    if isinstance(q, StructuredNormal):
        diagonal = isinstance(p, Independent)
        return (q.variance / p_scale.square()).sum(-1) if diagonal else q.squares_in(p_scale)
    q_scale = scale(q)
    assert q_scale is not None
    if isinstance(p, Independent):
        diagonal = isinstance(q, Independent)
        unit = _once(p_scale).reciprocal()
        ratio = q_scale * (unit if diagonal else unit.unsqueeze(-1))
        return ratio.square().sum(-1) if diagonal else ratio.square().sum((-2, -1))
    factor = torch.diag_embed(q_scale) if isinstance(q, Independent) else q_scale
    batch = torch.broadcast_shapes(p_scale.shape, factor.shape)
    whole: Tensor = torch.linalg.solve_triangular(
        p_scale.expand(batch), factor.expand(batch), upper=False
    )
    return whole.square().sum((-2, -1))


def _low_rank_squares(q: dist.TorchDistribution, p: FactorNormal) -> Tensor:
    """|S^-1 L|^2, the trace of the prior's precision times q's covariance."""
    root = p.root
    if isinstance(q, Independent):
        return (q.variance * root.precisions).sum(-1)
    if not isinstance(q, StructuredNormal):
        return root.solve(q.scale_tril.mT).square().sum((-2, -1))
    own = (q.variance / root.spread.square()).sum(-1)
    lead = (1,) * len(q.batch_shape)
    taken = q.transposed(root.taken.reshape(-1, *lead, root.taken.shape[-1]))
    return own - taken.square().sum(-1).sum(0)


def _log_det(q: dist.TorchDistribution) -> Tensor:
    """log det L."""
    if isinstance(q, StructuredNormal):
        return q.log_det
    q_scale = scale(q)
    assert q_scale is not None
    return (
        (q_scale if isinstance(q, Independent) else q_scale.diagonal(dim1=-2, dim2=-1))
        .log()
        .sum(-1)
    )


def move(q: dist.TorchDistribution, noise: Tensor) -> Tensor:
    """theta = loc + scale @ noise for standardised points `(points, ..., D)`."""
    if isinstance(q, StructuredNormal):
        return location(q) + q.scaled(noise)
    q_scale = scale(q)
    if q_scale is None:
        # a point has no spread, whatever the noise: every point of the rule is its location
        return location(q).expand(torch.broadcast_shapes(location(q).shape, noise.shape))
    if isinstance(q, Independent):
        return location(q) + q_scale * noise
    return location(q) + times(q_scale, noise)
