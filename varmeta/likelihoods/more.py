"""Likelihoods with learned numbers of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.likelihoods.base import Likelihood, LocationScale, _not_count, _positive

CONCENTRATION, GAPS = "log_concentration", "log_gaps"


class LogNormal(LocationScale):
    """log y = out + scale * N(0, 1), for y > 0 with a constant coefficient of variation; `scale` is that of log y."""

    real_valued = False  # a shift would leave the support

    def noise(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.LogNormal(loc, scale)

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return y <= 0, "a positive number"


class NegativeBinomial(Likelihood):
    """y a count with mean m = exp(out) and variance m + m^2 / concentration: counts that vary more than Poisson's.

    concentration: > 0, learned from where it starts (as `log_concentration`), or fixed with `learn_concentration=False`; at
        infinity the counts are Poisson's.

    >>> d = NegativeBinomial(2.0, learn_concentration=False).distribution(torch.tensor(3.0).log(), {})
    >>> d.mean, d.variance
    (tensor(3.0000), tensor(7.5000))
    """

    kind = "count"

    def __init__(self, concentration: float = 1.0, learn_concentration: bool = True) -> None:
        self.concentration = _positive("concentration", concentration)
        self.learn_concentration = bool(learn_concentration)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {CONCENTRATION: like.new_tensor(math.log(self.concentration))} if self.learn_concentration else {}

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"concentration": eta[CONCENTRATION].exp()} if self.learn_concentration else {}

    def distribution(self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None) -> dist.TorchDistribution:
        r = eta[CONCENTRATION].exp() if self.learn_concentration else out.new_tensor(self.concentration)
        # a gamma mixture of Poissons; torch's NegativeBinomial writes into its log density, which a graph cannot hold
        return _GammaPoisson(r.expand(out.shape), r * (-out).exp())

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return _not_count(y), "a count 0, 1, 2, ..."


class _GammaPoisson(dist.GammaPoisson):
    """Pyro's, with a density whose derivatives stay exact as the concentration c grows.

    Differences of lgamma lose as many digits as c has; beyond 1e7 their second derivative is noise, and the fit of counts that
    vary no more than Poisson's never ends.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        c, y = self.concentration, value
        mean = c / self.rate
        return _log_rising(c, y) - (y + 1).lgamma() + torch.xlogy(y, mean) - (c + y) * (mean / c).log1p()


def _log_rising(c: Tensor, y: Tensor) -> Tensor:
    """log Gamma(c + y) - log Gamma(c) - y log c; beyond c = 30 the difference of Stirling's two series (DLMF 5.11.1)."""

    def series(z: Tensor) -> Tensor:
        w = z.square().reciprocal()
        return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z

    small, large = c.clamp(max=30.0), c.clamp(min=30.0)
    exact = (small + y).lgamma() - small.lgamma() - y * small.log()
    stirling = (large + y - 0.5) * (y / large).log1p() - y + series(large + y) - series(large)
    return torch.where(c > 30.0, stirling, exact)


class Ordinal(Likelihood):
    """y an ordered class 0, ..., C-1: log odds of y > k are out - c_k, with C - 1 learned cutpoints c_0 = 0 < c_1 < ...

    The first cutpoint is 0, since the network's intercept would move with it.  The others are learned by the logarithms of
    their distances (`log_gaps`), which start at 1.  The cumulative logit (proportional odds) model.

    >>> Ordinal(3).distribution(torch.tensor(0.0), {"log_gaps": torch.zeros(1)}).probs
    tensor([0.5000, 0.2311, 0.2689])
    """

    kind = "ordinal"

    def __init__(self, num_classes: int) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be a whole number of at least 2, not {num_classes!r}")
        self.num_classes = num_classes

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {GAPS: like.new_zeros(self.num_classes - 2)} if self.num_classes > 2 else {}

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"cutpoint {k + 1}": c for k, c in enumerate(_free(eta).unbind(-1))} if self.num_classes > 2 else {}

    def cutpoints(self, eta: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """c_0, ..., c_{C-2}, ascending from 0."""
        first = like.new_zeros(1)
        return torch.cat([first, _free(eta)]) if self.num_classes > 2 else first

    def distribution(self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None) -> dist.TorchDistribution:
        at = self.cutpoints(eta, out) - out.unsqueeze(-1)  # y <= k has log odds at_k
        below, above = torch.nn.functional.logsigmoid(at), torch.nn.functional.logsigmoid(-at)
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): no difference of numbers near 1
        between = below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(at[..., :-1] - at[..., 1:]))
        return dist.Categorical(logits=torch.cat([below[..., :1], between, above[..., -1:]], -1))

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return _not_count(y) | (y >= self.num_classes), f"an ordered class 0, ..., {self.num_classes - 1}"


def _free(eta: Mapping[str, Tensor]) -> Tensor:
    """The cutpoints after the first, from the logarithms of their distances."""
    return eta[GAPS].exp().cumsum(-1)
