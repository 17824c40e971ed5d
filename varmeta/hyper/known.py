"""The tasks' posteriors and evidence at many eta in closed form, where they are Gaussian.

Of a regression each task is reduced to a triangle first, which no eta changes; of a network the
design is formed anew under each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.fitting.reduced import linear_rows, triangles
from varmeta.guides import closed_form
from varmeta.guides.prior_parts import prior_parts
from varmeta.likelihoods.base import LocationScale
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.numerics import gaussian
from varmeta.numerics.gaussian import Standardised
from varmeta.numerics.rows import rowwise
from varmeta.numerics.tree import cast
from varmeta.tasks import Batch, Data

# Numbers in one tensor, as many as a core's cache holds.
CELLS = 200_000

Tasks = Callable[[Mapping[str, Tensor]], Standardised]
"""The tasks in units of the prior and of their noise, under an eta."""


class Known(NamedTuple):
    """Of every task under K values of eta, `(K, T)` first, in float64.

    log p(y_i | eta), nats; the posterior's mean `(K, T, D)` without what features add, and a lower
    factor of its covariance `(K, T, D, D)`.
    """

    log_evidence: Tensor
    mean: Tensor
    factor: Tensor


def known(model: TaskModel, batch: Batch, eta: Mapping[str, Tensor]) -> Known:
    """For `TaskModel.is_linear_gaussian`; without derivatives."""
    number, size = len(next(iter(eta.values()))), model.weights.size
    wide = cast(eta, torch.float64)
    found, order = [], []
    with torch.no_grad():
        for rows, tasks, cells in _groups(model, batch):
            step = max(1, CELLS // max(1, cells))
            fn = rowwise(lambda one, tasks=tasks: _one(model, one, tasks))
            parts = [
                fn({name: value[k : k + step] for name, value in wide.items()})
                for k in range(0, number, step)
            ]
            found.append(torch.cat(parts))
            order.append(rows)
    all_of_it = torch.cat(found, 1)[:, torch.cat(order).argsort()]
    evidence, mean, factor = all_of_it.split([1, size, size**2], -1)
    return Known(evidence[..., 0], mean, factor.unflatten(-1, (size, size)))


def _one(model: TaskModel, eta: Mapping[str, Tensor], tasks: Tasks) -> Tensor:
    """What is told of each task, side by side, `(T, 1 + D + D^2)`."""
    standard = tasks(eta)
    found = gaussian.posterior(standard)
    loc, root = prior_parts(model, eta)
    mean = loc + root.times(found.mean)
    factor = root.lower_times(found.factor)
    evidence = gaussian.log_evidence(standard).unsqueeze(-1)
    return torch.cat([evidence, mean, factor.flatten(-2)], -1)


def _groups(model: TaskModel, batch: Batch) -> list[tuple[Tensor, Tasks, int]]:
    """Tasks that are taken together: their positions, their data, and how many numbers these are
    under one eta.
    """
    size = model.weights.size
    if model.all_linear:
        tasks, cells = _of_triangles(model, batch.support)
        return [(torch.arange(len(batch)), tasks, cells)]
    return [
        (rows, _of_rows(model, group.support), group.support.cells * size)
        for rows, group in batch.by_size()
    ]


def _of_rows(model: TaskModel, data: Data) -> Tasks:
    return lambda eta: closed_form.standardised(model, eta, data)


def _of_triangles(model: TaskModel, data: Data) -> tuple[Tasks, int]:
    linear, size = (*model.shared, *model.coefficients), model.weights.size
    counts = data.num_points
    log_weights = torch.zeros(len(counts)).to(data.like).double()
    if bool(counts.any()):
        design, y, weight, counts = linear_rows(
            model, data.x[data.mask], data.y[data.mask], counts, data.features, linear
        )
        of = triangles(torch.cat([design, y.unsqueeze(-1)], -1), counts)
        log_weights = log_weights.index_add(0, torch.repeat_interleave(counts), weight.log())
    else:
        width = size + sum(model.start[name].numel() for name in linear) + 1
        of = log_weights.new_zeros(len(counts), width, width)
    inner = unweighted(model.likelihood)
    assert isinstance(inner, LocationScale)  # it is Gaussian

    def tasks(eta: Mapping[str, Tensor]) -> Standardised:
        loc, root = prior_parts(model, eta)
        scale = torch.as_tensor(inner.scale_of(of, eta)).to(of)
        places = [loc, *(_place(model, name, eta).to(of) for name in linear)]
        at = torch.cat([-torch.cat(places), of.new_ones(1)])
        moved = root.transposed(of[..., :size]) / scale
        number = counts.to(of)
        return Standardised(moved, of @ at / scale, number * scale.log() - log_weights, number)

    return tasks, of.numel()


def _place(model: TaskModel, name: str, eta: Mapping[str, Tensor]) -> Tensor:
    return (eta[name] if name in eta else model.start[name]).reshape(-1)
