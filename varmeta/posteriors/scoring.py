"""How `Posterior.score` judges observations: exactly where that is known, else by draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varmeta.posteriors import metrics, mixture_score
from varmeta.posteriors.normal_mixture import predictive, responses
from varmeta.posteriors.observer import Observer
from varmeta.tasks import Data

Row = Callable[[Tensor], dict[str, float]]


def row_of(observer: Observer, data: Data, num_samples: int, seed: int, level: float) -> Row:
    """The function from a mask `(tasks, points)` to the table's row of those observations."""
    exact = normal_predictive(observer, data)
    if exact is not None:
        mean, covariance = exact
        y = responses(observer.model, data).to(mean)

        def normal(mask: Tensor) -> dict[str, float]:
            chosen = mask[data.mask]
            return metrics.normal(mean[chosen], covariance[chosen], y[chosen], level)

        return normal
    components = observer.q.components()
    if components is not None:
        return mixture_score.row_of(observer.model, components, data, level)
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
    """Mean and covariance of every observation; None where it is not known to be normal.

    `(n, outputs)` and `(n, outputs, outputs)`, of the n that are no padding.  A mixture over eta is
    not normal.
    """
    q = observer.q
    one = None if q.kind == "integrated" else q.components()
    if one is None:
        return None
    parts = predictive(q.model, one, data, has_y=True)
    mean, covariance = (torch.cat(part, 1)[0] for part in zip(*parts, strict=True))
    return mean, covariance
