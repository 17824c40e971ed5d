"""Observations that are real numbers around the network's output."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from varmeta.likelihoods.base import LocationScale, positive


class Gaussian(LocationScale):
    """y = out + scale * N(0, 1).

    `scale` (in y's units) is learned from where it starts, or fixed with `learn_scale=False`.

    Several responses share the scale: bring them to one (`TaskSet.standardized`), or write a Pyro
        program with `to_event(1)`.

    scale_hyperprior: a distribution over the scale, such as `pyro.distributions.HalfNormal(1.)`;
        flat where left out.
    per_task: each task has a scale of its own, whose logarithm is a weight `log_noise` of the task,
        drawn from the prior as its other weights are; `scale` is where its theta0 starts.

    Raises ValueError for a scale that is not positive, and for per_task with learn_scale=False or a
    scale_hyperprior.

    >>> Gaussian(scale=0.5, learn_scale=False)
    Gaussian(scale=0.5, learn_scale=False)
    """


class StudentT(LocationScale):
    """y = out + scale * t(df), for data with outliers.

    `df` > 0 is fixed; per_task as of `Gaussian`.

    Raises ValueError for a `df` or a scale that is not positive.

    >>> import torch
    >>> StudentT(df=3.0, scale=2.0, learn_scale=False).distribution(torch.zeros(4), {}).batch_shape
    torch.Size([4])
    """

    def __init__(
        self,
        df: float = 4.0,
        scale: float = 1.0,
        learn_scale: bool = True,
        scale_hyperprior: dist.TorchDistribution | None = None,
        *,
        per_task: bool = False,
    ) -> None:
        super().__init__(scale, learn_scale, scale_hyperprior, per_task=per_task)
        self.df = positive("df", df)

    def noise(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        noise: dist.TorchDistribution = dist.StudentT(loc.new_tensor(self.df), loc, scale)
        return noise


class LogNormal(LocationScale):
    """log y = out + scale * N(0, 1), for y > 0 with a constant coefficient of variation.

    `scale` is that of log y.

    >>> import torch
    >>> d = LogNormal(scale=0.1, learn_scale=False).distribution(torch.zeros(1), {})
    >>> d.mean.round(decimals=3)  # exp(0.1^2 / 2)
    tensor([1.0050])
    """

    real_valued = False  # a shift would leave the support

    def noise(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.LogNormal(loc, scale)

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return y <= 0, "a positive number"
