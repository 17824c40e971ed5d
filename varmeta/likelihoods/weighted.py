"""Weights per observation: a likelihood around another one."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.likelihoods.base import Likelihood, LocationScale
from varmeta.likelihoods.continuous import Gaussian
from varmeta.likelihoods.least_squares import LeastSquaresClasses

T = TypeVar("T", bound=type[Likelihood])


def forwarding(cls: T) -> T:
    """Forward to `self.likelihood` every public member that the class does not define.

    `cls` is a likelihood around another one, its attribute `likelihood`.  So a member that
    `Likelihood` gains later is forwarded too, instead of answered by the base class.
    """
    for name, member in vars(Likelihood).items():
        if not name.startswith("_") and name not in vars(cls):
            setattr(cls, name, _method(name) if callable(member) else _attribute(name))
    abc.update_abstractmethods(cls)
    return cls


def _method(name: str) -> Any:
    def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.likelihood, name)(*args, **kwargs)

    forwarded.__name__ = name
    forwarded.__doc__ = getattr(Likelihood, name).__doc__
    return forwarded


def _attribute(name: str) -> property:
    return property(lambda self: getattr(self.likelihood, name))


@forwarding
class Weighted(Likelihood):
    """Another likelihood with a weight w for each observation.

    y has one column more, the weight, last.

    So `from_frame(..., y=["count", "weight"])`.  Weights are positive.  What a weight means:

    precision=False: the observation counts w times, p(y | out)^w, as in brms and in glmer; a weight
        of 2 is the row twice.
    precision=True: the observation is that much more precise, scale^2 / w in the place of scale^2,
        as in lmer, whose variance is sigma^2 / w; a weight of 2 is the mean of two rows.  For
        likelihoods with a scale: Gaussian, StudentT, and LogNormal, where it is the scale of log y.

    Of a Gaussian whose scale is known both say the same of the network's weights; a learned scale,
    and all that hangs on it (priors, standard errors, predictions), differs.  A prediction needs no
    weight: it is of an observation of weight 1.

    Raises TypeError for what is no likelihood, or is Weighted already; ValueError for
    precision=True of one without a scale.

    >>> from varmeta.likelihoods import Poisson
    >>> Weighted(Poisson()).observed(torch.tensor([[3.0, 0.5]]))
    tensor([3.])
    >>> lmer = Weighted(Gaussian(scale=1.0, learn_scale=False), precision=True)
    >>> lmer.distribution(torch.zeros(1), {}, torch.tensor([[3.0, 4.0]])).scale
    tensor([0.5000])
    """

    def __init__(self, likelihood: Likelihood, *, precision: bool = False) -> None:
        if not isinstance(likelihood, Likelihood) or isinstance(likelihood, Weighted):
            raise TypeError(
                "likelihood must be one of varmeta.likelihoods, such as Poisson(), not "
                f"{kind_of(likelihood)}"
            )
        if isinstance(likelihood, LeastSquaresClasses):
            raise TypeError(
                f"{likelihood!r} takes no weights, since a task's rows are fitted as targets and "
                "judged as classes: use Categorical, or repeat the rows"
            )
        self.likelihood = likelihood
        self.precision = bool(precision)
        if self.precision and not isinstance(likelihood, LocationScale):
            raise ValueError(
                f"precision=True divides a squared scale by the weight, and {likelihood!r} has "
                "none: leave it out, so that a weight says how often an observation counts"
            )

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        rest = None if y is None else _without_weight(y)
        if not self.precision or y is None or rest is None:
            return self.likelihood.distribution(out, eta, rest)
        assert isinstance(self.likelihood, LocationScale)
        weight = y[..., -1].to(out)
        weight = (
            weight.unsqueeze(-1) if rest.dim() == y.dim() else weight
        )  # one for all responses of the row
        return self.likelihood.noise(out, self.likelihood.scale_of(out, eta) / weight.sqrt())

    def observed(self, y: Tensor) -> Tensor:
        return self.likelihood.observed(_without_weight(y))

    @property
    def predictive(self) -> Likelihood:
        return self

    def without_query(self) -> Likelihood:
        return self

    def weights(self, y: Tensor) -> Tensor | None:
        return None if self.precision else y[..., -1]

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        if y.dim() != 2 or y.shape[-1] < 2:
            return torch.ones(
                len(y), dtype=torch.bool
            ), "a column more than the response: its weight, last"
        bad, support = self.likelihood.invalid(_without_weight(y))
        bad = bad.any(-1) if bad.dim() > 1 else bad
        return bad | (y[:, -1] <= 0), f"{support}, then a positive weight"

    def __repr__(self) -> str:
        return f"Weighted({self.likelihood!r}{', precision=True' * self.precision})"


def unweighted(likelihood: Likelihood | None) -> Likelihood | None:
    """The likelihood within a `Weighted` one, or itself."""
    return likelihood.likelihood if isinstance(likelihood, Weighted) else likelihood


def is_gaussian(likelihood: Likelihood | None) -> bool:
    """Whether y is known to be Gaussian around the network's output.

    Then p(y | eta) is Gaussian too where the output is linear in the weights.  Likelihood weights
    are not: p^w is no density of y.  Exact classes: a subclass may be anything.
    """
    if type(likelihood) is Weighted and likelihood.precision:
        return is_gaussian(likelihood.likelihood)
    return type(likelihood) in (Gaussian, LeastSquaresClasses)


def _without_weight(y: Tensor) -> Tensor:
    rest = y[..., :-1]
    return rest.squeeze(-1) if rest.shape[-1] == 1 else rest
