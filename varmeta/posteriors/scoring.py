"""How `Posterior.score` judges observations: exactly where that is known, else by draws."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from varmeta.posteriors import metrics, mixture_score
from varmeta.posteriors.normal_mixture import in_order, predictive, responses
from varmeta.posteriors.observer import Observer
from varmeta.tasks import Data

Row = Callable[[slice], dict[str, float]]
"""From some observations, of all that are no padding in order, to the table's row of them."""


def by_task(data: Data) -> list[slice]:
    """Where every task's observations stand among all that are no padding."""
    counts = data.num_points
    ends = counts.cumsum(0)
    begins = (ends - counts).tolist()
    return [slice(begin, end) for begin, end in zip(begins, ends.tolist(), strict=True)]


def table(
    observer: Observer, data: Data, num_samples: int, seed: int, level: float
) -> dict[str, np.ndarray]:
    """The table's columns: an entry for each task that has observations, and one for all of them.

    data: some of which are observations.
    """
    exact = normal_predictive(observer, data)
    if exact is not None:
        y = responses(observer.model, data).to(exact[0])
        own = metrics.normal_by_task(*exact, y, data.num_points, level)
        whole = metrics.normal(*exact, y, level)
        return {name: np.append(own[name].cpu().numpy(), value) for name, value in whole.items()}
    row = row_of(observer, data, num_samples, seed, level)
    rows = [
        row(some)
        for some in (*by_task(data), slice(None))
        if some.start != some.stop or some == slice(None)
    ]
    return {name: np.array([found[name] for found in rows]) for name in rows[0]}


def row_of(observer: Observer, data: Data, num_samples: int, seed: int, level: float) -> Row:
    """How each row of the table is made; what all of them share is worked out now."""
    exact = normal_predictive(observer, data)
    if exact is not None:
        mean, covariance = exact
        y = responses(observer.model, data).to(mean)

        return lambda some: metrics.normal(mean[some], covariance[some], y[some], level)
    components = observer.q.components()
    if components is not None:
        return mixture_score.row_of(observer.model, components, data, level)
    found = observer.evaluate(data, num_samples, seed, sampled=None)
    is_point, mask = observer.q.is_point, data.mask
    log_prob, observed = found.log_prob[:, mask], found.y[mask]
    if found.probs is not None:
        probs = found.probs[mask]
        return lambda some: metrics.classes(
            log_prob[:, some], probs[some], observed[some], is_point
        )
    assert found.samples is not None
    samples = found.samples[:, mask]
    mean_of_draws = None if found.mean is None else found.mean.mean(0)[mask]

    def numbers(some: slice) -> dict[str, float]:
        one = None if mean_of_draws is None else mean_of_draws[some]
        return metrics.numbers(
            log_prob[:, some], samples[:, some], observed[some], level, one, is_point
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
    rows, *parts = zip(*predictive(q.model, one, data, has_y=True), strict=True)
    mean, covariance = (in_order(rows, part, 1)[0] for part in parts)
    return mean, covariance
