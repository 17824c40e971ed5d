"""Whole numbers reach an embedding as whole numbers, though tasks keep x floating beside other x.

Up to 2^53 in double precision, and 2^24 in single, they lose nothing on the way; larger ones are
refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from varmeta.tasks import Data
from varmeta.tasks.arrays import largest_whole

_Call = tuple[tuple[Any, ...], dict[str, Any]]
# Rows that the network is run on whole, and how many at a time it is run on as far as needed.
FEW, SLICE = 16, 1024


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


class _Seen(Exception):
    """What the embeddings are given has been looked at: the rest of the network need not run."""


def check_tokens(net: nn.Module | None, data: Data, run: Callable[[Tensor], object]) -> None:
    """Raise ValueError, naming the layer, where an embedding is given what is none of its rows.

    run: the network on some rows, as they are.  It is run on a few, and of the others as far as its
        last embedding.
    """
    found = {} if net is None else _embeddings(net)
    if not found:
        return
    x, _ = data.flat()
    looked, enough = 0, math.inf

    def look_for(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            nonlocal looked
            who = f"layer {name!r} ({type(module).__name__}) is given"
            given = args[0] if args else kwargs["input"]
            _look(who, given, len(cast("Tensor", module.weight)) - 1)
            looked += 1
            if looked >= enough:
                raise _Seen

        return look

    hooks = [
        module.register_forward_pre_hook(look_for(name), prepend=True, with_kwargs=True)
        for name, module in found.items()
    ]
    try:
        run(x[:FEW])
        enough = looked
        for rows in x[FEW:].split(SLICE) if enough else ():
            looked = 0
            with contextlib.suppress(_Seen):
                run(rows)
    finally:
        for hook in hooks:
            hook.remove()


def _look(who: str, given: Tensor, last: int) -> None:
    bad = given[given != given.floor()] if given.is_floating_point() else given[:0]
    if bad.numel():
        raise ValueError(
            f"{who} {float(bad[0]):g}, expected whole numbers: was x standardized()?  Leave these "
            "columns as they are"
        )
    beyond = given[(given < 0) | (given > last)]
    if beyond.numel():
        raise ValueError(
            f"{who} {int(beyond[0])}, but has the rows 0 to {last}: code x as 0, 1, ..., or make "
            "the layer larger"
        )
    # from here on one floating number stands for several whole ones
    lost = given[given >= largest_whole(given.dtype)] if given.is_floating_point() else given[:0]
    if lost.numel():
        raise ValueError(
            f"{who} {int(lost[0])} in {str(given.dtype).removeprefix('torch.')}, which may be "
            "another whole number, rounded: use float64 (dtype=torch.float64)"
        )
