"""The prior of a few shared directions: N(theta0, diag(s)^2 + F F'), for any number of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.numerics.roots import LowRankRoot
from varmeta.priors.structured_normal import StructuredNormal


class FactorNormal(StructuredNormal):
    """N(loc, A A') with a low-rank root A; loc `(..., D)`, one root for all of them.

    >>> root = LowRankRoot(torch.ones(3), torch.ones(3, 1))
    >>> FactorNormal(torch.zeros(3), root).stddev
    tensor([1.4142, 1.4142, 1.4142])
    """

    def __init__(self, loc: Tensor, root: LowRankRoot) -> None:
        # not among the parts, which `expand` copies for every task
        super().__init__(loc, ())
        self.root = root

    def scaled(self, noise: Tensor) -> Tensor:
        return self.root.times(noise)

    def whitened(self, offset: Tensor) -> Tensor:
        return self.root.solve(offset)

    def transposed(self, v: Tensor) -> Tensor:
        return self.root.transposed(v)

    @property
    def log_det(self) -> Tensor:
        return self.root.log_det

    @property
    def variance(self) -> Tensor:
        return self.root.variances.expand(self.loc.shape)

    @property
    def scale_matrix(self) -> Tensor:
        """The lower triangular root of the covariance, `(D, D)`, which dense guides start from."""
        return self.root.lower

    @property
    def covariance_matrix(self) -> Tensor:
        """`(D, D)`: for few weights."""
        columns = self.root.columns
        return torch.diag_embed(self.root.spread.square()) + columns @ columns.mT

    def of(self, some: Tensor) -> FactorNormal:
        """The marginal of the weights at the positions `some` `(m,)`."""
        root = LowRankRoot(self.root.spread[some], self.root.factor[some])
        return FactorNormal(self.loc[..., some], root)

    def squares_in(self, factor: Tensor) -> Tensor:
        ratio: Tensor = torch.linalg.solve_triangular(factor, self.root.matrix, upper=False)
        return ratio.square().sum((-2, -1))

    def _like(self, loc: Tensor, parts: tuple[Tensor, ...]) -> FactorNormal:
        return FactorNormal(loc, self.root)
