"""Classes and counts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import counted
from varmeta.likelihoods.base import Likelihood, not_count, positive, told

CONCENTRATION, GAPS = "log_concentration", "log_gaps"


class Bernoulli(Likelihood):
    """y in {0, 1}; the network puts out the log odds.

    >>> Bernoulli().distribution(torch.tensor([0.0]), {}).mean
    tensor([0.5000])
    """

    kind = "binary"

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        outcome: dist.TorchDistribution = dist.Bernoulli(logits=out)
        return outcome

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return (y != 0) & (y != 1), "0 or 1"


class Categorical(Likelihood):
    """y a class 0, ..., C-1 (integers).

    The network puts out C unnormalised log probabilities, C = `num_classes`.

    ways: the name of a feature of the tasks that says how many classes a task has, 2 to C: the
        others, from that number on, have probability 0 in it.  None: every task has all.

    Raises ValueError for fewer than two classes, TypeError where `ways` is no name.

    >>> likelihood, known = Categorical(3, ways="ways"), {"feature.ways": torch.tensor([2.0, 3.0])}
    >>> likelihood.distribution(torch.zeros(2, 1, 3), known).probs
    tensor([[[0.5000, 0.5000, 0.0000]],
            [[0.3333, 0.3333, 0.3333]]])
    """

    kind = "classification"

    def __init__(self, num_classes: int | None = None, *, ways: str | None = None) -> None:
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        if ways is not None and not isinstance(ways, str):
            raise TypeError(
                f"ways is the name of a feature of the tasks, such as 'ways', not {ways!r}"
            )
        self.num_classes, self.ways = num_classes, ways

    @property
    def features(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.ways is None else (self.ways,)

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        outputs = out.shape[-1]
        if outputs != (self.num_classes or max(2, outputs)):
            raise ValueError(
                f"the network puts out {counted(outputs, 'number')} for a row, but {self!r} needs "
                f"one for each class, {self.num_classes or 'at least 2'}"
            )
        if self.ways is not None:
            ways = eta[told(self.ways)][..., None, None]
            out = out.masked_fill(torch.arange(outputs, device=out.device) >= ways, -math.inf)
        return dist.Categorical(logits=out)

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        bad = not_count(y)
        if self.num_classes is None:
            return bad, "a class 0, 1, 2, ..."
        return bad | (y >= self.num_classes), f"a class 0, ..., {self.num_classes - 1}"


class Poisson(Likelihood):
    """y a count; the network puts out the log rate.

    >>> Poisson().distribution(torch.tensor([2.0]).log(), {}).mean
    tensor([2.])
    """

    kind = "count"

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        return dist.Poisson(out.exp())

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return not_count(y), "a count 0, 1, 2, ..."


class _StableBinomial(dist.Binomial):
    """torch's log density has a kink in its second derivative at log odds of exactly 0, where
    theta0 often starts.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        n, log_odds = self.total_count, self.logits
        coefficient = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        return coefficient + value * log_odds + n * torch.nn.functional.logsigmoid(-log_odds)


class Binomial(Likelihood):
    """y successes out of a number of trials; the network puts out the log odds.

    total_count: the trials of every observation; None where y has two columns, (successes,
        trials).  A prediction without y is then for a single trial.

    Raises ValueError for a total_count below 1.

    >>> Binomial(total_count=10).distribution(torch.tensor([0.0]), {}).mean
    tensor([5.])
    """

    kind = "count"

    def __init__(self, total_count: int | None = None) -> None:
        if total_count is not None and total_count < 1:
            raise ValueError(f"total_count must be at least 1, not {total_count}")
        self.total_count = total_count

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        if self.total_count is not None:
            trials = out.new_tensor(float(self.total_count))
        else:
            trials = out.new_tensor(1.0) if y is None else y[..., 1].to(out)
        return _StableBinomial(total_count=trials, logits=out)

    def observed(self, y: Tensor) -> Tensor:
        return y if self.total_count is not None else y[..., 0]

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        if self.total_count is not None:
            return not_count(y) | (y > self.total_count), f"a count 0, ..., {self.total_count}"
        if y.dim() != 2 or y.shape[-1] != 2:
            return torch.ones(
                len(y), dtype=torch.bool
            ), "two columns (successes, trials), or set total_count"
        bad = not_count(y).any(-1) | (y[:, 0] > y[:, 1])
        return bad, "two columns (successes, trials) with 0 <= successes <= trials"


