"""How `Posterior.score` judges observations: exactly where that is known, else by draws."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varmeta.guides.closed_form import design_of
from varmeta.guides.kl import location, scale
from varmeta.posteriors import metrics
from varmeta.posteriors.draws import Draws
from varmeta.posteriors.observer import Observer
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data

Row = Callable[[Tensor], dict[str, float]]

# Numbers of a design that are held at once.
CELLS = 20_000_000


def row_of(observer: Observer, data: Data, num_samples: int, seed: int, level: float) -> Row:
    """The function from a mask `(tasks, points)` to the table's row of those observations."""
    exact = normal_predictive(observer, data)
    if exact is not None:
        mean, covariance = exact
        assert observer.model.likelihood is not None  # a program is not known to be normal
        # without a column of weights
        y = observer.model.likelihood.observed(data.y).reshape(mean.shape).to(mean)
        return lambda mask: metrics.normal(mean[mask], covariance[mask], y[mask], level)
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

    `(tasks, points, outputs)` and `(tasks, points, outputs, outputs)`.

    The output is X theta + c, theta ~ N(m, L L') and y ~ N(X theta + c, s^2); so y ~ N(X m + c, X L
    L' X' + s^2).  A mixture over eta is not normal.
    """
    q = observer.q
    if q.kind == "integrated" or not q.model.is_linear_gaussian:
        return None
    posterior = q.distribution
    loc, spread = location(posterior), scale(posterior)  # (tasks, 1, D), and sds or a factor
    cells = data.mask.shape[1] * loc.shape[-1]
    step = max(1, CELLS // max(1, cells))
    parts = []
    with torch.no_grad():
        for begin in range(0, len(data), step):
            rows = slice(begin, min(begin + step, len(data)))
            some = None if spread is None else spread[rows]
            parts.append(_predictive(q, data.part(begin, rows.stop), loc[rows], some))
    mean, covariance = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, covariance


def _predictive(q: Draws, data: Data, loc: Tensor, spread: Tensor | None) -> tuple[Tensor, Tensor]:
    x, y = data.filled
    design, constant = design_of(q.model, q.eta, x)
    assert q.model.likelihood is not None
    shape = q.model.likelihood.observed(y).shape
    with validation_enabled(False):
        noise = q.model.likelihood.distribution(constant.reshape(shape), q.eta, y).variance
    mean = constant + (design @ loc.unsqueeze(-1)).squeeze(-1)
    covariance = torch.diag_embed(noise.reshape(constant.shape))
    if spread is not None:
        diagonal = spread.dim() == loc.dim()
        moved = design * spread.unsqueeze(1) if diagonal else design @ spread
        covariance = covariance + moved @ moved.mT
    return mean, covariance
