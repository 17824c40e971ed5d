"""Generalised least squares of what enters linearly: theta0, shared parameters, coefficients.

A quadratic H `(P, P)` of v = (minus the whitened coordinates of all that is linear, 1) says what
some tasks know of them: v' H v is s^2 times the squared residual in units of their covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.numerics.triangular import cholesky


@dataclass(frozen=True)
class FreePlaces:
    """Those F of the P - 1 linear parameters that are learned; float64.

    into: `(P, F + 1)`, from the F free coordinates, and 1, to v.
    whitening, origin: as in `ReducedTasks`.
    """

    into: Tensor
    whitening: Tensor
    origin: Tensor

    @classmethod
    def of(cls, whitening: Tensor, origin: Tensor, free: Tensor, values: Tensor) -> FreePlaces:
        """free `(P - 1,)`: which are learned.  values `(P - 1,)`: of those that are held."""
        size = len(whitening)
        if bool(free.all()):  # any basis of them will do
            return cls(torch.eye(size + 1, dtype=whitening.dtype), whitening, origin)
        held = torch.where(free, 0.0, values)
        top = torch.cat([-whitening[:, free], (origin - whitening @ held).unsqueeze(-1)], -1)
        into = torch.cat([top, torch.eye(top.shape[1], dtype=whitening.dtype)[-1:]])
        return cls(into, whitening, origin)

    @property
    def are_white(self) -> bool:
        """Whether the free coordinates are the whitened ones, no parameter being held.

        Else they are the parameters themselves.
        """
        return len(self.into) == self.into.shape[1]

    def quadratic(self, of: Tensor) -> Tensor:
        """H in the free coordinates and 1, `(F + 1, F + 1)`."""
        return self.into.mT @ of @ self.into

    def root(self, quadratic: Tensor) -> Tensor:
        """Cholesky's factor of it: its last entry, squared, is the least of v' H v."""
        return cholesky(self.quadratic(quadratic))

    def best(self, quadratic: Tensor) -> Tensor:
        """v `(P,)` at the least of v' H v."""
        free = self._least(quadratic)
        return self.into @ torch.cat([free, free.new_ones(1)])

    def best_values(self, quadratic: Tensor) -> Tensor:
        """The parameters there, `(F,)`, in their own units."""
        free = self._least(quadratic)
        if not self.are_white:
            return free
        white = (self.origin - free).unsqueeze(-1)
        found: Tensor = torch.linalg.solve_triangular(self.whitening, white, upper=True)
        return found[:, 0]

    def _least(self, quadratic: Tensor) -> Tensor:
        """The free coordinates there; also where nothing is left of a fit, so that H is singular.

        Nothing is inverted, so that no more digits go than must.
        """
        inner = self.quadratic(quadratic)
        root = cholesky(inner[:-1, :-1])
        along = torch.linalg.solve_triangular(root, inner[:-1, -1:], upper=False)
        found: Tensor = -torch.linalg.solve_triangular(root.mT, along, upper=True)
        return found[:, 0]

    def inverse(self, quadratic: Tensor) -> Tensor:
        """Of H in the free coordinates alone, `(F, F)`."""
        found: Tensor = torch.cholesky_inverse(cholesky(self.quadratic(quadratic)[:-1, :-1]))
        return found

    def covariance(self, quadratic: Tensor, scale: Tensor) -> Tensor:
        """Of the parameters at the least, `(F, F)`, in their own units; scale: s."""
        inner = self.quadratic(quadratic)[:-1, :-1]
        root = cholesky(inner) / scale
        r = self.whitening
        back = torch.linalg.inv(r).mT if self.are_white else torch.eye(len(inner)).to(r)
        half = torch.linalg.solve_triangular(root, back, upper=False)
        found: Tensor = half.mT @ half
        return found

    def log_volume(self, root: Tensor) -> Tensor:
        """log det of `root` `(F + 1, F + 1)` but its last pivot, in the parameters' own units."""
        found = root.diagonal()[:-1].log().sum()
        return found + self.whitening.diagonal().log().sum() if self.are_white else found

    def known(self, some: Tensor, every: Tensor) -> Tensor:
        """The pivots of H of some tasks in units of that of every task, squared, `(F + 1,)`.

        NaN where rounding makes it indefinite.
        """
        unit = self.quadratic(every).diagonal(dim1=-2, dim2=-1).rsqrt()
        root = cholesky(unit.unsqueeze(-1) * self.quadratic(some) * unit.unsqueeze(-2))
        return root.diagonal(dim1=-2, dim2=-1).square()
