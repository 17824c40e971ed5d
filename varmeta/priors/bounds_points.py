"""Whether hyperpriors keep points of the tasks' weights from running into their prior."""

from __future__ import annotations

from collections.abc import Mapping

from varmeta.priors import hyperprior as densities
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.priors.weights import Weights


def bounds_points(prior: GaussianPrior, weights: Weights, num_tasks: int) -> bool:
    """Whether the hyperpriors outweigh what points gain from their prior.

    Then a MAP objective has a minimum.

    With all of the n weights under a precision lambda at theta0 (n: those that it governs,
    times tasks), the loss is -n/2 log lambda - log h(lambda) - log p(y | theta0).  It is
    bounded where h(lambda) lambda^(n/2) falls to 0, a sd's density s(sd) where s(sd) sd^-n
    does; at lambda = 0 likewise, which matters where n is 1.  Of "full" the loss is a sum of
    one such term for every marginal sd and one of the correlations R, num_tasks/2 log det R -
    log p(R), so that LKJ's det(R)^(lkj - 1) has to fall faster than det(R)^(num_tasks/2).  Of
    "low_rank", whose R has no density, nothing keeps det R from 0.
    """
    if prior.learn_precision is None:
        return True
    if prior.learn_precision == "low_rank":
        return False
    if (
        prior.learn_precision == "full"
        and weights.size > 1
        and not prior.lkj - 1.0 > 0.5 * num_tasks
    ):
        return False
    counts = _governed(prior, weights)
    given, power = (
        (prior.hyperprior, 1.0) if prior.hyperprior is not None else (prior.scale_hyperprior, -0.5)
    )
    for name, count in counts.items():
        one = given.get(name) if isinstance(given, Mapping) else given
        if one is None or not densities.outweighs(one, power, 0.5 * num_tasks * count):
            return False
    return True


def _governed(prior: GaussianPrior, weights: Weights) -> dict[str, int]:
    """How many weights of a task one learned precision governs, by the names that a dict of
    hyperpriors has.
    """
    if prior.learn_precision == "shared":
        return {"": weights.size}
    if prior.learn_precision != "per_module":  # a precision for every single weight
        return dict.fromkeys(weights.names, 1)
    counts = dict.fromkeys(weights.modules, 0)
    for name, size in zip(weights.names, weights.sizes, strict=True):
        counts[weights.module(name)] += size
    return counts
