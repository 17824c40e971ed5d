"""A batch as a tree of tensors, which a captured graph takes as its input, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varmeta.tasks.batch import Batch, Data


def tensors_of(batch: Batch) -> dict[str, Any]:
    return {
        "ids": batch.ids,
        "features": batch.support.features,
        "support": (*batch.support.filled, batch.support.mask),
        "query": () if batch.query is None else (*batch.query.filled, batch.query.mask),
    }


def batch_of(
    tensors: dict[str, Any], total: float, share: float = 1.0, widest: int | None = None
) -> Batch:
    """The batch as a set of its own, its tasks without names.

    widest: rows of the largest task of the set that they are of; None: of these.
    """
    features = tensors["features"]
    support = _data(tensors["support"], features)
    support.__dict__["widest"] = support.width if widest is None else widest
    everyone = torch.arange(len(support), device=support.mask.device)
    query = _data(tensors["query"], features) if tensors["query"] else None
    return Batch(support, query, tensors["ids"], ("",) * len(support), everyone, total, True, share)


def _data(parts: tuple[Tensor, Tensor, Tensor], features: dict[str, Tensor]) -> Data:
    x, y, mask = parts
    data = Data(x, y, mask, features)
    data.__dict__["filled"] = (x, y)  # filled before it came in: where to is for the numbers to say
    return data
