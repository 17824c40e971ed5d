"""Classes by least squares: fitted as a regression of +-1 targets, judged as probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import counted, whole_number
from varmeta.likelihoods.base import Likelihood, not_count, positive
from varmeta.likelihoods.continuous import Gaussian
from varmeta.likelihoods.discrete import Categorical

TEMPERATURE = "log_temperature"


class LeastSquaresClasses(Gaussian):
    """y a class 0, ..., C-1 (integers), learned within a task by least squares.

    The network puts out C numbers, C = `num_classes`.  A task's weights are fitted to its support
    by Gaussian regression, target = out + scale * N(0, 1), the target 1 for the class of a row and
    -1 for the others.  So `ClosedForm` serves where the output is linear in the weights: under a
    delta guide it is ridge regression, of penalty scale^2 times the prior's precision.  New
    observations are classes: p(y = k | theta) = exp(out_k / temperature) / sum over all classes.
    Under a delta guide out is the regression's prediction (R2-D2); under a Gaussian guide the
    probabilities are averaged over the weights' posterior, so that they are less sure where it is
    wide.

    scale, learn_scale, scale_hyperprior: as of `Gaussian`.
    temperature: > 0, learned from where it starts (as `log_temperature`), or fixed with
        `learn_temperature=False`.  Only rows that the weights were not fitted to can tell it, so
        that a learned one needs a query objective: `vm.Implicit(outer="query")`, whose loss is
        -log p of the query's classes.
    ways: as of `Categorical`: a feature that says how many classes a task has.
    The objective "elbo", and all that is said of it, is of the regression, whose density of targets
        is no density of classes.

    Raises ValueError for fewer than two classes, and for a scale or a temperature that is not
    positive; TypeError for a number of classes that is no whole number.
    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 6.5;
        Bertinetto et al., Meta-learning with differentiable closed-form solvers, ICLR 2019.

    >>> likelihood = LeastSquaresClasses(3, temperature=0.5, learn_temperature=False)
    >>> likelihood.observed(torch.tensor([0, 2])).tolist()
    [[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]]
    >>> likelihood.predictive.distribution(torch.tensor([0.4, 0.0, 0.0]), {}).probs
    tensor([0.5267, 0.2367, 0.2367])
    """

    kind = "classification"

    def __init__(
        self,
        num_classes: int,
        scale: float = 1.0,
        learn_scale: bool = True,
        scale_hyperprior: dist.TorchDistribution | None = None,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = True,
        ways: str | None = None,
    ) -> None:
        super().__init__(scale, learn_scale, scale_hyperprior)
        self.ways = ways
        self.num_classes = whole_number("num_classes", num_classes, 2)
        self.temperature = positive("temperature", temperature)
        self.learn_temperature = bool(learn_temperature)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        own = {TEMPERATURE: like.new_tensor(math.log(self.temperature))}
        return super().init(like) | (own if self.learn_temperature else {})

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {"temperature": eta[TEMPERATURE].exp()} if self.learn_temperature else {}
        return super().learned(eta) | own

    @property
    def predictive(self) -> Likelihood:
        """The classes, given what the network puts out."""
        known = None if self.learn_temperature else self.temperature
        return TemperedCategorical(self.num_classes, known, ways=self.ways)

    @property
    def features(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.predictive.features

    @property
    def only_by_query(self) -> tuple[str, ...]:
        return (TEMPERATURE,) if self.learn_temperature else ()

    def without_query(self) -> LeastSquaresClasses:
        """Temperature and scale stay where they start.

        The scale too: where a task's few rows are fitted exactly, as by itself, it would run to 0.
        """
        return LeastSquaresClasses(
            self.num_classes, self.scale, False,
            temperature=self.temperature, learn_temperature=False, ways=self.ways,
        )  # fmt: skip

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        """Of the targets, batch shape `(..., points)`; out: `(..., points, C)`.

        Raises ValueError where out has another number of channels than there are classes.
        """
        if out.shape[-1] != self.num_classes:
            raise ValueError(
                f"the network puts out {counted(out.shape[-1], 'number')} for a row, but {self!r} "
                f"needs one for each class, {self.num_classes}"
            )
        return super().distribution(out, eta, y)

    def observed(self, y: Tensor) -> Tensor:
        """The targets, +1 for the class and -1 for the others, `(..., C)`."""
        classes = torch.arange(self.num_classes, device=y.device)
        return torch.where(y.unsqueeze(-1) == classes, 1.0, -1.0)

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        support = f"a class 0, ..., {self.num_classes - 1}"
        if y.dim() != 1:
            return torch.ones(len(y), dtype=torch.bool), f"{support}, a single number in each row"
        return not_count(y) | (y >= self.num_classes), support


class TemperedCategorical(Categorical):
    """A `Categorical` whose log probabilities are the network's output over a temperature.

    temperature: None: that of eta.
    """

    def __init__(
        self, num_classes: int, temperature: float | None = None, *, ways: str | None = None
    ) -> None:
        super().__init__(num_classes, ways=ways)
        self.temperature = temperature

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        known = self.temperature
        temperature = eta[TEMPERATURE].exp() if known is None else out.new_tensor(known)
        return super().distribution(out / temperature, eta, y)
