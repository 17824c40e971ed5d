"""What is looked at in a network once, before any work, and which layer does not fit."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.weight_norm import WeightNorm

from varmeta._checks import counted, one_of
from varmeta.models.recurrent import can_be_unrolled
from varmeta.priors.weights import Weights
from varmeta.tasks import TaskSet


def warn_unless_twice_differentiable(
    net: nn.Module, loss: Callable[[Tensor], Tensor], theta: Tensor, x: Tensor
) -> None:
    """Warn, naming the layer, where the loss has a first derivative and no second.

    Fused kernels and custom functions may have none.

    Newton steps, `Implicit` and `Unrolled` need the second; first-order strategies do not, so this
    is no error.
    loss: of theta `(D,)`; x: one task's inputs, with which each layer is tried on its own once
        something has failed.
    """
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        if _second_derivative(loss, theta) is None:
            return
        net = copy.deepcopy(net).to(
            x
        )  # in the precision of the data, which it need not have itself
        inputs: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: inputs.append((name, module, args))
            )
            for name, module in net.named_modules()
            if name
        ]
        try:
            net(x)
        finally:
            for hook in hooks:
                hook.remove()
        # innermost layers come last in the order of entering, so that a container is not blamed for
        # its part
        who, why = "the network", _second_derivative(loss, theta)
        for name, module, args in reversed(inputs):
            if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
                inside = args[0].detach().requires_grad_()
                error = _second_derivative(lambda value: module(value).sum(), inside)  # noqa: B023
                if error is not None:
                    who, why = f"layer {name!r} ({type(module).__name__})", error
                    break
    warnings.warn(
        f"{who} cannot be differentiated twice ({why}), which Newton steps, Implicit and Unrolled "
        "need: replace it, or use FirstOrder or Reptile with GradientDescent",
        RuntimeWarning,
        stacklevel=4,
    )


def check_batching(weights: Weights, loss: Callable[[Tensor], Tensor], theta: Tensor) -> None:
    """Raise ValueError where there are no gradients, or equal tasks get unequal ones.

    Two equal tasks are tried, and the second is compared with the first, parameter by parameter.

    So it is with PyTorch's rule for an embedding's padding row, where it is not that of an
    `nn.Embedding`, which is held.
    loss: of theta `(2, D)`, the two tasks' weights.
    """
    with torch.enable_grad():
        theta = theta.detach().expand(2, -1).clone().requires_grad_()
        try:
            value = loss(theta)
            if not value.requires_grad:
                raise ValueError(
                    "what the network puts out does not depend on its weights as far as PyTorch "
                    "follows it: leave out no_grad() or detach()"
                )
            (gradient,) = torch.autograd.grad(
                value, theta, allow_unused=True, materialize_grads=True
            )
        except RuntimeError as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(
                f"the network cannot be differentiated for many tasks at once: {why}"
            ) from error
    for name, (one, other) in weights.unflatten(gradient).items():
        if not torch.allclose(
            one, other, rtol=0.0, atol=1e-3 * float(one.abs().max()), equal_nan=True
        ):
            raise ValueError(
                f"{name!r} has another gradient in the second of two equal tasks than in the "
                "first: PyTorch's rule for many tasks at once is wrong for an operation on it, "
                "such as F.embedding(padding_idx=...): use nn.Embedding"
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
    """Yield a function that says which layer was entered last and not left.

    A linear layer of another width than its input raises a ValueError that says both.
    """
    entered: list[str] = []
    hooks = []
    # the layer that meets x itself, unless there are weights of another kind before
    first = (
        next((module for module in net.modules() if list(module.parameters(False))), None)
        if net
        else None
    )
    for name, module in net.named_modules() if net is not None else ():
        if isinstance(module, nn.Linear):
            who, what = (
                ("the network", "x") if module is first else (f"layer {name!r}", "its input")
            )
            hooks.append(module.register_forward_pre_hook(partial(_check_width, who, what)))
        if name:
            word = f"layer {name!r}, {type(module).__name__}"
            hooks.append(
                module.register_forward_pre_hook(lambda *_, word=word: entered.append(word))
            )
            hooks.append(module.register_forward_hook(lambda *_: entered.pop() and None))
    try:
        yield lambda: f" in {entered[-1]}" if entered else ""
    finally:
        for hook in hooks:
            hook.remove()


def _check_width(who: str, what: str, module: nn.Linear, args: tuple[Any, ...]) -> None:
    if (
        len(args) == 1
        and isinstance(args[0], Tensor)
        and args[0].shape[-1:] != (module.in_features,)
    ):
        raise ValueError(
            f"{who} takes {counted(module.in_features, 'column')}, {what} has {args[0].shape[-1]}"
        )


def check_columns(net: nn.Module | None, tasks: TaskSet) -> None:
    """Raise ValueError where x's columns are not those that the network names.

    Other names and another order are refused.
    """
    columns = getattr(net, "columns", None)
    if isinstance(columns, tuple) and tasks.x_names is not None and columns != tasks.x_names:
        raise ValueError(
            f"the network's columns are {list(columns)}, but those of x are {list(tasks.x_names)}: "
            "name the same in the same order, such as vm.LinearPredictor(tasks.x_names)"
        )


def check_output(out: object, x: Tensor) -> Tensor:
    """What a network puts out for one task's x.

    Raises ValueError for anything but a floating tensor with a row for each of x's.
    """
    if not isinstance(out, Tensor):
        raise ValueError(
            f"the network puts out a {type(out).__name__}, expected one tensor with a row for each "
            "row of x: return that alone"
        )
    if not out.is_floating_point():
        raise ValueError(
            f"the network puts out {str(out.dtype).removeprefix('torch.')}, expected floating "
            "numbers: return what comes before argmax or rounding"
        )
    if out.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"the network puts out a tensor of shape {tuple(out.shape)} for x of shape "
            f"{tuple(x.shape)}: expected a row for each row of x"
        )
    return out


def _refusal(module: nn.Module) -> str | None:
    """Why this layer cannot be run for many tasks with weights of their own, and what to use
    instead, if so.
    """
    if isinstance(module, (nn.RNNBase, nn.LSTMCell)) and not can_be_unrolled(module):
        return (
            "is recurrent (KIND), a layer of one's own made of PyTorch's, whose kernels cannot be "
            "run for many tasks (no batching rule): use nn.RNN, nn.LSTM, nn.GRU or their cells "
            "within it"
        )
    if isinstance(module, torch.jit.ScriptModule):
        return (
            "is TorchScript, which takes no weights from outside: give the nn.Module that it was "
            "made of"
        )
    if type(module).__name__ == "OptimizedModule":
        return (
            "comes from torch.compile: give the module itself, net._orig_mod; fit(compile=True) "
            "compiles whole steps"
        )
    if any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()):
        return (
            "has torch.nn.utils.weight_norm, whose weight is no parameter and cannot be copied: "
            "use torch.nn.utils.parametrizations.weight_norm"
        )
    kept = [name for name, value in vars(module).items() if _is_result(value)]
    if kept:
        return (
            f"(KIND) keeps {kept[0]!r}, which was computed and cannot be copied: detach it; of "
            f"torch.nn.utils.prune, take prune.remove(layer, {kept[0]!r})"
        )
    if any(is_lazy(value) for value in module.parameters(recurse=False)):
        return "is a KIND that has seen no data yet: run the network on a few rows first, net(x)"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        for option, why in _EMBEDDING.items():
            if getattr(module, option):
                return f"(KIND) has {option}, {why}: leave it out"
    return None


def _is_result(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


BatchNorm = Literal["refuse", "frozen", "batch"]
BATCH_NORMS: tuple[BatchNorm, ...] = get_args(BatchNorm)
# What an embedding does to its gradient or its weights by the side.
_EMBEDDING = {
    "sparse": "whose gradients cannot be taken for many tasks at once",
    "max_norm": "which writes into the weights while it runs",
    "scale_grad_by_freq": "whose gradient is not that of the likelihood",
}


def use_batch_statistics(net: nn.Module) -> None:
    """Let every batch norm take mean and variance of the rows that it is given, and keep none."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def check_net(net: nn.Module, batch_norm: BatchNorm) -> None:
    """Raise ValueError, naming the layer, for what cannot serve many tasks.

    That is what cannot be run for many, or would not be right.
    """
    one_of("batch_norm", batch_norm, BATCH_NORMS)
    for name, module in net.named_modules():
        why = _refusal(module)
        if why is not None:
            who = f"layer {name!r}" if name else "the network"
            raise ValueError(f"{who} {why.replace('KIND', type(module).__name__)}")
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or batch_norm == "batch":
            continue
        if batch_norm == "refuse":
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__}: batch statistics tie a task's "
                "observations together, so its likelihood is no longer a product over them.  Use "
                "GroupNorm or LayerNorm, batch_norm='frozen' (its running statistics), or "
                "batch_norm='batch' (those of a task's rows, where all tasks have as many)"
            )
        if module.running_mean is None:
            raise ValueError(
                f"layer {name!r} keeps no running statistics, so they cannot be frozen: use "
                "GroupNorm, or batch_norm='batch'"
            )
    parameters = list(net.parameters())
    if not parameters:
        raise ValueError("the network has no parameters, so there is nothing to learn")
    if not any(value.requires_grad for value in parameters):
        raise ValueError(
            "every parameter of the network has requires_grad=False, which makes it a constant, so "
            "there is nothing to learn: net.requires_grad_(True), or True for a layer"
        )
