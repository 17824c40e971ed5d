"""Outcomes that a predictor separates: the likelihood rises for ever, without a maximum.

A loss that is convex in the coefficients has no minimum where it falls, or stays, along a direction
d for ever (its recession direction), and which directions these are does not depend on where one
stands.  Random effects do not help: where every row's loss falls along d whatever the task's
weights are, so does their average.
Source: Albert and Anderson, Biometrika 71 (1984), who call it complete and quasi-complete
separation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.fitting.float64 import doubled
from varmeta.fitting.pooled_start import is_regression, pooled_fit, pooled_loss
from varmeta.models.labels import parameter_labels
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.tree import cast, named_parts

if TYPE_CHECKING:
    from varmeta.results.result import Fit

# Of the information that the start has along a direction, the share below which the likelihood has
# saturated; whether it has because there is no maximum, or because events are rare, the loss itself
# tells.
SATURATED = 1e-3
# Of that information, relative to the largest, the share below which columns are collinear.
COLLINEAR = 1e-8
# So far, in units in which one row's information is 1, and by no more nats than this.
FAR, RISE = 10.0, 1e-3
# A coefficient takes part that moves by this share of the one that moves most.
TAKES_PART = 0.1
KINDS = ("binary", "classification", "count", "ordinal")


def separated(fit: Fit) -> dict[str, float]:
    """The coefficients (theta0 or shared) that run to infinity together.

    By readable name, with where the fit left them.
    """
    model = fit.model
    if (
        model.likelihood is None
        or model.likelihood.kind not in KINDS
        or model.is_linear_gaussian  # targets of classes, whose squares keep the weights finite
        or not is_regression(model, fit.tasks, fit.eta)
    ):
        return {}
    batch = doubled(fit.tasks.batch())
    rows = int(batch.support.num_points.sum())
    start = cast(model.init(batch.support.like), torch.float64)
    names = [name for name in model.start if name in start]
    if not names or not rows:
        return {}
    found = pooled_fit(model, batch, start)
    if found is None:
        return {}
    best = found[0]

    def vector(eta: dict[str, Tensor]) -> Tensor:
        return torch.cat([eta[name].detach().reshape(-1) for name in names])

    def named(flat: Tensor) -> dict[str, Tensor]:
        return best | named_parts(flat, {name: start[name] for name in names})

    def loss(flat: Tensor) -> Tensor:
        return pooled_loss(model, batch, named(flat)) + model.penalty(named(flat))

    at = vector(best)
    direction = _direction(loss, at, rows)
    if direction is None:
        return {}
    along, moves = direction
    with torch.no_grad():
        rise = float(loss(at + along) - loss(at))
    if not (math.isfinite(rise) and rise <= RISE):
        return {}
    labels = parameter_labels(model, fit.tasks.x_names)
    every = [label for name in names for label in labels[name]]
    reached = vector(cast(fit.eta, torch.float64)).tolist()
    part = (moves > TAKES_PART * moves.max()).tolist()
    return {label: number for label, number, yes in zip(every, reached, part, strict=True) if yes}


def _direction(
    loss: Callable[[Tensor], Tensor], at: Tensor, rows: int
) -> tuple[Tensor, Tensor] | None:
    """Far out along the directions in which the likelihood has saturated at `at`, and by how much
    each coefficient moves, in units in which its information is 1; None where there are none.
    """
    zero = torch.zeros_like(at)
    before, after = (vector_hessian(loss, point) / rows for point in (zero, at))
    if not bool(before.isfinite().all() and after.isfinite().all()):
        return None
    # in units in which each coefficient alone has information 1 at zero, and without what is
    # collinear there
    unit = before.diagonal().clamp(min=torch.finfo(at.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, None] * before * unit)
    kept = values > COLLINEAR * values[-1]
    if not bool(kept.any()):
        return None
    root = unit[:, None] * (vectors[:, kept] * values[kept].rsqrt())  # root' before root = 1
    share, axes = torch.linalg.eigh(root.mT @ after @ root)
    soft = root @ axes[:, share < SATURATED]
    if not soft.shape[1]:
        return None
    # the part of the way from zero to here that lies where the likelihood has saturated points
    # outwards
    direction = soft @ (soft.mT @ (before @ at))
    size = float((direction @ before @ direction).clamp(min=0).sqrt())
    if not size > 0:
        return None
    direction = direction * (FAR / size)
    return direction, (direction / unit).abs()
