"""One function for many eta at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varmeta.numerics.batching import cannot_be_batched


def rowwise(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn over the leading axis of all its arguments, tensors or dicts of tensors.

    By `vmap`, or one by one where a program uses an operation that vmap refuses.  Other errors are
    raised as they are.

    >>> rowwise(lambda x, named: x + named["y"])(torch.ones(2), {"y": torch.tensor([1.0, 2.0])})
    tensor([2., 3.])
    """
    batched = torch.func.vmap(fn)
    refused = False

    def call(*arguments: Any) -> Tensor:
        nonlocal refused
        if not refused:
            try:
                return batched(*arguments)
            except RuntimeError as error:
                if not cannot_be_batched(error):
                    raise
                refused = True
        first = arguments[0]
        number = len(next(iter(first.values()))) if isinstance(first, dict) else len(first)
        return torch.stack(
            [fn(*(_row(argument, k) for argument in arguments)) for k in range(number)]
        )

    return call


def _row(argument: Any, k: int) -> Any:
    return (
        {name: value[k] for name, value in argument.items()}
        if isinstance(argument, dict)
        else argument[k]
    )
