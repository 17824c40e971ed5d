"""Guides between mean-field and dense: a few directions, or one dense block of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.guides.dense import Dense
from varmeta.guides.gaussian import BlockNormal, LowRankNormal
from varmeta.guides.guide import BoundGuide, copies, sample
from varmeta.guides.kl import location, root_of
from varmeta.models.model import TaskModel
from varmeta.models.start import matches
from varmeta.numerics.tree import Tree
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.factors import first_trapezoid, trapezoid, trapezoid_entries, unit_lower
from varmeta.tasks import Data

# At the start: the length of each column of W, whose gradient vanishes at exactly 0, and what the
# data add to the diagonal.
LENGTH, ADDED = 0.3, 0.05


@dataclass(frozen=True, repr=False)
class LowRank(BoundGuide):
    """q_i = N(loc_i, S Q_i^-1 S') with a precision Q_i, diagonal plus low rank.

    S S' is the prior's covariance, and Q = I + diag(e^a) + C C' with C `(D, rank)`.

    rank: columns of C; None: the root of D, rounded.  n observations raise the precision of a
        linear model along n directions at most, so that a rank of n is exact there.  Where C would
        have as many numbers as a dense covariance (up to 4 weights at rank 2, 8 at rank 5), the
        guide is the dense one.

    Diagonal plus low rank is the *precision*, in the prior's units, not the covariance as in Pyro's
    AutoLowRankMultivariateNormal, because data add precision to the prior's.  It never falls below
    the prior's: without that bound the best diagonal often lies at 0, at infinity of what is
    optimised (a Heywood case of factor analysis, seen on small networks).  Entries of C above its
    diagonal are 0, or rotations of its columns would be the same guide.
    Memory per task: D (rank + 2) numbers.  It starts near the prior: the same mean, sds up to a
        tenth smaller.
    Source: Mishkin et al., SLANG (NeurIPS 2018), for a precision of this kind.

    Raises ValueError for a rank below 1.

    >>> import varmeta as vm
    >>> vm.Joint(LowRank(rank=3)).describe()
    'Joint(low_rank(rank=3), outer=elbo)'
    """

    rank: int | None = None

    name = "low_rank"
    is_point = False

    def __post_init__(self) -> None:
        if self.rank is not None:
            whole_number("rank", self.rank)

    def __repr__(self) -> str:
        return self.name if self.rank is None else f"{self.name}(rank={self.rank})"

    def _columns(self, size: int) -> int:
        """Of C; 0 where the dense guide takes its place."""
        rank = min(size, self.rank or round(math.sqrt(size)))
        return rank if trapezoid_entries(size, rank) < size * (size - 1) // 2 else 0

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        mean = location(model.prior_distribution(eta))
        size = len(mean)
        rank = self._columns(size)
        if not rank:
            return Dense().init(model, eta, data)
        added = torch.full_like(mean, math.log(ADDED))
        factor = (LENGTH * first_trapezoid(size, rank)).to(mean)
        return {
            "loc": copies(mean, data),
            "log_added": copies(added, data),
            "factor": copies(factor, data),
        }

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        if "factor" not in phi:
            return Dense()(phi, eta, data)
        size = phi["loc"].shape[-1]
        factor = trapezoid(phi["factor"], size, self._columns(size))
        spread = (1.0 + phi["log_added"].exp()).rsqrt()
        root = root_of(self.model.prior_distribution(eta))
        parts = spread.unsqueeze(-2), (spread.unsqueeze(-1) * factor).unsqueeze(-3)
        return sample(LowRankNormal(phi["loc"].unsqueeze(-2), parts, root))


@dataclass(frozen=True, repr=False)
class Structured(BoundGuide):
    """Dense over the weights of one module or parameter, mean-field over the others.

    q_i = N(loc_i, A_i A_i').

    dense: patterns of parameter names, such as ("head.*",); the weights that they match are
        correlated with each other.
    Memory per task: 2 D + m (m - 1) / 2 numbers for m weights that match.

    Raises TypeError for what is no list of patterns; ValueError for a pattern that matches nothing.

    >>> import varmeta as vm
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))
    >>> model = vm.TaskModel(net, vm.likelihoods.Gaussian())
    >>> guide = Structured(dense=("2.*",))  # the last layer
    >>> fit = vm.fit(model, vm.datasets.lines(5), vm.Joint(guide), num_steps=2)
    >>> fit.posterior().distribution.event_shape
    torch.Size([28])
    """

    dense: tuple[str, ...] = ()

    name = "structured"
    is_point = False

    def __post_init__(self) -> None:
        if isinstance(self.dense, str) or not all(
            isinstance(pattern, str) for pattern in self.dense
        ):
            raise TypeError(
                f"dense must be a list of patterns, such as ('head.*',), not {self.dense!r}"
            )
        if not self.dense:
            raise ValueError(
                "dense is empty: name a module, such as ('head.*',), or use guide='normal'"
            )
        object.__setattr__(self, "dense", tuple(self.dense))

    def __repr__(self) -> str:
        return f"{self.name}(dense={', '.join(self.dense)})"

    def bound(self, model: TaskModel) -> Structured:
        names = model.weights.names
        for pattern in self.dense:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"dense={pattern!r} matches none of the weights that vary, {sorted(names)}"
                )
        return super().bound(model)

    def _block(self, like: Tensor) -> Tensor:
        """Positions of the dense weights in theta, `(m,)`."""
        weights = self.model.weights
        flags: list[bool] = []
        for name, size in zip(weights.names, weights.sizes, strict=True):
            flags += [any(matches(name, pattern) for pattern in self.dense)] * size
        return torch.tensor([i for i, flag in enumerate(flags) if flag], device=like.device)

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        prior = model.prior_distribution(eta)
        block = self._block(prior.mean)
        rows, columns = torch.tril_indices(len(block), len(block), -1)
        spread, tril = prior.stddev, prior.mean.new_zeros(len(rows))
        if isinstance(prior, dist.MultivariateNormal | FactorNormal):
            factor = (
                prior.of(block).scale_matrix
                if isinstance(prior, FactorNormal)
                else torch.linalg.cholesky_ex(prior.covariance_matrix[block][:, block]).L
            )
            own = factor.diagonal()
            spread, tril = (
                spread.index_copy(0, block, own),
                (factor / own.unsqueeze(-1))[rows, columns],
            )
        phi = {"loc": copies(prior.mean, data), "log_scale": copies(spread.log(), data)}
        return phi | {"tril": copies(tril, data)} if len(rows) else phi

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        block = self._block(phi["loc"])
        entries = phi["tril"] if "tril" in phi else phi["loc"].new_zeros(len(data), 0)
        triangle = unit_lower(entries, len(block))
        parts = phi["log_scale"].exp().unsqueeze(-2), triangle.unsqueeze(-3)
        return sample(BlockNormal(phi["loc"].unsqueeze(-2), parts, block))
