"""Curvatures of several functions at once, in units of their diagonals, by their eigenvalues."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Curvature that rounding may make of none, over the largest.
FLAT = 1e-10


class Curvature(NamedTuple):
    """Symmetric matrices `(T, p, p)` in units of their diagonals.

    unit `(T, p)`; eigenvalues, none of less than what rounding makes, and eigenvectors of the
    scaled matrix; definite `(T,)`: whether none was less.  convex `(T,)`: whether none was below 0
    by more than that.
    """

    unit: Tensor
    values: Tensor
    vectors: Tensor
    definite: Tensor
    convex: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Curvature:
        finite = hessian.isfinite().all(-1).all(-1)
        identity = torch.eye(hessian.shape[-1]).to(hessian)
        hessian = torch.where(finite[:, None, None], 0.5 * (hessian + hessian.mT), identity)
        diagonal = hessian.diagonal(dim1=-2, dim2=-1).abs()
        unit = diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt()
        values, vectors = torch.linalg.eigh(unit.unsqueeze(-1) * hessian * unit.unsqueeze(-2))
        least = FLAT * values.amax(-1, keepdim=True)
        definite, convex = (values > least).all(-1), (values > -least).all(-1)
        held = torch.maximum(values, least)
        return cls(unit, held, vectors, finite & definite, finite & convex)

    def solve(self, vector: Tensor) -> Tensor:
        inner = (self.vectors.mT @ (self.unit * vector).unsqueeze(-1)) / self.values.unsqueeze(-1)
        return self.unit * (self.vectors @ inner).squeeze(-1)

    def spread(self, slope: Tensor) -> Tensor:
        """The standard error of what has this slope `(T, p)`."""
        return (slope * self.solve(slope)).sum(-1).sqrt()
