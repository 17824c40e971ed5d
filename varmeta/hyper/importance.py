"""From the Gaussian of eta to draws of its posterior: smoothed weights, and further tries.

Importance weights are smoothed; a second and a third try reach for the tails.

The first proposals come from the Gaussian itself, so that their k-hat says how near it is.  Where
it is not near enough, Student's t with the moments that the weights found join in, and all draws
are weighted against the mixture of what they were drawn from (deterministic mixture weights).

Source: Cornuet, Marin, Mira and Robert, Adaptive multiple importance sampling, Scand. J. Statistics
39 (2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.numerics.quadrature import normal_points
from varmeta.posteriors.psis import smooth

# Degrees of freedom of the t proposals, and what their covariances are multiplied by, round by
# round: heavy and wide enough for the exponential tails that a log sd has.
DEGREES = 4.0
WIDTHS = (1.0, 2.0) * 6
# The Gaussian's draws are enough where this share of them is effective and the tail is light; with
# two ts, where as many as ENOUGH are effective and the tail is no worse than BAD_K.
GOOD_SHARE, GOOD_K, BAD_K, ENOUGH = 0.9, 0.5, 0.7, 400.0


@dataclass(frozen=True)
class Weighted:
    """Points `(N, size)` with normalised log weights `(N,)`.

    pareto_k: of the Gaussian's own draws; final_k: of all draws against the mixture; ess: effective
        number of draws.
    log_evidence: log of the integral of the unnormalised density, with its standard error.
    """

    points: Tensor
    log_weights: Tensor
    pareto_k: float
    final_k: float
    ess: float
    log_evidence: float
    evidence_error: float

    def resampled(self, number: int, seed: int) -> Tensor:
        """Rows of `points`, `(number,)`, each about number times its weight.

        By systematic resampling.
        """
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        at = (torch.arange(number, dtype=torch.float64) + uniform) / number
        steps = self.log_weights.double().exp().cumsum(0).cpu()
        return torch.searchsorted(steps / steps[-1], at).clamp(max=len(steps) - 1)


@dataclass(frozen=True)
class _Proposal:
    """Student's t, or with degrees = inf a Gaussian, with a location `(size,)` and a lower factor
    over the free coordinates.
    """

    mean: Tensor
    factor: Tensor  # (size, free)
    degrees: float

    def draw(self, number: int, seed: int) -> Tensor:
        free = self.factor.shape[1]
        # one more coordinate of the sequence makes the chi-square
        both = normal_points((number + 1) // 2, free + 1, seed)
        z = both[:, :-1]
        if math.isfinite(self.degrees):
            chi = (
                2.0
                * _gamma_quantile(torch.special.ndtr(both[:, -1]), 0.5 * self.degrees)
                / self.degrees
            )
            z = z / chi.sqrt()[:, None]
        # mirror images: where all weights agree, the mean is exact
        return self.mean + torch.cat([z, -z]).to(self.mean) @ self.factor.mT

    def log_prob(self, points: Tensor) -> Tensor:
        """Density with respect to the coordinates that it moves, `(N,)`."""
        free = self.factor.shape[1]
        rows = self.factor.abs().sum(1) > 0
        square = self.factor[rows]
        offset = (points - self.mean)[:, rows].mT
        z: Tensor = torch.linalg.solve_triangular(square, offset, upper=False).mT
        log_det = square.diagonal().abs().log().sum()
        q = z.square().sum(-1)
        if math.isinf(self.degrees):
            return -0.5 * q - 0.5 * free * math.log(2 * math.pi) - log_det
        nu = self.degrees
        constant = (
            math.lgamma(0.5 * (nu + free))
            - math.lgamma(0.5 * nu)
            - 0.5 * free * math.log(nu * math.pi)
        )
        return constant - log_det - 0.5 * (nu + free) * (q / nu).log1p()


def _gamma_quantile(uniform: Tensor, shape: float) -> Tensor:
    """Quantiles of Gamma(shape, 1) by bisection on torch's regularised incomplete gamma
    function.
    """
    low, high = torch.zeros_like(uniform), torch.full_like(uniform, shape + 60.0)
    a = torch.full_like(uniform, shape)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = torch.special.gammainc(a, middle) < uniform
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (0.5 * (low + high)).clamp(min=1e-12)


def exact(mean: Tensor, factor: Tensor, log_evidence: float, number: int, seed: int) -> Weighted:
    """Draws of the Gaussian where it is the posterior itself, all of the same weight."""
    free = factor.abs().sum(1) > 0
    points = _Proposal(mean, factor[:, free], math.inf).draw(number, seed)
    equal = points.new_full((len(points),), -math.log(len(points)))
    return Weighted(points, equal, -math.inf, -math.inf, len(points), log_evidence, 0.0)


def importance(
    log_density: Callable[[Tensor], Tensor], mean: Tensor, factor: Tensor, number: int, seed: int
) -> Weighted:
    """Weighted draws of exp(log_density(points)) over the coordinates that the factor moves.

    log_density: of rows `(N, size)`, `(N,)`; -inf where there is none.  number: draws per round.
    """
    free = factor.abs().sum(1) > 0
    proposals = [_Proposal(mean, factor[:, free], math.inf)]
    points = proposals[0].draw(number, seed)
    target = _finite(log_density(points))
    log_q = proposals[0].log_prob(points)
    log_weights, own_k = _smooth(target - log_q)
    final_k, raw = own_k, target - log_q
    for round_, width in enumerate(WIDTHS):
        # a t joins in unless the Gaussian is all but right, and another where the tail is heavy
        # still
        if (round_ == 0 and own_k <= GOOD_K and _ess(log_weights) >= GOOD_SHARE * number) or (
            round_ >= 2 and final_k <= BAD_K and _ess(log_weights) >= ENOUGH
        ):
            break
        weight = log_weights.exp()[:, None]
        centre = (weight * points).sum(0)
        offset = (points - centre)[:, free]
        covariance = (weight * offset).mT @ offset
        # never narrower than a tenth of what the family found: a few large weights make no
        # covariance
        floor = 0.01 * torch.diag((factor @ factor.mT).diagonal()[free])
        scale = torch.linalg.cholesky(width * covariance + floor)
        wide = torch.zeros_like(factor[:, free])
        wide[free] = scale
        proposals.append(_Proposal(centre, wide, DEGREES))
        new = proposals[-1].draw(number, seed + 1 + round_)
        points, target = torch.cat([points, new]), torch.cat([target, _finite(log_density(new))])
        mixture = torch.stack([proposal.log_prob(points) for proposal in proposals])
        raw = target - (mixture.logsumexp(0) - math.log(len(proposals)))
        log_weights, final_k = _smooth(raw)
    largest = raw.max()
    ratio = (raw - largest).exp()
    evidence = float(largest + ratio.mean().log())
    error = float(ratio.std() / ratio.mean()) / math.sqrt(len(ratio))
    return Weighted(points, log_weights, own_k, final_k, _ess(log_weights), evidence, error)


def _smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto smoothed, normalised, and k-hat; of `(N,)`."""
    if not bool(log_weights.isfinite().any()):
        raise ValueError(
            "no draw of eta has a finite density: look at the hyperpriors, which may exclude where "
            "the fit is"
        )
    smoothed, k = smooth(log_weights.detach().cpu().numpy()[None])
    return torch.from_numpy(smoothed[0]).to(log_weights), float(k[0])


def _finite(log_density: Tensor) -> Tensor:
    return torch.where(log_density.isnan() | log_density.isposinf(), -math.inf, log_density)


def _ess(log_weights: Tensor) -> float:
    return float(1.0 / (2.0 * log_weights).exp().sum())
