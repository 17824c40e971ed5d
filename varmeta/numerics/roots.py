"""Square roots A of a covariance, S = A A', by their products: vectors in, vectors out.

A Gaussian's points are m + A z, its density is that of A^-1 (theta - m), and rows of a design in
its units are A' x; so nothing else need be known of A.  Of a diagonal and of a low-rank covariance
it is never written down.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from varmeta.numerics.triangular import cholesky, lower_root


class Root(ABC):
    """A, `(D, D)`, with A A' = S.  Vectors are `(..., D)`."""

    @abstractmethod
    def times(self, z: Tensor) -> Tensor:
        """A z."""

    @abstractmethod
    def transposed(self, v: Tensor) -> Tensor:
        """A' v."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """A^-1 v."""

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """log |det A|, `()`."""

    @abstractmethod
    def variance(self, of: Tensor) -> Tensor:
        """The diagonal of A diag(of) A', of variances `(..., D)`."""

    @property
    @abstractmethod
    def matrix(self) -> Tensor:
        """A itself, `(D, D)`: for few weights."""

    @property
    def lower(self) -> Tensor:
        """The lower triangular root of the same S, `(D, D)`: for few weights."""
        return self.matrix

    def lower_times(self, factor: Tensor) -> Tensor:
        """The lower triangular root of A G G' A', of lower triangles G `(..., D, D)`."""
        return self.matrix @ factor


class DiagonalRoot(Root):
    """A = diag(s)."""

    def __init__(self, sd: Tensor) -> None:
        self.sd = sd

    def times(self, z: Tensor) -> Tensor:
        return self.sd * z

    def transposed(self, v: Tensor) -> Tensor:
        return v * self.sd

    def solve(self, v: Tensor) -> Tensor:
        return v / self.sd

    @property
    def log_det(self) -> Tensor:
        return self.sd.log().sum()

    def variance(self, of: Tensor) -> Tensor:
        return self.sd.square() * of

    @property
    def matrix(self) -> Tensor:
        return torch.diag_embed(self.sd)


class TriangularRoot(Root):
    """A lower triangular."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def times(self, z: Tensor) -> Tensor:
        return z @ self.factor.mT

    def transposed(self, v: Tensor) -> Tensor:
        return v @ self.factor

    def solve(self, v: Tensor) -> Tensor:
        columns = v.unsqueeze(-1)
        factor = self.factor.expand(*columns.shape[:-2], *self.factor.shape)
        found: Tensor = torch.linalg.solve_triangular(factor, columns, upper=False)
        return found.squeeze(-1)

    @property
    def log_det(self) -> Tensor:
        return self.factor.diagonal().log().sum()

    def variance(self, of: Tensor) -> Tensor:
        return of @ self.factor.square().mT

    @property
    def matrix(self) -> Tensor:
        return self.factor


class LowRankRoot(Root):
    """A A' = diag(s) (I + W W') diag(s), of s `(D,)` and W `(D, r)`; nothing here is `(D, D)`.

    With R R' = I + W'W, a Cholesky factor `(r, r)`, and K = (I + R)^-1,

        A = diag(s) (I + W K W'),   A^-1 = (I - W K' R^-1 W') diag(1/s),
        log det A = sum log s + log det R,   S^-1 = diag(1/s) (I - V'V) diag(1/s),   V = R^-1 W'

    (multiply out: K + K' + K (R R' - I) K' = I), so that everything costs O(D r).  It is smooth
    where W is 0 or loses rank, as an eigendecomposition would not be.  The last line is Woodbury's
    identity, the one before it the determinant lemma.

    >>> root = LowRankRoot(torch.ones(2), torch.tensor([[1.0], [2.0]]))
    >>> (root.matrix @ root.matrix.mT).round(decimals=4)  # I + W W'
    tensor([[2., 2.],
            [2., 5.]])
    """

    def __init__(self, spread: Tensor, factor: Tensor) -> None:
        self.spread, self.factor = spread, factor
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        self._r: Tensor = cholesky(eye + factor.mT @ factor)
        self._k: Tensor = torch.linalg.solve_triangular(eye + self._r, eye, upper=False)
        self._v: Tensor = torch.linalg.solve_triangular(self._r, factor.mT, upper=False)

    def times(self, z: Tensor) -> Tensor:
        return self.spread * (z + z @ self.factor @ self._k.mT @ self.factor.mT)

    def transposed(self, v: Tensor) -> Tensor:
        v = v * self.spread
        return v + v @ self.factor @ self._k @ self.factor.mT

    def solve(self, v: Tensor) -> Tensor:
        v = v / self.spread
        return v - v @ self._v.mT @ self._k @ self.factor.mT

    @property
    def log_det(self) -> Tensor:
        return self.spread.log().sum() + self._r.diagonal().log().sum()

    def variance(self, of: Tensor) -> Tensor:
        rows = self.factor @ self._k
        own = 1.0 + 2.0 * (rows * self.factor).sum(-1)
        inner = (self.factor.mT * of.unsqueeze(-2)) @ self.factor  # W' diag(of) W, (..., r, r)
        return self.spread.square() * (of * own + ((rows @ inner) * rows).sum(-1))

    @property
    def variances(self) -> Tensor:
        """The diagonal of S, `(D,)`."""
        return self.spread.square() * (1.0 + self.factor.square().sum(-1))

    @property
    def precisions(self) -> Tensor:
        """The diagonal of S^-1, `(D,)`."""
        return (1.0 - self._v.square().sum(-2)) / self.spread.square()

    @property
    def taken(self) -> Tensor:
        """V diag(1/s) `(r, D)`: S^-1 = diag(1/s)^2 less this, transposed, times this."""
        return self._v / self.spread

    @property
    def columns(self) -> Tensor:
        """F = diag(s) W, `(D, r)`: S = diag(s)^2 + F F'."""
        return self.spread.unsqueeze(-1) * self.factor

    @property
    def matrix(self) -> Tensor:
        eye = torch.eye(len(self.spread), dtype=self.spread.dtype, device=self.spread.device)
        return self.times(eye).mT

    def lower_times(self, factor: Tensor) -> Tensor:
        # A is no triangle
        return lower_root(self.times(factor.mT).mT)

    @property
    def lower(self) -> Tensor:
        return lower_root(torch.cat([torch.diag_embed(self.spread), self.columns], -1))
