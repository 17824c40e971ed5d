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
# Numbers that a distribution's parameters, its draws and its density hold for an observation.
PER_POINT = 32


def sizes(
    model: TaskModel, eta: Mapping[str, Tensor], theta: Tensor, data: Data
) -> tuple[int, int]:
    """How many draws of theta `(draws, tasks, 1, D)` at a time, and of one draw how many tasks."""
    draws, tasks = theta.shape[:2]
    one = PER_POINT * data.mask.shape[1] + theta.shape[-1]
    if model.net is not None and draws * tasks > 1 and data.mask.shape[1]:
        one = max(one, _on_the_way(model, eta, theta[:1, :1], data.take(slice(0, 1))))
    return max(1, CHUNK // (tasks * max(1, one))), max(1, CHUNK // max(1, one))


def draws_of_observations(data: Data) -> int:
    """How many draws at a time of observations whose distribution is known."""
    return max(1, CHUNK // max(1, PER_POINT * data.mask.numel()))


def _on_the_way(model: TaskModel, eta: Mapping[str, Tensor], theta: Tensor, data: Data) -> int:
    """Numbers that the network computes for one task (padded, as all of them are) under one
    draw.
    """
    with torch.no_grad(), Counted() as counted:
        model.output(theta, eta, data.filled[0])
    return counted.total
