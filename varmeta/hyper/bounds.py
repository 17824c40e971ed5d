"""Coordinates without edges for what a hyperprior's support bounds.

A density that rises to the edge of its support has its mode there: no Newton step leads on, and
no Gaussian fits.  In coordinates that put the edge at infinity the same density falls on both
sides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from varmeta.likelihoods.base import SCALE
from varmeta.models.model import TaskModel
from varmeta.priors.factors import PRECISION, TRIL
from varmeta.priors.hyperprior import edges, in_dtype

# The nearest to an edge that a start may be: a share of the width, or of 1 where there is one edge.
_NEAREST = 1e-6
_F64 = torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True)
class Bounds:
    """Numbers strictly between low and high, and their coordinates.

    low and high are infinite or a tensor's entries.  Far from an edge the coordinates are the
    numbers themselves.
    """

    low: Tensor
    high: Tensor

    def _kinds(self, like: Tensor) -> tuple[Tensor, ...]:
        """Low, high, middle and half the width, with harmless numbers where there are none."""
        low, high = self.low.to(like), self.high.to(like)
        both = low.isfinite() & high.isfinite()
        middle = torch.where(both, 0.5 * (low + high), 0.0)
        half = torch.where(both, 0.5 * (high - low), 1.0)
        return low, high, both, middle, half

    def value(self, u: Tensor) -> Tensor:
        """The numbers at coordinates u."""
        low, high, both, middle, half = self._kinds(u)
        found = torch.where(both, middle + half * torch.tanh((u - middle) / half), u)
        above, below = low.isfinite() & ~both, high.isfinite() & ~both
        low, high = torch.where(above, low, 0.0), torch.where(below, high, 0.0)
        found = torch.where(above, low + softplus(u - low), found)
        return torch.where(below, high - softplus(high - u), found)

    def coordinate(self, value: Tensor) -> Tensor:
        """The inverse; a number at an edge or beyond it is taken a little inside."""
        low, high, both, middle, half = self._kinds(value)
        share = ((value - middle) / half).clamp(_NEAREST - 1.0, 1.0 - _NEAREST)
        found = torch.where(both, middle + half * torch.atanh(share), value)
        above, below = low.isfinite() & ~both, high.isfinite() & ~both
        low, high = torch.where(above, low, 0.0), torch.where(below, high, 0.0)
        found = torch.where(above, low + _unsoftplus(value - low), found)
        return torch.where(below, high - _unsoftplus(high - value), found)

    def log_slope(self, u: Tensor) -> Tensor:
        """log |d value / d u|, summed."""
        low, high, both, middle, half = self._kinds(u)
        w = ((u - middle) / half).abs()
        found = torch.where(both, -2.0 * (w + softplus(-2.0 * w)) + 2.0 * math.log(2.0), 0.0)
        above, below = low.isfinite() & ~both, high.isfinite() & ~both
        low, high = torch.where(above, low, 0.0), torch.where(below, high, 0.0)
        found = torch.where(above, -softplus(low - u), found)
        return torch.where(below, -softplus(u - high), found).sum()


def _unsoftplus(y: Tensor) -> Tensor:
    y = y.clamp(min=_NEAREST)
    return y + torch.log(-torch.expm1(-y))


def bounds(model: TaskModel, shapes: Mapping[str, torch.Size]) -> dict[str, Bounds]:
    """The bounds of those entries of eta whose hyperpriors have edges.

    In the units of `Coordinates`: log sds, log scales, all else as it is.
    """
    found = {name: _bounds(model, name, shape, TRIL in shapes) for name, shape in shapes.items()}
    return {
        name: Bounds(low, high)
        for name, (low, high) in found.items()
        if bool((low.isfinite() | high.isfinite()).any())
    }


def _bounds(
    model: TaskModel, name: str, shape: torch.Size, correlated: bool
) -> tuple[Tensor, Tensor]:
    prior, of_loc = model.prior, model.prior.loc_hyperprior
    if name.partition(".")[0] == PRECISION:
        if prior.hyperprior is not None:
            # with correlations it is a density of other numbers than the coordinates
            given = None if correlated else prior.hyperprior
            high, low = (-0.5 * end for end in _logs(given, name[len(PRECISION) + 1 :], shape))
            return low, high
        given = prior.scale_hyperprior
        if name == PRECISION and shape and isinstance(given, Mapping):  # each weight's own
            each = [_logs(given, key, size) for key, size in model.weights.shapes.items()]
            low, high = (
                torch.cat([end.reshape(-1) for end in ends]) for ends in zip(*each, strict=True)
            )
            return low, high
        return _logs(given, name[len(PRECISION) + 1 :], shape)
    if name == SCALE and name not in model.start:
        return _logs(getattr(model.likelihood, "scale_hyperprior", None), name, shape)
    is_loc = name in model.start and (isinstance(of_loc, Mapping) or name in model.weights.names)
    return _ends(of_loc if is_loc else None, name, shape)


def _ends(hyperprior: Any, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """`edges` of what a hyperprior says of `name`, in its shape."""
    one = hyperprior.get(name) if isinstance(hyperprior, Mapping) else hyperprior
    low, high = (
        (torch.tensor(-torch.inf), torch.tensor(torch.inf))
        if one is None
        else edges(in_dtype(one, _F64))
    )
    if max(low.numel(), high.numel()) == 1:  # whatever its shape
        low, high = low.reshape(()), high.reshape(())
    return low.expand(shape), high.expand(shape)


def _logs(hyperprior: Any, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The logarithms of `_ends`, of what is positive by itself."""
    low, high = _ends(hyperprior, name, shape)
    return low.clamp(min=0.0).log(), high.log()


def check_support(model: TaskModel, eta: Mapping[str, Tensor]) -> None:
    """Raises ValueError where the hyperpriors' density at eta is 0, which no step leads out of."""
    if bool(torch.as_tensor(model.penalty(eta)) < torch.inf):
        return
    what = []
    for name, one in bounds(model, {name: value.shape for name, value in eta.items()}).items():
        is_sd = name.partition(".")[0] == PRECISION
        value = -0.5 * eta[name] if is_sd else eta[name]
        if bool(((value <= one.low.to(value)) | (value >= one.high.to(value))).any()):
            what.append("a sd" if is_sd else name)
    raise ValueError(
        f"the hyperpriors' density is 0 where the fit starts{', for ' * bool(what)}"
        f"{' and '.join(what)}: start inside its support, by GaussianPrior(loc=..., "
        "precision=...), the likelihood's scale or tensors in params, or take a density without "
        "edges"
    )
