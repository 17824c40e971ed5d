"""How much of a prediction is worked on at a time: some draws, or one draw of some tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.models.check import Counted
from varmeta.models.model import TaskModel
from varmeta.tasks import Data

# Numbers held at a time.
CHUNK = 8_000_000
# Numbers that shared layers put out and that are kept for all draws.
KEPT = 2**26
# Numbers that a distribution's parameters, its draws and its density hold for an observation.
PER_POINT = 32


def sizes(
    model: TaskModel, eta: Mapping[str, Tensor], theta: Tensor, data: Data
) -> tuple[int, int]:
    """How many draws of theta `(draws, tasks, 1, D)` at a time, and of one draw how many tasks."""
    draws, tasks = theta.shape[:2]
    one = PER_POINT * data.width + theta.shape[-1]
    if model.net is not None and draws * tasks > 1 and data.width:
        one = max(one, _on_the_way(model, eta, theta[:1, :1], data))
    return max(1, CHUNK // (tasks * max(1, one))), max(1, CHUNK // max(1, one))


def ahead(model: TaskModel, eta: Mapping[str, Tensor], theta: Tensor, data: Data) -> TaskModel:
    """The model, its layers that come before all that varies run once for all draws at this eta.

    Itself where there is one draw, or what they put out is more than `KEPT` numbers.
    """
    if len(theta) < 2 or not data.width or model.net is None:
        return model
    x = data.filled[0]
    with torch.no_grad():
        few = x[:1]
        known = model.ahead(eta, [few]).features(eta, few)
        if known is None:
            return model
        if sum(value.numel() for value in known) * len(data) > KEPT:
            return model
        on_the_way = _on_the_way(model, eta, theta[:1, :1], data)
        return model.ahead(eta, [x], max(1, CHUNK // max(1, on_the_way)))


def draws_of_observations(data: Data) -> int:
    """How many draws at a time of observations whose distribution is known."""
    return max(1, CHUNK // max(1, PER_POINT * data.cells))


def _on_the_way(model: TaskModel, eta: Mapping[str, Tensor], theta: Tensor, data: Data) -> int:
    """Numbers that the network computes for one task (padded, as all of them are) under one draw.

    Without what has been run ahead for all draws.
    """
    x = data.filled[0]
    known, few = model.features(eta, x), x[:1]
    if known is not None:
        model = model.ahead(eta, [few], known=tuple(value[:1] for value in known))
    with torch.no_grad(), Counted() as counted:
        model.output(theta, eta, few)
    return counted.total
