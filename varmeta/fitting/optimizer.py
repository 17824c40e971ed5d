"""What a user may give as the optimiser of eta: a factory of one of torch's."""

from __future__ import annotations

from typing import Any

import torch

from varmeta._checks import kind_of

SUCH_AS = "lambda params: torch.optim.Adam(params, lr=1e-2)"


def check_factory(optimizer: object) -> None:
    """Raise TypeError for what is no factory of a torch optimiser."""
    made = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    where = getattr(optimizer, "__module__", None) or type(optimizer).__module__
    if where.startswith("pyro.optim") and not made:
        raise TypeError(
            "optimizer is one of pyro.optim, which moves what is in Pyro's global store, where eta "
            f"is not: give a factory of torch's, {SUCH_AS}"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(f"optimizer must be a factory, such as {SUCH_AS}, not {kind_of(optimizer)}")


def checked_optimizer(made: Any) -> torch.optim.Optimizer:
    """What the factory returned.  Raises TypeError for what is no torch optimiser."""
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"the optimizer factory returns {kind_of(made)}, expected a torch.optim.Optimizer: "
            f"{SUCH_AS}"
        )
    return made
