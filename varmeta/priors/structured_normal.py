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

    @abstractmethod
    def transposed(self, v: Tensor) -> Tensor:
        """A' v for vectors v `(..., D)`."""

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
