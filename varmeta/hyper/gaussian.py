"""A Gaussian of eta, and the nodes of the cubature that takes expectations under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.hyper.coordinates import Coordinates
from varmeta.numerics.rows import rowwise
from varmeta.numerics.solution import Result
from varmeta.priors.factors import unit_lower

# Times that the Gaussian's scale may be narrowed, by half a unit of its logarithm, where it starts.
_NARROWER = 8


@dataclass(frozen=True)
class Gaussian:
    """mean `(size,)` and lower factor `(size, size)` in the coordinates; rows of zeros are points.

    bound: on -log p(y), nats (of the hyperpriors up to their constants).
    """

    mean: Tensor
    factor: Tensor
    bound: float
    result: Result

    @classmethod
    def lost(cls, point: Tensor, result: Result) -> Gaussian:
        """Where a search for the mode ended badly: a point, of no bound."""
        return cls(point, point.new_zeros(len(point), len(point)), math.nan, result)


class Nodes:
    """(m, L) of the Gaussian, and its nodes.

    (m, L) are in units in which L is the identity where the Gaussian is that of the curvature
    `hessian` `(size, size)` at `point`.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        penalty: Callable[[Mapping[str, Tensor]], Tensor],
        point: Mapping[str, Tensor],
        hessian: Tensor,
        free: Tensor,
        diagonal: bool,
    ) -> None:
        self.coordinates, self._penalty = coordinates, penalty
        self.centre = coordinates.vector(point)
        self.white = _whiten(hessian, free, diagonal)
        self.index, self.size = free.nonzero().flatten().to(self.white.device), len(free)
        self.count = len(self.index)
        axes = math.sqrt(self.count) * torch.eye(self.count).to(self.white)
        self.standard = torch.cat([axes, -axes])  # (K, count)
        self.start = {
            "mean": torch.zeros(self.size).to(axes),
            "log_scale": torch.zeros(self.count).to(axes),
        }
        if not diagonal and self.count > 1:
            self.start["tril"] = torch.zeros(self.count * (self.count - 1) // 2).to(axes)

    def __len__(self) -> int:
        return len(self.standard)

    def narrower(self) -> Iterator[dict[str, Tensor]]:
        """(m, L) to start from, each narrower than the one before.

        A curvature is no width where the loss is not quadratic, and a hyperprior's support may end
        between the nodes.
        """
        for times in range(_NARROWER + 1):
            yield self.start | {"log_scale": self.start["log_scale"] - 0.5 * times}

    def begin(self, bound: Callable[[dict[str, Tensor]], float]) -> tuple[dict[str, Tensor], float]:
        """(m, L) narrower than the curvature says as long as that helps the bound, and the bound.

        Infinite where no bound is finite.
        """
        best, value = self.start, math.inf
        for parameters in self.narrower():
            here = bound(parameters)
            if here < value and math.isfinite(here):
                best, value = parameters, here
            elif math.isfinite(value):
                break
        return best, value

    def factor(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """L in these units."""
        diagonal = torch.diag_embed(parameters["log_scale"].exp())
        return (
            diagonal @ unit_lower(parameters["tril"], self.count)
            if "tril" in parameters
            else diagonal
        )

    def points(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Coordinates at the nodes, `(K, size)`."""
        moved = self.standard @ self.factor(parameters).mT
        spread = torch.zeros(len(moved), self.size).to(moved).index_copy(1, self.index, moved)
        return self.centre + (parameters["mean"] + spread) @ self.white.mT

    def eta(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """eta at the nodes, `(K, ...)`."""
        return self.coordinates.eta_of(self.points(parameters))

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """-E_q log p(eta) - H[q], up to what does not depend on (m, L)."""
        density = rowwise(lambda vector: self._penalty(self.coordinates.named(vector)))
        return density(self.points(parameters)).mean() - parameters["log_scale"].sum()

    @property
    def entropy(self) -> float:
        """Of the Gaussian with L the identity."""
        return 0.5 * self.count * (1 + math.log(2 * math.pi)) + float(
            self.white.diagonal()[self.index].log().sum()
        )

    def gaussian(self, parameters: Mapping[str, Tensor], loss: float, result: Result) -> Gaussian:
        """In the coordinates' own units; loss: the expectation plus `penalty`."""
        factor, at = torch.zeros_like(self.white), (self.index[:, None], self.index)
        factor[at] = self.white[at] @ self.factor(parameters)
        mean = self.centre + self.white @ parameters["mean"]
        return Gaussian(mean, factor, loss - self.entropy, result)


def _whiten(hessian: Tensor, free: Tensor, diagonal: bool) -> Tensor:
    """W, lower triangular, with W' H W near the identity on the free coordinates, and a scale for
    each of the others.
    """
    free = free.to(hessian.device)
    size = hessian.diagonal().abs().clamp(min=1e-12)
    unit = size.rsqrt()
    white = torch.diag(unit)
    index = free.nonzero().flatten()
    if diagonal or not len(index):
        return white
    block = (unit[:, None] * hessian * unit)[index[:, None], index]
    values, vectors = torch.linalg.eigh(block)
    covariance = (vectors / values.abs().clamp(min=1e-6)) @ vectors.mT
    white[index[:, None], index] = unit[index][:, None] * torch.linalg.cholesky(covariance)
    return white
