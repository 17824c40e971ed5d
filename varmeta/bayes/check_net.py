"""What is looked at in a network once, before any work, and which layer does not fit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from varmeta._words import counted
from varmeta.tasks import TaskSet


def warn_unless_twice_differentiable(
    net: nn.Module, loss: Callable[[Tensor], Tensor], theta: Tensor, x: Tensor
) -> None:
    """Warn, naming the layer, where the loss has a first derivative and no second (fused kernels, custom functions).

    Newton steps, `Implicit` and `Unrolled` need the second; first-order strategies do not, so this is no error.
    loss: of theta `(D,)`; x: one task's inputs, with which each layer is tried on its own once something has failed.
    """
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        if _second_derivative(loss, theta) is None:
            return
        inputs: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: inputs.append((name, module, args)))
            for name, module in net.named_modules()
            if name
        ]
        try:
            net(x)
        finally:
            for hook in hooks:
                hook.remove()
        # innermost layers come last in the order of entering, so that a container is not blamed for its part
        who, why = "the network", _second_derivative(loss, theta)
        for name, module, args in reversed(inputs):
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
                error = _second_derivative(lambda value: module(value).sum(), args[0].detach().requires_grad_())  # noqa: B023
                if error is not None:
                    who, why = f"layer {name!r} ({type(module).__name__})", error
                    break
    warnings.warn(
        f"{who} cannot be differentiated twice ({why}), which Newton steps, Implicit and Unrolled need: replace it, or use "
        "FirstOrder or Reptile with GradientDescent",
        RuntimeWarning,
        stacklevel=4,
    )


def _second_derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> str | None:
    """The error met on the way to it, if any."""
    first = torch.autograd.grad(function(at), at, create_graph=True, allow_unused=True)[0]
    if first is None or not first.requires_grad:  # linear
        return None
    try:
        torch.autograd.grad(first.sum(), at, allow_unused=True)
    except RuntimeError as error:
        return str(error).partition("\n")[0].rstrip(".")
    return None


@contextlib.contextmanager
def layer_entered(net: nn.Module | None) -> Iterator[Callable[[], str]]:
    """Within it, the yielded function says which layer of the network was entered last and not left.

    A linear layer of another width than its input raises a ValueError that says both.
    """
    entered: list[str] = []
    hooks = []
    # the layer that meets x itself, unless there are weights of another kind before
    first = next((module for module in net.modules() if list(module.parameters(False))), None) if net else None
    for name, module in net.named_modules() if net is not None else ():
        if isinstance(module, nn.Linear):
            who, what = ("the network", "x") if module is first else (f"layer {name!r}", "its input")
            hooks.append(module.register_forward_pre_hook(partial(_check_width, who, what)))
        if name:
            word = f"layer {name!r}, {type(module).__name__}"
            hooks.append(module.register_forward_pre_hook(lambda *_, word=word: entered.append(word)))
            hooks.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    try:
        yield lambda: f" in {entered[-1]}" if entered else ""
    finally:
        for hook in hooks:
            hook.remove()


def _check_width(who: str, what: str, module: nn.Linear, args: tuple[Any, ...]) -> None:
    if len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[-1:] != (module.in_features,):
        raise ValueError(f"{who} takes {counted(module.in_features, 'column')}, {what} has {args[0].shape[-1]}")


def check_columns(net: nn.Module | None, tasks: TaskSet) -> None:
    """Raise ValueError where the network names its columns and x's have other names or another order."""
    columns = getattr(net, "columns", None)
    if isinstance(columns, tuple) and tasks.x_names is not None and columns != tasks.x_names:
        raise ValueError(
            f"the network's columns are {list(columns)}, but those of x are {list(tasks.x_names)}: name the same in the same "
            "order, such as vm.LinearPredictor(tasks.x_names)"
        )


def check_net(net: nn.Module, batch_norm: str) -> None:
    if batch_norm not in ("refuse", "frozen"):
        raise ValueError(f"batch_norm must be 'refuse' or 'frozen', not {batch_norm!r}")
    for name, module in net.named_modules():
        if isinstance(module, nn.RNNBase):
            who = f"layer {name!r}" if name else "the network"
            raise ValueError(
                f"{who} is recurrent ({type(module).__name__}), which PyTorch cannot run for many tasks with weights of their "
                "own (no batching rule): use convolutions or attention"
            )
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if batch_norm == "refuse":
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}: batch statistics tie a task's observations together, so its "
                "likelihood is no longer a product over them.  Use GroupNorm or LayerNorm, or batch_norm='frozen'"
            )
        if module.running_mean is None:
            raise ValueError(f"layer {name!r} keeps no running statistics, so they cannot be frozen: use GroupNorm")
    parameters = list(net.parameters())
    if not parameters:
        raise ValueError("the network has no parameters, so there is nothing to learn")
    if not any(value.requires_grad for value in parameters):
        raise ValueError(
            "every parameter of the network has requires_grad=False, which makes it a constant, so there is nothing to "
            "learn: net.requires_grad_(True), or True for a layer"
        )
