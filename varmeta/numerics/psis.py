"""Pareto smoothed importance sampling: weights whose largest are replaced by quantiles of a fitted tail, and k-hat.

Source: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, JMLR 25 (2024); the fit of the tail:
Zhang and Stephens, A new and efficient estimation method for the generalized Pareto distribution, Technometrics 51 (2009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Fewer tail weights than this say nothing about the tail.
MIN_TAIL = 5


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Smoothed, normalised log weights `(draws,)` and k-hat.

    The largest min(draws / 5, 3 sqrt(draws)) weights are replaced by the quantiles of a generalised Pareto distribution that
    is fitted to them, none above the largest raw weight.  k-hat below 0.5 good, above 0.7 not to be trusted.  Weights that are
    all but equal, or tails of fewer than five, are left alone: k-hat is -inf where the weights do not vary, else NaN.

    Raises ValueError for weights that are not `(draws,)`, hold NaN or +inf, or are all 0.

    >>> weights, k = psis(torch.zeros(100))
    >>> bool(torch.allclose(weights.exp().sum(), torch.tensor(1.0))), k
    (True, -inf)
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ValueError(f"log_weights must have the shape (draws,), not {tuple(log_weights.shape)}")
    if bool((log_weights.isnan() | log_weights.isposinf()).any()) or bool(log_weights.isneginf().all()):
        raise ValueError("log_weights hold NaN or +inf, or are all -inf: look at the densities that they come from")
    weights = log_weights.double() - log_weights.double().max()
    if float(weights[weights.isfinite()].min()) > -1e-10 and bool(weights.isfinite().all()):
        return (weights - weights.logsumexp(0)).to(log_weights), -math.inf
    number = len(weights)
    tail = int(min(math.ceil(0.2 * number), math.ceil(3.0 * math.sqrt(number)), number - 1))
    order = weights.argsort()
    largest = order[number - tail :]
    cut = max(float(weights[order[number - tail - 1]]), math.log(torch.finfo(torch.float64).tiny))
    excess = weights[largest].exp() - math.exp(cut)
    excess, largest = excess[excess > 0], largest[excess > 0]
    if len(excess) < MIN_TAIL:
        return (weights - weights.logsumexp(0)).to(log_weights), math.nan
    k, sigma = fit_generalised_pareto(excess)
    if math.isfinite(k):
        probability = (torch.arange(len(excess), dtype=torch.float64) + 0.5) / len(excess)
        quantile = -sigma * (-probability).log1p() if k == 0 else sigma * torch.expm1(-k * (-probability).log1p()) / k
        smooth = (quantile.to(weights) + math.exp(cut)).log()
        weights = weights.index_copy(0, largest, smooth.clamp(max=0.0))
    return (weights - weights.logsumexp(0)).to(log_weights), k


def fit_generalised_pareto(excess: Tensor) -> tuple[float, float]:
    """Shape k and scale sigma of the generalised Pareto distribution of positive numbers in rising order, `(n,)`.

    Zhang and Stephens' posterior mean, with k drawn towards 0.5 as by ten more observations.

    >>> u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    >>> k, sigma = fit_generalised_pareto(((1 - u) ** -0.4 - 1) / 0.4)  # quantiles at k = 0.4, sigma = 1
    >>> round(k, 2), round(sigma, 2)
    (0.4, 1.0)
    """
    x, n = excess.double(), len(excess)
    grid = 30 + int(math.sqrt(n))
    index = torch.arange(1, grid + 1, dtype=torch.float64, device=x.device)
    quartile = x[int(n / 4 + 0.5) - 1]
    theta = 1 / x[-1] + (1 - (grid / (index - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * x).mean(1)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    share = (log_likelihood - log_likelihood.max()).exp()
    share = share / share.sum()
    share = torch.where(share >= 10 * torch.finfo(torch.float64).eps, share, 0.0)
    best = (theta * share).sum() / share.sum()
    shape = float(torch.log1p(-best * x).mean())
    sigma = -shape / float(best)
    return (n * shape + 10 * 0.5) / (n + 10), sigma
