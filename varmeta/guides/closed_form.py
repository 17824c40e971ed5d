"""A task's posterior and evidence without a search: linear by construction, Gaussian noise.

Where the output is linear in the weights that vary and y is Gaussian around it, p(theta_i | y_i,
eta) is Gaussian and log p(y_i | eta) is known.  So the minimum of F_i over a guide's phi is known
too, exactly, with its derivative in eta: the post's Alg(f_i, theta0) without iterations.  With the
shared layers of a network before it, it is the head of ALPaCA and R2-D2.
Source: Harrison, Sharma and Pavone, Meta-learning priors for efficient online Bayesian regression
(2018); Bertinetto et al., Meta-learning with differentiable closed-form solvers, ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.guides.guide import Guide
from varmeta.guides.prior_parts import prior_parts
from varmeta.models.constants import constants
from varmeta.models.design import columns, given_to
from varmeta.models.model import TaskModel
from varmeta.numerics import gaussian
from varmeta.numerics.gaussian import Standardised
from varmeta.numerics.roots import Root
from varmeta.numerics.tree import Tree
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data

# Numbers of the tasks' designs that are held at once where no derivative is asked for.
CELLS = 20_000_000


def log_evidence(model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tensor:
    """log p(y_i | eta) of every task, `(tasks,)`, nats; for `TaskModel.is_linear_gaussian`."""
    return gaussian.log_evidence(standardised(model, eta, data)).to(data.like)


def log_evidence_in_parts(model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tensor:
    """`log_evidence`, without derivatives and of as many tasks at once as memory allows."""
    rows = max(1, data.width * math.prod(data.y_shape))
    step = max(1, CELLS // (rows * model.weights.size))
    with torch.no_grad():
        parts = [
            log_evidence(model, eta, data.part(begin, min(begin + step, len(data))))
            for begin in range(0, len(data), step)
        ]
    return torch.cat(parts)


def log_predictive(model: TaskModel, eta: Mapping[str, Tensor], data: Data, query: Data) -> Tensor:
    """log p(query_i | y_i, eta) of every task, `(tasks,)`, nats.

    That is the joint density of its query rows given its support.
    """
    # each by itself, as rows of one part may meet in the network
    prior = _prior(model, eta)
    seen, asked = (standardised(model, eta, part, prior) for part in (data, query))
    both = Standardised(
        torch.cat([seen.design, asked.design], 1),
        torch.cat([seen.residual, asked.residual], 1),
        seen.log_scale + asked.log_scale,
        seen.rows + asked.rows,
    )
    return (gaussian.log_evidence(both) - gaussian.log_evidence(seen)).to(data.like)


def best(guide: Guide, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree | None:
    """phi at the minimum of F_i, differentiable in eta; None where the guide does not know it."""
    loc, root = prior = _prior(model, eta)
    tasks = standardised(model, eta, data, prior)
    if guide.phi_is_loc:
        return {"loc": (loc + root.times(gaussian.mean(tasks))).to(data.like)}
    found = gaussian.posterior(tasks)
    factor = root.lower_times(found.factor)
    phi = guide.at_gaussian(loc + root.times(found.mean), factor)
    return None if phi is None else {name: value.to(data.like) for name, value in phi.items()}


def standardised(
    model: TaskModel,
    eta: Mapping[str, Tensor],
    data: Data,
    prior: tuple[Tensor, Root] | None = None,
) -> Standardised:
    """The tasks in units of the prior and of their noise, in float64.

    prior: its location and root, where they are at hand.
    """
    loc, root = _prior(model, eta) if prior is None else prior
    x, y = data.filled
    count = data.num_points
    if not data.width:
        none = loc.new_zeros(len(data), 0, len(loc))
        return Standardised(none, none[..., 0], count.to(loc), count.to(loc))
    design, constant = design_of(model, eta, x)
    assert model.likelihood is not None
    observed = model.likelihood.observed(y)
    with validation_enabled(False):
        noise = model.likelihood.distribution(constant.reshape(*observed.shape), eta, y)
    mask = data.mask.unsqueeze(-1).expand(*data.mask.shape, constant.shape[-1])
    spread = noise.stddev.double().reshape(constant.shape)
    unit = torch.where(mask, spread.reciprocal(), 0.0)
    design = design.double() * unit.unsqueeze(-1)
    by = model.offset(eta, data)
    mean = loc if by is None else loc + by.double()
    residual = (observed.reshape(constant.shape).double() - constant.double()) * unit
    moved = mean.unsqueeze(-1) if by is None else mean[:, None, :, None]
    residual = residual - (design @ moved).squeeze(-1)
    design = root.transposed(design)
    log_scale = torch.where(mask, spread.log(), 0.0).sum((-2, -1))
    outputs = constant.shape[-1]
    return Standardised(
        design.flatten(1, 2), residual.flatten(1), log_scale, (count * outputs).to(loc)
    )


def design_of(model: TaskModel, eta: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The columns by which the output moves with a task's weights, and what it is at 0.

    `(tasks, points, outputs, D)` and `(tasks, points, outputs)`, of x `(tasks, points, ...)`.
    """
    assert model.net is not None
    net, names, values = model.net, model.weights.names, _others(model, eta, x)
    return torch.func.vmap(lambda one: columns(net, names, values, one))(x)


def features_of(model: TaskModel, eta: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the layer whose weights vary is given for x `(tasks, points, ...)`.

    `(tasks, points, inputs)`.
    """
    assert model.net is not None
    net, names, values = model.net, model.weights.names, _others(model, eta, x)
    return torch.func.vmap(lambda one: given_to(net, names, values, one))(x)


def _others(model: TaskModel, eta: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What of the network does not vary, by name."""
    assert model.net is not None
    # the body runs in the data's dtype, also where eta is widened for the algebra
    kind = x.dtype if x.is_floating_point() else None
    values = {name: eta[name].to(kind or eta[name].dtype) for name in model.shared}
    return values | constants(model.net, model.constants, x)


def _prior(model: TaskModel, eta: Mapping[str, Tensor]) -> tuple[Tensor, Root]:
    """`prior_parts` in float64."""
    return prior_parts(model, {name: value.double() for name, value in eta.items()})
