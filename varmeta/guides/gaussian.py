"""Gaussians between mean-field and dense, known by the products of their scale: for guides."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.numerics.roots import Root
from varmeta.priors.structured_normal import StructuredNormal


class LowRankNormal(StructuredNormal):
    """N(loc, S Q^-1 S') with a precision Q, diagonal plus low rank, in the units of a scale S.

    Q = diag(1/s) (I + W W') diag(1/s).

    parts: s `(..., D)` and W `(..., D, rank)`.  root: S, by its products. With R R' = I + W'W (a
    `rank` x `rank` Cholesky factor), by Woodbury's identity and the determinant lemma

        Q^-1 = diag(s) (I - V'V) diag(s),   V = R^-1 W',   log det Q^-1 = 2 sum log s - 2 log det R,
        A z = S s (z - W R'^-1 (I + R)^-1 W'z)   and   A^-1 v = (I + W (I + R)'^-1 W') (S^-1 v / s)

    (multiply out: A A' = S Q^-1 S' because (I + R - I)(I + R - I)' = I + W'W).  In units of S
    everything costs O(D rank), and is smooth, also where W is 0 or loses rank, as an
    eigendecomposition would not be.
    """

    def __init__(self, loc: Tensor, parts: tuple[Tensor, ...], root: Root) -> None:
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
        return self.root.times(self.spread * (noise - times(self.factor, inner)))

    def whitened(self, offset: Tensor) -> Tensor:
        v = self.root.solve(offset) / self.spread
        eye = torch.eye(self._r.shape[-1], dtype=v.dtype, device=v.device)
        inner = _solve((eye + self._r).mT, self.factor.mT @ v.unsqueeze(-1), upper=True)
        return v + (self.factor @ inner).squeeze(-1)

    def transposed(self, v: Tensor) -> Tensor:
        v = self.root.transposed(v) * self.spread
        eye = torch.eye(self._r.shape[-1], dtype=v.dtype, device=v.device)
        inner = _solve(self._r, times(self.factor.mT, v).unsqueeze(-1), upper=False)
        inner = _solve((eye + self._r).mT, inner, upper=True).squeeze(-1)
        return v - times(self.factor, inner)

    @property
    def log_det(self) -> Tensor:
        return (
            self.root.log_det
            + self.spread.log().sum(-1)
            - self._r.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        )

    @property
    def variance(self) -> Tensor:
        taken = self.root.times(self.spread.unsqueeze(-2) * self._v).square().sum(-2)
        return self.root.variance(self.spread.square()) - taken

    def squares_in(self, factor: Tensor) -> Tensor:
        ratio: Tensor = torch.linalg.solve_triangular(factor, self.root.matrix, upper=False)
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

    def transposed(self, v: Tensor) -> Tensor:
        v = v * self.spread
        own = times(self.triangle.mT, v[..., self.block])
        rest = v[..., self._rest]
        return self._put(own, rest.expand(*own.shape[:-1], rest.shape[-1]))

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
