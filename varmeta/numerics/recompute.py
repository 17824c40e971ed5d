"""A function whose graph is not kept but made again on the way back: time for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varmeta.numerics.tree import Tree


def recomputed(function: Callable[[Tree], Tree], inputs: Tree, given: Sequence[Tensor]) -> Tree:
    """function(inputs), of which no graph is kept: the derivative runs the function once more.

    It has a first derivative alone.

    function: pure; it is run without autograd here, and with it on the way back.
    given: the other tensors that it depends on, none of them made of another, whose derivative is
        wanted too.

    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> y = recomputed(lambda at: {"y": at["x"] ** 2}, {"x": x}, ())["y"]
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([6.]),)
    """
    names: list[str] = []
    found = _Recomputed.apply(function, tuple(inputs), names, *inputs.values(), *given)
    return dict(zip(names, found, strict=True))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tree], Tree],
        names: tuple[str, ...],
        results: list[str],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.function, ctx.names, ctx.given = function, names, tensors[len(names) :]
        ctx.save_for_backward(*tensors[: len(names)])
        found = function(dict(zip(names, tensors, strict=False)))
        results.extend(found)
        return tuple(found.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        wanted = ctx.needs_input_grad[3:]
        own = [
            x.detach().requires_grad_(asked)
            for x, asked in zip(ctx.saved_tensors, wanted, strict=False)
        ]
        with torch.enable_grad():
            found = ctx.function(dict(zip(ctx.names, own, strict=True))).values()
        moved = [(y, g) for y, g in zip(found, outputs, strict=True) if y.requires_grad]
        asked = [x for x, yes in zip((*own, *ctx.given), wanted, strict=True) if yes]
        gradients = iter(
            torch.autograd.grad(
                [y for y, _ in moved], asked, [g for _, g in moved], allow_unused=True
            )
        )
        return (None, None, None, *(next(gradients) if yes else None for yes in wanted))
