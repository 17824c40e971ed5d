"""How an observation comes from what the network puts out: p(y | network output, eta)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.files.remember import Remembers
from varmeta.priors.hyperprior import check, describe, log_density

# theta0 of a noise scale that each task has of its own must not be read as the scale of all
SCALE, TASK_SCALE = "log_scale", "log_noise"


NOISE_SCALE = "noise scale"  # for people


class Likelihood(Remembers, ABC):
    """p(y | out).

    `out` is the network's output, `(..., points, channels)`; a single channel may be left out.

    A likelihood's own learned numbers live in eta; `init` gives their start.

    Observations are in y's units.  A whole one stands in docs/extend.md.

    >>> from varmeta.likelihoods import Gaussian
    >>> sorted(Gaussian(scale=2.0).init(torch.zeros(())))
    ['log_scale']
    """

    kind = "regression"

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """The likelihood's entries of eta.

        Numbers `()`, or vectors such as cutpoints, in the dtype of `like`, `()`.
        """
        return {}

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it learned, on a scale and under names for people to read.

        Further axes of eta in front stay.

        Each `()`, or in the shape of those axes.
        """
        return {}

    def task_weights(self) -> dict[str, Tensor]:
        """Where the likelihood's own weights, which differ between tasks, start.

        By name, in their shape.
        """
        return {}

    def penalty(self, eta: Mapping[str, Tensor]) -> Tensor | float:
        """-log of the hyperpriors' density at the likelihood's entries of eta.

        0 where there are none.
        """
        return 0.0

    has_hyperprior = False

    # the tasks' features that the distribution depends on: they stand in eta, see `told`
    features: tuple[str, ...] = ()

    @property
    def predictive(self) -> Likelihood:
        """That of new observations, and of the query rows that a fit is judged by.

        Itself, unless a task's weights are fitted by another density (`LeastSquaresClasses`).
        """
        return self

    @property
    def only_by_query(self) -> tuple[str, ...]:
        """The entries of eta that nothing but the query rows can tell."""
        return ()

    def without_query(self) -> Likelihood:
        """The same for a fit without query rows: such entries stay where they start."""
        return self

    @property
    def real_valued(self) -> bool:
        """Whether y may be shifted and scaled.

        So whole numbers in it are numbers, neither classes nor counts.
        """
        return self.kind == "regression"

    @abstractmethod
    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        """The distribution of the observations.

        `y` only for what it says about the design (numbers of trials).

        out: `(..., points, channels)`, or `(..., points)` of one channel; the batch shape is that
            of out, without the channels where they make one observation.

        Raises ValueError for another number of channels than it needs.
        """

    def observed(self, y: Tensor) -> Tensor:
        """The random part of y.

        y: `(..., points)`, with an axis more where a row has several numbers.
        """
        return y

    def weights(self, y: Tensor) -> Tensor | None:
        """How often each observation counts, as the leading axes of y; None: once.

        y: as for `observed`; the weights are `(..., points)`.
        """
        return None

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        """Which observations lie outside the support, and what the support is.

        The former is `(points,)` or `(points, responses)`.
        """
        return torch.zeros(len(y), dtype=torch.bool), "any real number"

    def __repr__(self) -> str:
        shown = {
            key: describe(value) if isinstance(value, dist.TorchDistribution) else value
            for key, value in vars(self).items()
            if value is not None and (key, value) != ("per_task", False)
        }
        inner = ", ".join(f"{key}={value}" for key, value in shown.items())
        return f"{type(self).__name__}({inner})"


def told(name: str) -> str:
    """Where the tasks' feature of that name stands in a distribution's eta, `(tasks,)`."""
    return f"feature.{name}"


def positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, not {value}")
    return float(value)


def not_count(y: Tensor) -> Tensor:
    return (y < 0) | (y != y.floor())


class LocationScale(Likelihood):
    """A location from the network and one scale, fixed, learned, or each task's own.

    A learned one is `log_scale`; several channels are several responses.
    """

    def __init__(
        self,
        scale: float = 1.0,
        learn_scale: bool = True,
        scale_hyperprior: dist.TorchDistribution | None = None,
        *,
        per_task: bool = False,
    ) -> None:
        self.scale = positive("scale", scale)
        if not 1e-150 < self.scale < 1e150:
            raise ValueError(
                f"scale={scale:g} has no square in float64: give y in other units, and so the scale"
            )
        self.learn_scale = bool(learn_scale)
        self.per_task = bool(per_task)
        if per_task and not (learn_scale and scale_hyperprior is None):
            raise ValueError(
                "under per_task=True the scale of each task comes from the prior, as the weight "
                f"{TASK_SCALE!r}: leave out learn_scale and scale_hyperprior, and say what is "
                "known by the GaussianPrior"
            )
        self.scale_hyperprior = check(scale_hyperprior, "scale_hyperprior")
        if scale_hyperprior is not None and not learn_scale:
            raise ValueError(
                "a scale_hyperprior needs a scale that is learned: leave out learn_scale=False"
            )

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return (
            {SCALE: like.new_tensor(math.log(self.scale))}
            if self.learn_scale and not self.per_task
            else {}
        )

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {NOISE_SCALE: eta[SCALE].exp()} if self.learn_scale and not self.per_task else {}

    def task_weights(self) -> dict[str, Tensor]:
        return (
            {TASK_SCALE: torch.tensor(math.log(self.scale), dtype=torch.float64)}
            if self.per_task
            else {}
        )

    @property
    def has_hyperprior(self) -> bool:  # type: ignore[override]
        return self.scale_hyperprior is not None

    def penalty(self, eta: Mapping[str, Tensor]) -> Tensor | float:
        if not self.learn_scale or self.per_task:
            return 0.0
        return -log_density(self.scale_hyperprior, {SCALE: eta[SCALE].exp()})

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        return self.noise(out, self.scale_of(out, eta))

    def scale_of(self, out: Tensor, eta: Mapping[str, Tensor]) -> Tensor:
        """The scale of every observation, in a shape that broadcasts against `out`."""
        if self.per_task:
            scale = eta[TASK_SCALE].exp()  # (..., tasks, 1), or () where it is shared
            return scale.unsqueeze(-1) if 0 < scale.dim() < out.dim() else scale
        return eta[SCALE].exp() if self.learn_scale else out.new_tensor(self.scale)

    def noise(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """The distribution of observations around `loc` with that scale.

        loc: `(..., points)`; scale: what broadcasts against it, in y's units, `()` as a rule.
        """
        return dist.Normal(loc, scale)
