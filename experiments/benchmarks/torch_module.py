"""The network and losses as an ordinary torch module, for the libraries that take one and loop over
tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks.work import HALF_LOG_2PI, PRECISION, WIDTH, Work, flat


def network(work: Work) -> nn.Sequential:
    made = nn.Sequential(
        nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
    )
    made.to(torch.as_tensor(work.x_support).dtype)
    made.load_state_dict({name: torch.as_tensor(value) for name, value in work.theta0.items()})
    return made


def misfit(net: Any, x: Tensor, y: Tensor) -> Tensor:
    squares: Tensor = (net(x) - y).square().sum()
    return 0.5 * squares + HALF_LOG_2PI * y.numel()


def away(own: Any, theta0: Any) -> Tensor:
    """lambda/2 |theta - theta0|^2."""
    squares: Tensor = sum((a - b).square().sum() for a, b in zip(own, theta0, strict=True))
    return 0.5 * PRECISION * squares


def each_task(work: Work) -> list[tuple[Tensor, ...]]:
    parts = [
        torch.as_tensor(a).unsqueeze(-1)
        for a in (work.x_support, work.y_support, work.x_query, work.y_query)
    ]
    return list(zip(*(part.unbind() for part in parts), strict=True))


def gradient_of(net: nn.Module) -> np.ndarray:
    return flat({name: np.asarray(value.grad) for name, value in net.named_parameters()})
