"""The class of the nearest support row: what a task's few rows say without anything learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varmeta.tasks import Batch, Data


def error_rates(batch: Batch) -> Tensor:
    """The share of each task's query rows whose nearest support row is of another class.

    `(tasks,)`; nearest in x by Euclidean distance, the first of equals.  A task without support
    rows knows no class, so all its rows are wrong; one without query rows is NaN.
    """
    query = batch.require_query()
    found = nearest(batch.support, query)
    wrong = (found != query.y) & query.mask
    return wrong.sum(-1).double() / query.num_points


def nearest(support: Data, query: Data) -> Tensor:
    """The class of the nearest support row of every query row, `(tasks, points)`.

    -1 where there is none.
    """
    if not support.width:
        return torch.full_like(query.y, -1)
    one, other = (_flat(data.x) for data in (query, support))
    # by differences: of products, digits are lost where rows are alike
    mode = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(one, other, compute_mode=mode)
    distance = distance.masked_fill(~support.mask.unsqueeze(1), math.inf)
    found = support.y.gather(1, distance.argmin(-1))
    return torch.where(support.mask.any(-1, keepdim=True), found, -1)


def _flat(x: Tensor) -> Tensor:
    """`(tasks, points, numbers)`, floating."""
    x = x if x.is_floating_point() else x.float()
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
