"""Gaussians over theta whose scale A is known by its products, never as a D x D matrix.

The covariance is A A'.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class StructuredNormal(dist.TorchDistribution):
    """N(loc, A A'), A square, of any shape that knows its own products; loc `(..., D)`."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, parts: tuple[Tensor, ...]) -> None:
        # parts: the tensors that make A, each with the batch axes of loc first
        self.loc, self._parts = loc, parts
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    @abstractmethod
    def scaled(self, noise: Tensor) -> Tensor:
        """A z for vectors z `(..., D)`."""

    @abstractmethod
    def whitened(self, offset: Tensor) -> Tensor:
        """A^-1 v for vectors v `(..., D)`."""

    @property
    @abstractmethod
    def log_det(self) -> Tensor:
        """log |det A|, `(...)`."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """The diagonal of A A', `(..., D)`."""

    @abstractmethod
    def squares_in(self, factor: Tensor) -> Tensor:
        """|S^-1 A|^2 summed over all entries, for a lower triangular S `(D, D)`, `(...)`."""

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def scale_matrix(self) -> Tensor:
        """A, `(..., D, D)`: for few weights."""
        size = self.event_shape[0]
        eye = torch.eye(size, dtype=self.loc.dtype, device=self.loc.device)
        # vectors first, so that each batch entry maps all of them
        return self.scaled(eye.reshape(size, *(1,) * len(self.batch_shape), size)).movedim(0, -1)

    @property
    def covariance_matrix(self) -> Tensor:
        """A A', `(..., D, D)`: for few weights."""
        a = self.scale_matrix
        return a @ a.mT

    def log_prob(self, value: Tensor) -> Tensor:
        whitened = self.whitened(value - self.loc)
        size = self.event_shape[0]
        return -0.5 * (whitened.square().sum(-1) + size * math.log(2 * math.pi)) - self.log_det

    # torch's own signature
    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        return self.loc + self.scaled(
            torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> StructuredNormal:
        batch = torch.Size(batch_shape)
        own = len(self.batch_shape)
        parts = tuple(part.expand(batch + part.shape[own:]) for part in self._parts)
        return self._like(self.loc.expand(batch + self.event_shape), parts)

    def moved(self, loc: Tensor) -> StructuredNormal:
        """The same around another location."""
        return self._like(loc, self._parts)

    @abstractmethod
    def _like(self, loc: Tensor, parts: tuple[Tensor, ...]) -> StructuredNormal:
        """Another of the same shape."""


class LowRankNormal(StructuredNormal):
    """N(loc, S Q^-1 S') with a precision Q, diagonal plus low rank, in the units of a scale S.

    Q = diag(1/s) (I + W W') diag(1/s).

    parts: s `(..., D)` and W `(..., D, rank)`.  root: S, `(D,)` where it is diagonal, else lower
    triangular `(D, D)`. With R R' = I + W'W (a `rank` x `rank` Cholesky factor), by Woodbury's
    identity and the determinant lemma

        Q^-1 = diag(s) (I - V'V) diag(s),   V = R^-1 W',   log det Q^-1 = 2 sum log s - 2 log det R,
        A z = S s (z - W R'^-1 (I + R)^-1 W'z)   and   A^-1 v = (I + W (I + R)'^-1 W') (S^-1 v / s)

    (multiply out: A A' = S Q^-1 S' because (I + R - I)(I + R - I)' = I + W'W).  In units of S
    everything costs O(D rank), and is smooth, also where W is 0 or loses rank, as an
    eigendecomposition would not be.
    """

    def __init__(self, loc: Tensor, parts: tuple[Tensor, ...], root: Tensor) -> None:
        super().__init__(loc, parts)
        self.spread, self.factor = parts
        self.root = root
        eye = torch.eye(self.factor.shape[-1], dtype=loc.dtype, device=loc.device)
        # cholesky_ex: a line search may ask for a point that is not finite, which is no error
        self._r: Tensor = torch.linalg.cholesky_ex(eye + self.factor.mT @ self.factor).L
        self._v: Tensor = torch.linalg.solve_triangular(self._r, self.factor.mT, upper=False)

    def scaled(self, noise: Tensor) -> Tensor:
        eye = torch.eye(self._r.shape[-1], dtype=noise.dtype, device=noise.device)
        inner = _solve(eye + self._r, times(self.factor.mT, noise).unsqueeze(-1), upper=False)
        inner = _solve(self._r.mT, inner, upper=True).squeeze(-1)
        z = self.spread * (noise - times(self.factor, inner))
        return self.root * z if self.root.dim() == 1 else z @ self.root.mT

    def whitened(self, offset: Tensor) -> Tensor:
        dense = self.root.dim() == 2
        v = (
            _solve(self.root, offset.unsqueeze(-1), upper=False).squeeze(-1)
            if dense
            else offset / self.root
        )
        v = v / self.spread
        eye = torch.eye(self._r.shape[-1], dtype=v.dtype, device=v.device)
        inner = _solve((eye + self._r).mT, self.factor.mT @ v.unsqueeze(-1), upper=True)
        return v + (self.factor @ inner).squeeze(-1)

    @property
    def log_det(self) -> Tensor:
        scale = self.root if self.root.dim() == 1 else self.root.diagonal()
        return (
            scale.log().sum()
            + self.spread.log().sum(-1)
            - self._r.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )

    @property
    def variance(self) -> Tensor:
        if self.root.dim() == 1:
            return (self.root * self.spread).square() * (1.0 - self._v.square().sum(-2))
        rows = self.root * self.spread.unsqueeze(-2)
        return rows.square().sum(-1) - (rows @ self._v.mT).square().sum(-1)

    def squares_in(self, factor: Tensor) -> Tensor:
        root = torch.diag_embed(self.root) if self.root.dim() == 1 else self.root
        ratio: Tensor = torch.linalg.solve_triangular(factor, root, upper=False)
        m = ratio * self.spread.unsqueeze(-2)
        return m.square().sum((-2, -1)) - (m @ self._v.mT).square().sum((-2, -1))

    def _like(self, loc: Tensor, parts: tuple[Tensor, ...]) -> LowRankNormal:
        return LowRankNormal(loc, parts, self.root)


class BlockNormal(StructuredNormal):
    """N(loc, A A') with A = diag(s) B, dense on the weights `block` `(m,)` alone.

    B is unit lower triangular on those weights and the identity on the others.

    parts: s `(..., D)` and the unit lower triangle `(..., m, m)`.
    """

    def __init__(self, loc: Tensor, parts: tuple[Tensor, ...], block: Tensor) -> None:
        super().__init__(loc, parts)
        self.spread, self.triangle = parts
        self.block = block
        every = torch.arange(loc.shape[-1], device=loc.device)
        outside = torch.ones_like(every, dtype=torch.bool).index_fill(0, block, False)
        # a stable sort, not a mask: shapes do not depend on numbers
        self._rest = torch.argsort(outside.long(), descending=True, stable=True)[
            : len(every) - len(block)
        ]
        self._back = torch.argsort(torch.cat([block, self._rest]))

    def _put(self, block: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([block, rest], -1)[..., self._back]

    def scaled(self, noise: Tensor) -> Tensor:
        own = times(self.triangle, noise[..., self.block])
        rest = noise[..., self._rest]
        return self.spread * self._put(own, rest.expand(*own.shape[:-1], rest.shape[-1]))

    def whitened(self, offset: Tensor) -> Tensor:
        v = offset / self.spread
        own = _solve(self.triangle, v[..., self.block].unsqueeze(-1), upper=False).squeeze(-1)
        return self._put(own, v[..., self._rest])

    @property
    def log_det(self) -> Tensor:
        return self.spread.log().sum(-1)

    @property
    def variance(self) -> Tensor:
        rows = self.triangle.square().sum(-1)
        return self.spread.square() * self._put(rows, torch.ones_like(self.spread[..., self._rest]))

    def squares_in(self, factor: Tensor) -> Tensor:
        return _solve(factor, self.scale_matrix, upper=False).square().sum((-2, -1))

    def _like(self, loc: Tensor, parts: tuple[Tensor, ...]) -> BlockNormal:
        return BlockNormal(loc, parts, self.block)


def times(matrix: Tensor, v: Tensor) -> Tensor:
    """matrix `(..., d, e)` times v `(points, ..., e)` or `(..., e)`, whose axes between broadcast.

    Not `matrix @ v`, which writes every task's matrix once for each point: d^3 numbers a task under
    cubature.
    """
    if v.dim() == matrix.dim():
        return torch.einsum("...de,p...e->p...d", matrix, v)
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def _solve(a: Tensor, b: Tensor, upper: bool) -> Tensor:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x: Tensor = torch.linalg.solve_triangular(
        a.expand(batch + a.shape[-2:]), b.expand(batch + b.shape[-2:]), upper=upper
    )
    return x
