"""Whole numbers reach an embedding as whole numbers, though tasks keep x floating beside other x.

Up to 2^53 in double precision, and 2^24 in single, they lose nothing on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_Call = tuple[tuple[Any, ...], dict[str, Any]]


def give_whole_numbers(net: nn.Module) -> None:
    """Let every `nn.Embedding` and `nn.EmbeddingBag` of the network take floating numbers too."""
    for module in _embeddings(net).values():
        module.register_forward_pre_hook(_as_whole, with_kwargs=True)


def _embeddings(net: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def _as_whole(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Call:
    if args:
        return (_whole(args[0]), *args[1:]), dict(kwargs)
    return args, {**kwargs, "input": _whole(kwargs["input"])}


def _whole(given: Tensor) -> Tensor:
    return given.to(torch.int64) if given.is_floating_point() else given


def check_tokens(net: nn.Module | None, run: Callable[[], object]) -> None:
    """Raise ValueError, naming the layer, where an embedding is given what is none of its rows.

    run: the network on some rows, as they are.
    """
    found = {} if net is None else _embeddings(net)

    def looked_at(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            who = f"layer {name!r} ({type(module).__name__}) is given"
            bad = given[given != given.floor()] if given.is_floating_point() else given[:0]
            if bad.numel():
                raise ValueError(
                    f"{who} {float(bad[0]):g}, expected whole numbers: was x standardized()?  "
                    "Leave these columns as they are"
                )
            last = len(cast("Tensor", module.weight)) - 1
            beyond = given[(given < 0) | (given > last)]
            if beyond.numel():
                raise ValueError(
                    f"{who} {int(beyond[0])}, but has the rows 0 to {last}: code x as 0, 1, ..., "
                    "or make the layer larger"
                )

        return look

    hooks = [
        module.register_forward_pre_hook(looked_at(name), prepend=True, with_kwargs=True)
        for name, module in found.items()
    ]
    try:
        if found:
            run()
    finally:
        for hook in hooks:
            hook.remove()
