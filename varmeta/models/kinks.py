"""Likelihoods whose curvature sits in kinks, where no second derivative sees it.

A Laplace density's sits at its middle.

By the fundamental theorem the change of a slope along a path is the integral of the curvature on
the way.  Automatic differentiation knows the curvature between the kinks only, so what is missing
of the change sits in kinks; and Newton's method, implicit gradients and Laplace's approximation go
wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import SITE
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Batch

# The share of the change of slope that may be missing: quadrature and float32 leave less, kinks
# more.
MISSING = 0.1
# The path: so many scales to either side of the middle, with an even number of nodes, none of them
# in the middle.
SCALES, NODES = 4.0, 48


def kinked(model: TaskModel, batch: Batch, eta: Mapping[str, Tensor]) -> str | None:
    """The name of an observed density of one real number with a kink in that number.

    None where there is none.

    Looked at along y, so that of a program too it says what the density is, whatever its parameters
    are made of.  A kink in a parameter alone (a network of ReLUs, `pyro.factor`) is not looked for.
    """
    if model.likelihood is not None and type(model.likelihood).__module__.startswith("varmeta."):
        return None  # all of ours are smooth
    data = batch.support
    if not data.width:
        return None
    few = data.take(data.num_points.argmax().reshape(1))
    try:
        with validation_enabled(False), torch.no_grad():
            nodes = poutine.trace(model).get_trace(eta, few).nodes
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # a program that is not in order: `check` says it better
        return None
    for name, site in nodes.items():
        fn = site.get("fn")
        while isinstance(
            fn, (torch.distributions.Independent, pyro.distributions.MaskedDistribution)
        ):
            fn = fn.base_dist
        if site["type"] != "sample" or not site["is_observed"] or name == SITE or fn is None:
            continue
        if _misses_curvature(fn):
            return type(fn).__name__
    return None


def _misses_curvature(fn: Any) -> bool:
    try:
        if fn.event_shape or fn.support is not torch.distributions.constraints.real:
            return False
        with torch.no_grad():
            middle = fn.loc if hasattr(fn, "loc") else fn.mean
            scale = fn.scale if hasattr(fn, "scale") else fn.stddev
            middle, scale = torch.broadcast_tensors(middle, scale)
        at, weight = (
            torch.from_numpy(part).to(middle) for part in np.polynomial.legendre.leggauss(NODES)
        )
        shape = (-1, *(1,) * middle.dim())
        ends = torch.tensor([-1.0, 1.0]).to(middle)
        path = (
            (middle + SCALES * scale * torch.cat([at, ends]).reshape(shape))
            .detach()
            .requires_grad_()
        )
        with validation_enabled(False), torch.enable_grad():
            (slope,) = torch.autograd.grad(fn.log_prob(path).sum(), path, create_graph=True)
            curvature = torch.zeros_like(path)
            if slope.requires_grad:
                (curvature,) = torch.autograd.grad(slope.sum(), path, materialize_grads=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError):
        return False
    slope = slope.detach()
    change = slope[-1] - slope[-2]
    seen = SCALES * scale * (weight.reshape(shape) * curvature[:-2]).sum(0)
    # along the path the slope also turns back (a Student's t), so the largest is what a change is
    # measured by
    missing = (change - seen).abs() > MISSING * slope.abs().amax(0)
    return bool((missing & change.isfinite() & seen.isfinite()).any())
