"""A model whose network starts anew, at random layers of a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from varmeta.graphs.process import ALONE
from varmeta.models.model import TaskModel


def initialised(model: TaskModel, seed: int) -> TaskModel:
    """The model with its network's layers initialised anew by `seed`, as PyTorch initialises them.

    A start that the user gave to the prior stays, and torch's random state.
    """
    if model.net is None:
        return model
    fresh = copy.copy(model)
    net = copy.deepcopy(model.net).cpu()  # one generator, whatever the device
    with ALONE, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            reset = _reset_of(module)
            # frozen statistics are data, not a start
            if reset is not None and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                reset()
    held = {*model.prior.start_loc, *model.weights.fixed, *model.constants}
    new = {
        name: value.detach().clone() for name, value in net.named_parameters() if name not in held
    }
    fresh.start = model.start | new
    return fresh


def not_drawn(model: TaskModel) -> str | None:
    """The first module with learned parameters that does not say how to draw them anew."""
    assert model.net is not None
    for name, module in model.net.named_modules():
        prefix = f"{name}." if name else ""
        own = (prefix + parameter for parameter, _ in module.named_parameters(recurse=False))
        if _reset_of(module) is None and any(parameter in model.start for parameter in own):
            return f"{name or 'the network'!r} ({type(module).__name__})"
    return None


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]
    return None
