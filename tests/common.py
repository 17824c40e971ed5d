"""What the tests of this folder share: losses of a model under a guide, and data with junk in the
padding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import varmeta as vm
from varmeta.guides.delta import Delta
from varmeta.guides.make import make_guide
from varmeta.strategies.expectation import Point, make_expectation
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch, Data

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.bytes = max(self.bytes, found.untyped_storage().nbytes())
        return found


def problem(
    model: vm.TaskModel, guide: Any = "normal", expectation: Any = "auto", num_particles: int = 4
) -> Problem:
    made = make_guide(guide).bound(model)
    rule = (
        Point()
        if isinstance(made, Delta)
        else make_expectation(expectation, model.weights.size, num_particles, True, False)
    )
    return Problem(model, made, rule, seed=3)


def start(model: vm.TaskModel) -> dict[str, Tensor]:
    return model.init(torch.zeros((), dtype=F64))


def moved(tree: dict[str, Tensor], seed: int = 1, by: float = 0.2) -> dict[str, Tensor]:
    """A point away from the start, so that nothing holds by symmetry."""
    return {
        name: value.detach() + by * randn(*value.shape, seed=seed) for name, value in tree.items()
    }


def with_grad(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in tree.items()}


def junk(batch: Batch, y_junk: float | None, size: float = 1e3) -> Batch:
    """The batch with finite junk where the mask is False; `y_junk` None leaves y alone."""

    def spoil(data: Data) -> Data:
        mask = data.mask
        x = torch.where(
            mask.reshape(*mask.shape, *(1,) * (data.x.dim() - 2)),
            data.x,
            torch.full_like(data.x, size),
        )
        y = data.y
        if y_junk is not None:
            y = torch.where(
                mask.reshape(*mask.shape, *(1,) * (y.dim() - 2)), y, torch.full_like(y, y_junk)
            )
        return Data(x, y, mask)

    query = None if batch.query is None else spoil(batch.query)
    return replace(batch, support=spoil(batch.support), query=query)
