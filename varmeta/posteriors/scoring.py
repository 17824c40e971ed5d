"""How `Posterior.score` judges observations: exactly where that is known, else by draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varmeta.guides.kl import location, scale
from varmeta.models.pyro_program import observed_site
from varmeta.posteriors import metrics
from varmeta.posteriors.observer import Observer
from varmeta.tasks import Data

Row = Callable[[Tensor], dict[str, float]]

# Weights up to which the variance of a linear output is added up direction by direction, each a
# pass through the network.
MAX_EXACT_SIZE = 200


def row_of(observer: Observer, data: Data, num_samples: int, seed: int, level: float) -> Row:
    """The function from a mask `(tasks, points)` to the table's row of those observations."""
    exact = normal_predictive(observer, data)
    if exact is not None:
        mean, sd = exact
        assert observer.model.likelihood is not None  # a program is not known to be normal
        y = observer.model.likelihood.observed(data.y)  # without a column of weights
        return lambda mask: metrics.normal(mean[mask], sd[mask], y[mask].to(mean), level)
    found = observer.evaluate(data, num_samples, seed, sampled=None)
    is_point = observer.q.is_point
    if found.probs is not None:
        probs = found.probs
        return lambda mask: metrics.classes(
            found.log_prob[:, mask], probs[:, mask], found.y[mask], level, is_point
        )
    samples, means = found.samples, found.mean
    assert samples is not None

    def numbers(mask: Tensor) -> dict[str, float]:
        mean = None if means is None else means[:, mask].mean(0)
        return metrics.numbers(
            found.log_prob[:, mask], samples[:, mask], found.y[mask], level, mean, is_point
        )

    return numbers


def normal_predictive(observer: Observer, data: Data) -> tuple[Tensor, Tensor] | None:
    """Mean and sd of every observation, `(tasks, points)` each, where it is normal.

    None where it is not known to be.

    The output f is affine in the weights, theta ~ N(m, L L') and y ~ N(f, s^2); so y ~ N(f(m), s^2
    + |f(m + L) - f(m)|^2), with f taken at m plus each column of L.  A mixture over eta is not
    normal.
    """
    q, model = observer.q, observer.model
    if (
        q.kind == "integrated"
        or not model.is_linear_gaussian
        or model.weights.size > MAX_EXACT_SIZE
    ):
        return None
    posterior = q.distribution
    centre, factor = location(posterior).unsqueeze(0), scale(posterior)
    theta = centre
    if factor is not None:
        columns = torch.diag_embed(factor) if factor.dim() == centre.dim() - 1 else factor
        theta = torch.cat([centre, centre + columns.movedim(-1, 0)])
    mean = variance = None
    with observer.stream(0, data) as stream:
        for trace in observer.traces(theta, data, data.filled[1], stream):
            fn = observed_site(trace)["fn"]
            if fn.event_shape:
                return None
            if mean is None:  # the first is at m itself
                mean, variance = fn.mean[0], fn.variance[0]
            variance = variance + (fn.mean - mean).square().sum(0)
    assert mean is not None and variance is not None
    return mean, variance.sqrt()
