"""Beliefs about eta before the data: theta0, the prior's sds or precisions, correlations.

Every density is one of the quantity that it names, whatever numbers eta holds it in: a half-normal
on an sd is a density of that sd.  A maximum under it is then a maximum in those units;
`log_jacobian` turns it into a density of other coordinates.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.priors.validation import validation_enabled

Hyperprior = dist.TorchDistribution | Mapping[str, dist.TorchDistribution] | None


def log_density(hyperprior: Hyperprior, named: Mapping[str, Tensor]) -> Tensor | float:
    """The sum of the log densities of the named values.

    One distribution for all of them, or one by name (flat for the others).
    """
    if hyperprior is None:
        return 0.0
    total: Tensor | float = 0.0
    with validation_enabled(False):  # outside its support a density is 0, which is no error
        for name, value in named.items():
            one = hyperprior.get(name) if isinstance(hyperprior, Mapping) else hyperprior
            if one is not None:
                total = total + _log_prob(in_dtype(one, value), value).sum()
    return total


def _log_prob(one: Any, value: Tensor) -> Tensor:
    # not every density of torch ends where its support does: an exponential one goes on below 0
    density, (low, high) = one.log_prob(value), edges(one)
    return torch.where((value < low) | (value > high), -torch.inf, density)


TRANSFORMED = (torch.distributions.TransformedDistribution, dist.TransformedDistribution)


def edges(distribution: Any) -> tuple[Tensor, Tensor]:
    """Where the support of a distribution over one number ends, infinite where it does not.

    >>> edges(dist.Uniform(0.0, 2.0))
    (tensor(0.), tensor(2.))
    """
    try:
        support = distribution.support
    except NotImplementedError:  # a distribution of one's own need not say
        support = None
    low = torch.as_tensor(getattr(support, "lower_bound", -torch.inf))
    high = torch.as_tensor(getattr(support, "upper_bound", torch.inf))
    # a transform's range is all that torch says of what it makes of a bounded one
    transforms = distribution.transforms if type(distribution) in TRANSFORMED else ()
    if transforms and all(transform.bijective for transform in transforms):
        ends = edges(distribution.base_dist)
        for transform in transforms:
            ends = transform(ends[0]), transform(ends[1])
        low, high = (
            torch.maximum(low, torch.minimum(*ends)),
            torch.minimum(high, torch.maximum(*ends)),
        )
    return low.where(~low.isnan(), -torch.inf), high.where(~high.isnan(), torch.inf)


# Where a tail is looked at, as logarithms of a precision: a maximum beyond the first (an sd of
# 3e-7) would be none of use, and the squares of the last still have their place among floating
# numbers.
TAIL = (30.0, 60.0, 150.0, 300.0)


def outweighs(hyperprior: Any, power: float, gain: float) -> bool:
    """Whether h(lambda^power) lambda^gain falls all along both tails.

    The tails are lambda = infinity and lambda = 0.

    hyperprior: the density h of a precision lambda (power 1) or of a standard deviation
        lambda^(-1/2) (power -1/2).

    >>> outweighs(dist.Gamma(2.0, 1.0), 1.0, 100.0), outweighs(dist.HalfCauchy(1.0), 1.0, 3.0)
    (True, False)
    """
    for side in (1.0, -1.0):
        log_lambda = side * torch.tensor(TAIL, dtype=torch.float64)
        with validation_enabled(False):
            density = in_dtype(hyperprior, log_lambda).log_prob((power * log_lambda).exp())
        total = density + gain * log_lambda
        # -inf: outside the support, or beyond what a tail has left; NaN compares as False
        falls = (total[1:] < total[:-1]) | density[1:].isneginf()
        if not bool(falls.all()):
            return False
    return True


def log_lkj(row_norms: Tensor, concentration: float) -> Tensor:
    """The log of det(R)^(concentration - 1), up to a constant.

    R are the correlations of diag(1 / row_norms) U with U unit lower.
    """
    return -2.0 * (concentration - 1.0) * row_norms.log().sum()


def log_correlation_jacobian(row_norms: Tensor, sizes: Tensor) -> Tensor:
    """log |d R / d U|: of the correlations below the diagonal, with respect to U's entries there.

    With L the Cholesky factor of R and rows counted from 0, |d L_i / d U_i| = r_i^-(i + 2) and
    |d R / d L| = prod_i r_i^-(D - 1 - i), so that both together are prod_i r_i^-(D + 1).
    sizes: D of each weight, `(D,)`, of the block of correlated weights that it is in.
    Source of the second: Lewandowski, Kurowicka and Joe, J. Multivariate Analysis 100 (2009).
    """
    return -((sizes + 1.0) * row_norms.log()).sum()


def check(hyperprior: Any, what: str) -> Any:
    """A distribution, a dict of them, or None.  Raises TypeError for anything else."""
    entries = hyperprior.items() if isinstance(hyperprior, Mapping) else [(None, hyperprior)]
    for name, value in entries:
        if value is not None and not isinstance(value, torch.distributions.Distribution):
            where = "" if name is None else f" of {name!r}"
            raise TypeError(
                f"{what}{where} must be a distribution, such as pyro.distributions.Normal(0., "
                f"10.), not {value!r}"
            )
        if value is not None and value.event_shape:
            raise ValueError(
                f"{what} must be a distribution over one number, not over "
                f"{tuple(value.event_shape)}"
            )
    return dict(hyperprior) if isinstance(hyperprior, Mapping) else hyperprior


def describe(hyperprior: Hyperprior) -> str:
    if isinstance(hyperprior, Mapping):
        return ", ".join(f"{name}: {type(value).__name__}" for name, value in hyperprior.items())
    return type(hyperprior).__name__


def in_dtype(distribution: Any, like: Tensor) -> Any:
    """A copy whose parameters are floating tensors like `like`.

    torch would round its argument to theirs.
    """
    new = copy.copy(distribution)
    for name, value in vars(distribution).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(new, name, value.to(like))
        elif isinstance(value, torch.distributions.Distribution):
            setattr(new, name, in_dtype(value, like))
    return new
