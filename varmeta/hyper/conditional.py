"""Posteriors of the tasks' weights at many eta: mode, curvature, and moments by quadrature.

p(theta_i | y_i, eta) for K values of eta and T tasks are K T small problems.  Newton's method finds
each mode; the Gaussian of the curvature there places the nodes of a quadrature (adaptive
Gauss-Hermite), which gives the evidence p(y_i | eta) and the posterior's mean and covariance.
Linear-Gaussian tasks have all of it in closed form (`known.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro import poutine
from torch import Tensor

from varmeta.guides.prior_parts import prior_parts
from varmeta.hyper.known import known
from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import SITE, observed_log_prob
from varmeta.numerics.hessian import task_hessians
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.quadrature import placed
from varmeta.numerics.rows import rowwise
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree
from varmeta.numerics.triangular import root_of_inverse
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Batch, Data

# Numbers in one tensor: as large as a core's cache likes, so that memory is not what the time goes
# into.
CELLS = 200_000
# The least curvature at a mode, in units of the prior's precision.
FLAT = 0.01


@dataclass(frozen=True)
class Conditionals:
    """What is known of every task, `(K, T)` first, under K values of eta.

    log p(y_i | eta), nats; mode and mean, `(K, T, D)`; the lower factor of the covariance at the
    mode and the covariance, `(K, T, D, D)`; whether Newton's method converged.
    """

    log_evidence: Tensor
    mode: Tensor
    factor: Tensor
    mean: Tensor
    covariance: Tensor
    converged: Tensor


def log_joint(model: TaskModel, theta: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
    """log p(theta | eta) + log p(y_i | x_i, theta, eta), `(J, tasks)`, theta `(J, tasks, D)`."""
    with validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, {SITE: theta.unsqueeze(-2)})).get_trace(
            eta, data
        )
        fn = cast("Any", trace.nodes[SITE]["fn"])
        prior: Tensor = fn.log_prob(theta.unsqueeze(-2)).squeeze(-1)
        return prior + observed_log_prob(trace).sum(-1) if data.width else prior


@torch.no_grad()
def conditionals(
    model: TaskModel, batch: Batch, eta: Mapping[str, Tensor], gaussian: bool
) -> Conditionals:
    """For each task of the batch and each of eta's K rows.

    gaussian: see `TaskModel.is_linear_gaussian`; it saves the quadrature, and all of the search
        where it is so.
    """
    if gaussian and model.is_linear_gaussian:
        evidence, mean, factor = (part.to(batch.support.like) for part in known(model, batch, eta))
        sound = evidence.isfinite() & factor.isfinite().all(-1).all(-1)
        return Conditionals(evidence, mean, factor, mean, factor @ factor.mT, sound)
    groups = batch.by_size()
    number = len(next(iter(eta.values())))
    found = []
    for _, group in groups:
        cells = group.support.cells * max(1, model.weights.size)
        step = max(1, CELLS // max(1, cells))
        parts = [
            _solve(
                model,
                group.support,
                {name: value[k : k + step] for name, value in eta.items()},
                gaussian,
            )
            for k in range(0, number, step)
        ]
        found.append([torch.cat(part) for part in zip(*parts, strict=True)])
    back = torch.cat([rows for rows, _ in groups]).argsort()
    return Conditionals(*(torch.cat(part, 1)[:, back] for part in zip(*found, strict=True)))


def _solve(
    model: TaskModel, data: Data, eta: dict[str, Tensor], gaussian: bool
) -> tuple[Tensor, ...]:
    tasks, size = len(data), model.weights.size
    loc, *columns = rowwise(lambda one: _prior(model, one))(eta).unbind(-1)
    spread = torch.stack(columns, -1)  # (K, D, D)
    number = len(loc)
    density = rowwise(lambda theta, one: log_joint(model, theta, one, data))

    def weights(u: Tensor) -> Tensor:
        return loc[:, None] + (spread[:, None] @ u.reshape(number, tasks, size, 1)).squeeze(-1)

    def losses(phi: Tree) -> Tensor:
        return -density(weights(phi["u"]).unsqueeze(1), eta).reshape(-1)

    # u in units of the prior: however narrow it is, Newton's method and its tolerance meet
    # curvatures of about 1
    solution = minimize(
        losses, {"u": loc.new_zeros(number * tasks, size)}, NewtonCG(), max_steps=100
    )
    loss, hessian = task_hessians(lambda u: losses({"u": u}), solution.value["u"])
    # a rising direction has no Gaussian of its own: a part of the prior's width is a place to look
    # for the mass
    factor = root_of_inverse(hessian, FLAT, convex=gaussian)
    factor = spread[:, None] @ factor.reshape(number, tasks, size, size)
    mode = weights(solution.value["u"])
    # a step that gets no further ends at rounding, as where the prior is very narrow
    found = (solution.result == Result.CONVERGED) | (solution.result == Result.STAGNATED)
    converged = found.reshape(number, tasks)
    if gaussian:
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        evidence = 0.5 * size * math.log(2 * math.pi) + log_det - loss.reshape(number, tasks)
        return evidence, mode, factor, mode, factor @ factor.mT, converged
    theta, log_weight = (part.transpose(0, 1) for part in placed(mode, factor))  # (K, J, T, D)
    step = max(1, CELLS // max(1, data.cells * theta.shape[1]))
    log_p = torch.cat(
        [
            density(theta[k : k + step], {name: value[k : k + step] for name, value in eta.items()})
            for k in range(0, number, step)
        ]
    )
    log_p = log_p + log_weight
    share = log_p.softmax(1).unsqueeze(-1)
    mean = (share * theta).sum(1)
    offset = theta - mean.unsqueeze(1)
    covariance = ((share * offset).unsqueeze(-1) * offset.unsqueeze(-2)).sum(1)
    return log_p.logsumexp(1), mode, factor, mean, covariance, converged


def _prior(model: TaskModel, eta: Mapping[str, Tensor]) -> Tensor:
    """theta0 and the lower factor of the prior's covariance, side by side, `(D, D + 1)`."""
    loc, root = prior_parts(model, eta)
    return torch.cat([loc.unsqueeze(-1), root.lower], -1)
