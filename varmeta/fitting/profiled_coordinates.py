"""The coordinates of the profiled evidence: the covariance relative to the noise, and the noise.

In columns that are white over all rows they have no units (`fitting/reduced.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.fitting.reduced import ReducedTasks
from varmeta.guides.prior_parts import prior_parts
from varmeta.likelihoods.base import SCALE, LocationScale
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import cast
from varmeta.numerics.triangular import lower_root, whitened_columns
from varmeta.priors.factors import PRECISION, together
from varmeta.strategies.strategy import Eta

# The name of those that are the lower triangle of a dense prior's K, row by row.
COVARIANCE = "covariance"
# How small an entry of the covariance's factor, in whitened columns, is told as, against its row
# and against 1: a covariance must have an inverse.  The objective is even in it, so that it rises
# by its square alone.
_FLOOR, _FLOOR_OF_NOISE = 1e-6, 1e-7


class ProfiledCoordinates:
    """What stands for an eta, all in float64.

    "covariance", the lower triangle of K in whitened columns, of a learned dense prior, or of K in
    the whitened columns of each block of weights that are correlated; of others each learned sd
    over s, by the name of its log precision; "log_scale" where s is learned; theta0, shared
    parameters and coefficients by name, where a hyperprior acts on them.
    """

    def __init__(
        self,
        model: TaskModel,
        tasks: ReducedTasks,
        eta: Eta,
        linear: tuple[str, ...],
    ) -> None:
        self.model, self.tasks, self.eta, self.linear = model, tasks, eta, linear
        self.size = model.weights.size
        prior = model.prior
        self.dense = prior.learn_precision == "full"
        self.learns_scale = SCALE in eta
        # a quadratic of their own, where no hyperprior acts on them
        self.profiles_places = prior.loc_hyperprior is None
        self.places = tuple(name for name in (*model.weights.names, *linear) if name in eta)
        self.precisions = () if self.dense else tuple(
            name for name in eta if name.partition(".")[0] == PRECISION
        )  # fmt: skip
        # of the weights that vary
        self.own_whitening = tasks.whitening[: self.size, : self.size]
        self._lower = torch.tril(torch.ones_like(self.own_whitening))
        # each block's columns by themselves: Q `(D, D)`, and R with zeros between blocks
        self._bases, self._own = None, self.own_whitening
        if prior.blocks is not None:
            within = together(prior.blocks, model.weights)
            self._bases, self._own = _whitened_blocks(self.own_whitening, within)
            self._lower = self._lower * within
        # where each entry of the factor stands among the coordinates
        self.entries = tuple(self._lower.nonzero().unbind(-1))
        self._entry = torch.zeros(self.size, self.size, dtype=torch.int64)
        self._entry[self.entries] = torch.arange(len(self.entries[0]))

    def white(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Minus the whitened coordinates of the places, and 1, `(P,)`, at an eta."""
        r = self.tasks.whitening
        linear = [coordinates[name].reshape(-1).to(r) for name in self.linear]
        places = torch.cat([self.model.weights.flatten(coordinates).to(r), *linear])
        return torch.cat([self.tasks.origin - r @ places, r.new_ones(1)])

    def factor(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """K `(D, D)` in whitened columns: any root of the prior's covariance over s^2."""
        if self.dense:
            return self.of_triangle(self.triangle(coordinates))
        if self.precisions:
            # what it makes of log precisions, one for each weight, it makes of sds
            own = self.own_whitening
            return own * self.model.prior.log_precision(self.model.weights, coordinates, own)
        return self.own_whitening @ self._given * torch.exp(-self.log_scale(coordinates))

    def triangle(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """The lower triangle `(D, D)` that stands for K of a learned dense prior."""
        return coordinates[COVARIANCE][self._entry] * self._lower

    def of_triangle(self, triangle: Tensor) -> Tensor:
        """K `(D, D)` from that."""
        return triangle if self._bases is None else self._bases @ triangle

    @property
    def _given(self) -> Tensor:
        """A root of a covariance that is not learned, `(D, D)`, in the weights' units."""
        eta = cast(self.eta, torch.float64)
        return prior_parts(self.model, eta)[1].matrix

    def log_scale(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """log s, `()`, in y's units."""
        if self.learns_scale:
            return coordinates[SCALE]
        inner = unweighted(self.model.likelihood)
        assert isinstance(inner, LocationScale)  # it is Gaussian
        return self.tasks.origin.new_tensor(math.log(inner.scale))

    def enter(self, eta: Eta) -> dict[str, Tensor]:
        """The coordinates of eta, of what is not profiled."""
        wide = cast(eta, torch.float64)
        found = {name: wide[name] for name in self.places if not self.profiles_places}
        scale = self.log_scale(wide).exp()
        if self.dense:
            root = self._own @ self.model.prior_distribution(wide).scale_tril
            found[COVARIANCE] = lower_root(root)[self.entries] / scale
        found |= {name: torch.exp(-0.5 * wide[name]) / scale for name in self.precisions}
        return found | ({SCALE: wide[SCALE]} if self.learns_scale else {})

    def least_sds(self) -> dict[str, Tensor]:
        """How small each learned sd over s is told as, in the units of the weights it is of."""
        zero = {name: torch.zeros_like(self.eta[name]).double() for name in self.precisions}
        found = {}
        for name, value in zero.items():
            # how far an sd of 1 moves a row; of several weights under one sd the farthest
            reach = [
                self.factor({**zero, name: one.reshape(value.shape)}).norm(dim=0).amax()
                for one in torch.eye(value.numel()).to(value)
            ]
            found[name] = _FLOOR_OF_NOISE / torch.stack(reach).reshape(value.shape)
        return found


def _whitened_blocks(own: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of each block's columns of the whitening `(D, D)`, in their places; 0 between blocks.

    within: whether two weights are in one block, `(D, D)`.
    """
    bases, triangles = torch.zeros_like(own), torch.zeros_like(own)
    for block in within.unique(dim=0):
        at = block.nonzero()[:, 0]
        known = whitened_columns(own[:, at])
        assert known is not None  # all columns together have full rank
        bases[:, at] = known[0]
        triangles[at.unsqueeze(-1), at] = known[1]
    return bases, triangles


def least_entries(factor: Tensor) -> Tensor:
    """How small the diagonal of K's triangle `(D, D)` is told as, `(D,)`."""
    found: Tensor = (_FLOOR * factor.norm(dim=-1)).clamp(min=_FLOOR_OF_NOISE)
    return found
