"""First and second derivatives of the profiled evidence, written out.

In the entries of K (or the sds over s, in which K is linear too) and log s, with M_i = I + R_i K K'
R_i', S_i = M_i^-1 and U_i = [R_i E_i], the rows that a task's weights can move:

    H = sum_i U_i' S_i U_i + rest,   q(K) = min_v v' H v over v = (places, 1),
    -log p = N log s + q / (2 s^2) + 1/2 sum_i log |M_i| + constants.

dS = -S dM S, so that every derivative is a product of matrices as small as a task's weights.
Automatic differentiation gives the same in ten times the time (`tests/fitting`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.likelihoods.base import SCALE
from varmeta.numerics.triangular import whitened

# Numbers in the largest tensor; beyond, automatic differentiation takes them a few at a time.
LARGEST = 20_000_000


def applies(objective: ProfiledEvidence) -> bool:
    """Whether all that moves are the covariance relative to the noise, and the noise, both few."""
    learned = objective.dense or bool(objective.precisions)
    if not learned or not objective.profiles_places or objective.has_hyperprior:
        return False
    if objective.restricted:
        return False
    size = objective.size
    most = size * (size + 1) // 2 if objective.dense else size
    return len(objective.tasks.triangles) * (most * size) ** 2 <= LARGEST


def directions(objective: ProfiledEvidence, coordinates: dict[str, Tensor]) -> Tensor:
    """dK `(m, D, D)` for each number of the coordinates but log s, in their order."""
    zero = {name: torch.zeros_like(value) for name, value in coordinates.items()}
    found = []
    for name, value in coordinates.items():
        if name == SCALE:
            continue
        for one in torch.eye(value.numel()).to(value):
            found.append(objective.factor({**zero, name: one.reshape(value.shape)}))
    return torch.stack(found)


def derivatives(
    objective: ProfiledEvidence,
    coordinates: dict[str, Tensor],
    along: Tensor,
    second: bool = True,
) -> tuple[Tensor, Tensor]:
    """Gradient `(m,)` and Hessian `(m, m)` in the coordinates, log s last where it is learned.

    along: `directions`.  Without `second` the Hessian is zeros.
    """
    own = objective.tasks.triangles[:, : objective.size]
    r = own[..., : objective.size]
    moved = r @ objective.factor(coordinates)  # T_i = R_i K
    identity = torch.eye(objective.size).to(own)
    inner = moved @ moved.mT + identity
    white, _ = whitened(inner, torch.cat([own, identity.expand_as(inner)], -1))
    root = white[..., own.shape[-1] :]  # of S
    inverse = root.mT @ root
    known = root.mT @ white[..., : own.shape[-1]]  # S U
    quadratic = (own.mT @ known).sum(0) + objective.within
    v, inverse_places = objective.free.best(quadratic), objective.free.inverse(quadratic)
    reached = known @ v  # S U v, (T, D)
    pushed = torch.einsum("tij,ajk->taik", r, along)  # dT_i
    half = torch.einsum("taij,tkj->taik", pushed, moved)
    moved_by = half + half.mT  # dM_i
    squares = v @ quadratic @ v
    towards = torch.einsum("taij,tj->tai", moved_by, reached)  # dM_a S U v
    d_squares = -torch.einsum("ti,tai->a", reached, towards)
    d_log_det = 0.5 * torch.einsum("tij,taij->a", inverse, moved_by)
    log_scale = objective.log_scale(coordinates)
    precision = torch.exp(-2.0 * log_scale)
    count = objective.tasks.counts.sum()
    gradient = 0.5 * precision * d_squares + d_log_det
    learns = objective.learns_scale
    if learns:
        gradient = torch.cat([gradient, (count - precision * squares).reshape(1)])
    hessian = gradient.new_zeros(len(gradient), len(gradient))
    if not second:
        return gradient, hessian
    size = len(along)
    once = torch.einsum("tij,tajk->taik", inverse, moved_by)  # S dM_a
    # v' d2H v, of dM S dM twice and of d2M_ab = dT_a dT_b' and its transpose
    across = torch.einsum("tai,tbi->ab", towards, towards @ inverse)
    bent = torch.einsum("taik,ti->tak", pushed, reached)
    bend = torch.einsum("tak,tbk->ab", bent, bent)
    # what the best places give way
    given = -torch.einsum("tip,tai->ap", known, towards) @ objective.free.into[:, :-1]
    d2_squares = 2.0 * (across - bend - given @ inverse_places @ given.mT)
    curved = torch.einsum("taik,tbik->ab", pushed, inverse.unsqueeze(1) @ pushed)
    d2_log_det = curved - 0.5 * torch.einsum("taij,tbji->ab", once, once)
    hessian[:size, :size] = 0.5 * precision * d2_squares + d2_log_det
    if learns:
        hessian[:size, size] = hessian[size, :size] = -precision * d_squares
        hessian[size, size] = 2.0 * precision * squares
    return gradient, hessian
