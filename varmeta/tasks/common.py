"""What all parts of a set of tasks must share: shapes, one floating dtype, one device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varmeta.tasks.arrays import Part, to_dtype


def like_of(
    names: list[str],
    supports: list[Part | None],
    queries: list[Part | None],
    dtype: torch.dtype | None,
) -> tuple[Part, torch.dtype]:
    """An empty part with the shapes, dtypes and device that all parts share.

    Those that do not have them have to be brought to them.  With it the floating dtype in which x
    is looked at, which is x's own but for bytes.
    """
    # the first of every kind speaks for the others
    kinds: dict[tuple[Any, ...], tuple[str, str, Part]] = {}
    for what, parts in (("support", supports), ("query", queries)):
        for name, part in zip(names, parts, strict=True):
            if part is not None:
                some = bool(part[0].shape[0])
                own = ((values.shape[1:], values.dtype, values.device) for values in part)
                kinds.setdefault((some, *own), (name, what, part))
    known = [(f"task {name!r} ({what})", part) for name, what, part in kinds.values()]
    # a part without rows says something about shapes only if nobody else does: [] has no features
    known = [(who, part) for who, part in known if len(part[0])] or known[:1]
    if not known:
        kind = dtype or torch.get_default_dtype()
        return (torch.zeros(0, dtype=kind), torch.zeros(0, dtype=kind)), kind
    first, (x0, y0) = known[0]
    for who, part in known:
        for what, tensor, reference in (("x", part[0], x0), ("y", part[1], y0)):
            if tensor.shape[1:] != reference.shape[1:]:
                raise ValueError(
                    f"{who}: a row of {what} has shape {tuple(tensor.shape[1:])}, but "
                    f"{tuple(reference.shape[1:])} in {first}: all tasks, support and query, must "
                    "share it; (n,) and (n, 1) differ, see reshape"
                )
            if tensor.device != x0.device:
                raise ValueError(
                    f"{who}: {what} is on {tensor.device}, but x of {first} on {x0.device}: move "
                    "them together with .to"
                )
    seen: dict[torch.dtype, str] = {}
    for who, part in known:
        for what, tensor in zip("xy", part, strict=True):
            if tensor.is_floating_point():
                seen.setdefault(tensor.dtype, f"{what} of {who}")
    if dtype is None and len(seen) > 1:
        listed = ", ".join(
            f"{str(kind).removeprefix('torch.')} in {where}" for kind, where in seen.items()
        )
        raise ValueError(
            f"floating dtypes differ: {listed}: cast the data, or choose one with TaskSet(..., "
            "dtype=...)"
        )
    # bytes are images, and exact in any precision
    images = all(part[0].dtype == torch.uint8 for _, part in known)
    kind = dtype or next(iter(seen), torch.get_default_dtype() if images else torch.float64)
    floating_y = any(part[1].is_floating_point() for _, part in known)
    like = (
        x0.new_zeros(0, *x0.shape[1:], dtype=torch.uint8 if images else kind),
        y0.new_zeros(0, *y0.shape[1:], dtype=kind if floating_y else torch.int64),
    )
    return like, kind


def fit_to(
    parts: list[Part | None], like: Part, names: Sequence[str], what: str
) -> list[Part | None]:
    """Parts in the dtypes of `like`.

    One without rows is None.  Raises ValueError for what these dtypes cannot hold.
    """
    return [
        None
        if part is None or not len(part[0])
        else in_dtypes(part, (like[0].dtype, like[1].dtype), name, what)
        for part, name in zip(parts, names, strict=True)
    ]


def in_dtypes(
    part: Part, dtypes: tuple[torch.dtype | None, torch.dtype | None], name: str | None, what: str
) -> Part:
    """x and y in other dtypes, None for as they are; `what` as in "support"."""
    who = f"task {name!r}: {what}"
    return to_dtype(part[0], dtypes[0], f"{who} x"), to_dtype(part[1], dtypes[1], f"{who} y")


def in_precision(part: Part, dtype: torch.dtype | None, name: str | None, what: str) -> Part:
    """x, and y where it is floating, in another dtype, None for as they are."""
    return in_dtypes(part, (dtype, dtype if part[1].is_floating_point() else None), name, what)


def check_names(names: Sequence[str] | None, x: Tensor | None) -> tuple[str, ...] | None:
    """The names of x's columns, as many as there are.

    x: an empty part's, None where no task has data.
    """
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(
            f"x_names must list one name per column, not the string {names!r}: write [{names!r}]"
        )
    if x is not None and (x.dim() > 2 or len(names) != math.prod(x.shape[1:])):
        raise ValueError(
            f"x_names lists {list(names)}, but a row of x has shape {tuple(x.shape[1:])}: give one "
            "name per column"
        )
    return tuple(map(str, names))


def check_device(device: Any) -> None:
    """Raise ValueError for what is no device on which numbers can be held."""
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"device={device!r} is none that torch has here ({why}): give one such as 'cpu' or "
            "'cuda'"
        ) from error
    if place.type == "meta":
        raise ValueError(f"device={device!r} holds no numbers: give one such as 'cpu' or 'cuda'")