class NegativeBinomial(Likelihood):
    """y a count with mean m = exp(out) and variance m + m^2 / concentration.

    Counts that vary more than Poisson's.

    concentration: > 0, learned from where it starts (as `log_concentration`), or fixed with
        `learn_concentration=False`; at infinity the counts are Poisson's.

    Raises ValueError for a concentration that is not positive.

    >>> counts = NegativeBinomial(2.0, learn_concentration=False)
    >>> d = counts.distribution(torch.tensor(3.0).log(), {})
    >>> d.mean, d.variance
    (tensor(3.0000), tensor(7.5000))
    """

    kind = "count"

    def __init__(self, concentration: float = 1.0, learn_concentration: bool = True) -> None:
        self.concentration = positive("concentration", concentration)
        self.learn_concentration = bool(learn_concentration)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return (
            {CONCENTRATION: like.new_tensor(math.log(self.concentration))}
            if self.learn_concentration
            else {}
        )

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"concentration": eta[CONCENTRATION].exp()} if self.learn_concentration else {}

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        r = (
            eta[CONCENTRATION].exp()
            if self.learn_concentration
            else out.new_tensor(self.concentration)
        )
        # a gamma mixture of Poissons; torch's NegativeBinomial writes into its log density, which a
        # graph cannot hold
        return _GammaPoisson(r.expand(out.shape), r * (-out).exp())

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return not_count(y), "a count 0, 1, 2, ..."


class _GammaPoisson(dist.GammaPoisson):
    """Pyro's, with a density whose derivatives stay exact as the concentration c grows.

    Differences of lgamma lose as many digits as c has; beyond 1e7 their second derivative is noise,
    and the fit of counts that vary no more than Poisson's never ends.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        c: Tensor = self.concentration
        y = value
        mean: Tensor = c / self.rate
        return (
            _log_rising(c, y)
            - (y + 1).lgamma()
            + torch.xlogy(y, mean)
            - (c + y) * (mean / c).log1p()
        )


def _log_rising(c: Tensor, y: Tensor) -> Tensor:
    """log Gamma(c + y) - log Gamma(c) - y log c; beyond c = 30 the difference of Stirling's two
    series (DLMF 5.11.1).
    """

    def series(z: Tensor) -> Tensor:
        w = z.square().reciprocal()
        return (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w / 1680))) / z

    small, large = c.clamp(max=30.0), c.clamp(min=30.0)
    exact = (small + y).lgamma() - small.lgamma() - y * small.log()
    stirling = (large + y - 0.5) * (y / large).log1p() - y + series(large + y) - series(large)
    return torch.where(c > 30.0, stirling, exact)


class Ordinal(Likelihood):
    """y an ordered class 0, ..., C-1: log odds of y > k are out - c_k.

    The C - 1 cutpoints c_0 = 0 < c_1 < ... are learned.

    The first cutpoint is 0, since the network's intercept would move with it.  The others are
    learned by the logarithms of their distances (`log_gaps`), which start at 1.  The cumulative
    logit (proportional odds) model.

    Raises ValueError for a number of classes that is no whole number of at least 2.

    >>> Ordinal(3).distribution(torch.tensor(0.0), {"log_gaps": torch.zeros(1)}).probs
    tensor([0.5000, 0.2311, 0.2689])
    """

    kind = "ordinal"

    def __init__(self, num_classes: int) -> None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(
                f"num_classes must be a whole number of at least 2, not {num_classes!r}"
            )
        self.num_classes = num_classes

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {GAPS: like.new_zeros(self.num_classes - 2)} if self.num_classes > 2 else {}

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return (
            {f"cutpoint {k + 1}": c for k, c in enumerate(_free(eta).unbind(-1))}
            if self.num_classes > 2
            else {}
        )

    def cutpoints(self, eta: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """c_0, ..., c_{C-2}, ascending from 0.

        `(C - 1,)`, on the scale of log odds, in the dtype of `like`.
        """
        first = like.new_zeros(1)
        return torch.cat([first, _free(eta)]) if self.num_classes > 2 else first

    def distribution(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None = None
    ) -> dist.TorchDistribution:
        at = self.cutpoints(eta, out) - out.unsqueeze(-1)  # y <= k has log odds at_k
        below, above = torch.nn.functional.logsigmoid(at), torch.nn.functional.logsigmoid(-at)
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): no difference of
        # numbers near 1
        between = (
            below[..., 1:] + above[..., :-1] + torch.log(-torch.expm1(at[..., :-1] - at[..., 1:]))
        )
        return dist.Categorical(logits=torch.cat([below[..., :1], between, above[..., -1:]], -1))

    def invalid(self, y: Tensor) -> tuple[Tensor, str]:
        return not_count(y) | (
            y >= self.num_classes
        ), f"an ordered class 0, ..., {self.num_classes - 1}"


def _free(eta: Mapping[str, Tensor]) -> Tensor:
    """The cutpoints after the first, from the logarithms of their distances."""
    return eta[GAPS].exp().cumsum(-1)
