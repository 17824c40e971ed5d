"""What of a network is never learned: frozen parameters, buffers, embeddings' padding rows.

Frozen parameters are those with `requires_grad=False`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def frozen(net: nn.Module) -> tuple[str, ...]:
    """The names of the parameters with `requires_grad=False`."""
    return tuple(name for name, value in net.named_parameters() if not value.requires_grad)


def constants(net: nn.Module, names: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    """The parameters called `names` and all buffers, on x's device.

    What is floating is in x's precision.
    """
    known = dict(net.named_parameters())
    found = {name: known[name] for name in names} | dict(net.named_buffers())
    return {
        name: value.to(x if value.is_floating_point() else x.device)
        for name, value in found.items()
    }


def hold_padding_rows(net: nn.Module) -> None:
    """Make every embedding's row `padding_idx` a constant, at the values that it has now.

    In PyTorch that row gets no gradient; under vmap its rule loses this for every task but the
    first.  A value that is
    drawn from a guide and has no gradient would not do either: a constant agrees with differences
        of the loss.
    """
    for module in net.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            row = module.weight[module.padding_idx].detach().clone()
            module.register_forward_hook(_Constant(module.padding_idx, row), with_kwargs=True)


class _Constant:
    """A forward hook that puts `row` where the input is `index`.

    Its class tells it from the user's hooks.
    """

    def __init__(self, index: int, row: Tensor) -> None:
        self.index, self.row = index, row

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor
    ) -> Tensor:
        known = args[0] if args else kwargs["input"]
        return torch.where((known == self.index).unsqueeze(-1), self.row.to(out), out)


def fingerprint(net: nn.Module | None, names: tuple[str, ...]) -> dict[str, str]:
    """A hash of each constant's numbers by name, whatever their precision.

    A fit holds only with the same ones.
    """
    if net is None:
        return {}
    found = constants(net, names, torch.zeros((), dtype=torch.float64))
    for name, module in net.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _Constant):
                found[f"{name}.padding"] = hook.row.to("cpu", torch.float64)
    return {
        name: f"{list(value.shape)} "
        f"{hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()[:16]}"
        for name, value in found.items()
    }


def difference(
    fitted: Mapping[str, str], net: nn.Module | None, names: tuple[str, ...]
) -> str | None:
    """Where a network's constants are not those of a fit, in a few words.

    The fit's are given by their `fingerprint`.
    """
    found = fingerprint(net, names)
    for name in (*found, *fitted):
        if found.get(name) != fitted.get(name):
            what = (
                "other numbers in"
                if name in found and name in fitted
                else "no"
                if name in found
                else "the constant"
            )
            return f"{what} {name!r}, which (a buffer, or requires_grad=False) is not learned"
    return None
