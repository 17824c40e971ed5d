"""One array from outside becomes one checked tensor; every complaint names the task and the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.masked import MaskedTensor

from varmeta._checks import counted

Part = tuple[Tensor, Tensor]
LARGEST = 2**63 - 1  # of int64, as which whole numbers are kept


def as_tensor(value: Any, what: str) -> Tensor:
    """A dense copy without graph.

    Floating numbers keep their precision, and uint8 (images) stays; other whole numbers and
    booleans become int64.

    Python numbers have no precision of their own and take torch's default dtype.  `what` opens
    every complaint, e.g. "task 'a': support x".  Raises TypeError for what is not made of real
    numbers and for a dict, ValueError for a ragged nested list.
    """
    _refuse_dict(value, what)
    _refuse_masked(value, what)
    # a copy, because what has been checked must not change when the caller writes into the original
    tensor = value.detach().clone() if isinstance(value, Tensor) else _from_outside(value, what)
    if tensor.is_complex():
        raise TypeError(f"{what} is complex: give the real and imaginary parts as two columns")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype == torch.uint64 and bool((tensor.view(torch.int64) < 0).any()):
        _refuse_large(tensor.cpu().numpy(), what)
    return (
        tensor
        if tensor.is_floating_point() or tensor.dtype == torch.uint8
        else tensor.to(torch.int64)
    )


def _from_outside(value: Any, what: str) -> Tensor:
    leaf = value
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    if isinstance(leaf, Tensor):  # a list of tensors; numpy would lose their dtype and device
        return _stack(value, what)
    if isinstance(leaf, Mapping):
        raise TypeError(
            f"{what} is a list of dicts, expected one array: put the numbers of each name "
            "together, rows first, and make one array of them by vm.Parts(...).pack"
        )
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} is not one array: its rows differ in shape ({error})") from error
    if array.dtype.kind == "c":
        raise TypeError(f"{what} is complex: give the real and imaginary parts as two columns")
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{what} has dtype {array.dtype}, expected real numbers: code categories as 0, 1, 2, "
            "... and give numbers as float64, e.g. with np.asarray(values, dtype=float)"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > LARGEST:
        _refuse_large(array, what)
    # type(), not isinstance(): np.float64 is a subclass of float, and its precision was chosen
    if array.dtype.kind == "f" and type(leaf) in (float, int, bool, list, tuple):
        wide = torch.tensor(array.tolist(), dtype=torch.float64).reshape(array.shape)
        return to_dtype(wide, torch.get_default_dtype(), what)
    whole: Any = array.dtype if array.dtype == np.uint8 else np.int64
    kind: Any = whole if array.dtype.kind in "iub" else array.dtype.newbyteorder("=")
    # torch can read neither negative strides nor foreign byte orders
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))


def _refuse_dict(value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        return
    if what.endswith(" y"):
        raise TypeError(
            f"{what} is a dict of several arrays, but a row of y is one: give several responses as "
            "columns"
        )
    shapes = ", ".join(f"{name}={tuple(np.shape(part)[1:])}" for name, part in value.items())
    raise TypeError(
        f"{what} is a dict of several arrays, but a row of x is one: write parts = "
        f"vm.Parts({shapes}), give parts.pack(x), and take it apart in the network's forward by "
        "parts.unpack(x)"
    )


def _refuse_masked(value: Any, what: str) -> None:
    """numpy and torch hand out the numbers under a mask as if they were data."""
    if isinstance(value, np.ma.MaskedArray):
        hidden = np.ma.getmaskarray(value)
        if hidden.any():
            row = int(np.argwhere(np.atleast_1d(hidden))[0, 0])
            raise ValueError(
                f"{what}, row {row} (counted from 0), is masked, {int(hidden.sum())} of "
                f"{counted(hidden.size, 'number')} in all: drop these rows (a row is given or "
                "not), impute them, or take .data if the mask means nothing"
            )
    elif isinstance(value, MaskedTensor):
        raise TypeError(
            f"{what} is a MaskedTensor: drop the rows that it masks, and give .get_data()"
        )
    elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (int, float, str)):
        for part in value:
            _refuse_masked(part, what)
    elif isinstance(value, (list, tuple)) and any(part is np.ma.masked for part in value):
        _refuse_masked(
            np.ma.masked_array([0.0] * len(value), [part is np.ma.masked for part in value]), what
        )


def _refuse_large(array: np.ndarray, what: str) -> None:
    row = int(np.argwhere(np.atleast_1d(array) > LARGEST)[0, 0])
    raise ValueError(
        f"{what}, row {row} (counted from 0), is {array[array > LARGEST].reshape(-1)[0]}, beyond "
        f"the integers that are kept (int64, up to {LARGEST}): give floats, or labels 0, 1, 2, ..."
    )


def to_dtype(tensor: Tensor, dtype: torch.dtype | None, what: str) -> Tensor:
    """In another dtype, which must hold the numbers.

    Finite data stay finite, and integers, which may be tokens or classes, stay themselves.

    Raises ValueError that names the row.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    new = tensor.to(dtype)
    if dtype.is_floating_point and tensor.numel():
        lost = torch.isfinite(tensor) & ~torch.isfinite(new)
        if bool(lost.any()):
            rows = lost.reshape(len(lost), -1) if lost.dim() else lost.reshape(1, 1)
            row = int(rows.any(-1).nonzero()[0])
            bad = tensor.reshape(len(rows), -1)[row][rows[row]][0].item()
            raise ValueError(
                f"{what}, row {row} (counted from 0), is {bad:g}, which "
                f"{str(dtype).removeprefix('torch.')} cannot hold (up to "
                f"{torch.finfo(dtype).max:g}): use dtype=torch.float64, or smaller units"
            )
        if not tensor.is_floating_point():
            _refuse_rounded(tensor, new, what)
    return new


def largest_whole(dtype: torch.dtype) -> int:
    """Up to where every whole number has its own place in a floating dtype: 2^24 in float32."""
    return int(2 / torch.finfo(dtype).eps)


def _refuse_rounded(whole: Tensor, new: Tensor, what: str) -> None:
    most = largest_whole(new.dtype)
    beyond = (whole > most) | (whole < -most)
    if not bool(beyond.any()):
        return
    beyond &= new.to(whole.dtype) != whole
    at = beyond.reshape(len(whole), -1) if whole.dim() else beyond.reshape(1, 1)
    if bool(at.any()):
        row = int(at.any(-1).nonzero()[0])
        number, other = (int(v.reshape(len(at), -1)[row][at[row]][0]) for v in (whole, new))
        raise ValueError(
            f"{what}, row {row} (counted from 0), is {number}, which "
            f"{str(new.dtype).removeprefix('torch.')} rounds to {other}: it holds whole numbers up "
            f"to {most}, so use float64 (dtype=torch.float64), or smaller numbers"
        )


def _stack(value: Sequence[Any], what: str) -> Tensor:
    try:
        return torch.stack(
            [v.detach() if isinstance(v, Tensor) else _stack(v, what) for v in value]
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{what} is not one array: its rows differ in shape, dtype or device ({error})"
        ) from error


def as_part(pair: Any, what: str) -> Part | None:
    """(x, y) as tensors with one row per point each, or None; `what` as in "task 'a': support"."""
    if pair is None:
        return None
    numbers = (
        isinstance(pair, (tuple, list))
        and pair
        and all(isinstance(value, (int, float)) for value in pair)
    )
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or numbers:
        length = f" of length {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise TypeError(
            f"{what} is a {type(pair).__name__}{length}{' of numbers' * bool(numbers)}, expected a "
            "pair (x, y), or None where there are no data: write Task(support=(x, y), query=(x, y))"
        )
    x, y = as_tensor(pair[0], f"{what} x"), as_tensor(pair[1], f"{what} y")
    y = y.to(torch.int64) if y.dtype == torch.uint8 else y
    for name, tensor in (("x", x), ("y", y)):
        if tensor.dim() == 0:
            raise ValueError(
                f"{what} {name} is a single number, expected one row per point: give "
                f"[{tensor.item()}]"
            )
    if len(x) != len(y):
        raise ValueError(
            f"{what} x has {len(x)} rows but y has {len(y)}: give one row of each per point"
        )
    for name, tensor in (("x", x), ("y", y)):
        refuse_non_finite(tensor, f"{what} {name}")
    return x, y


def refuse_non_finite(tensor: Tensor, what: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        row = int((~finite).reshape(len(tensor), -1).any(-1).nonzero()[0])
        bad = tensor[row][~finite[row]].reshape(-1)[0].item()
        count = int((~finite).reshape(len(tensor), -1).any(-1).sum())
        raise ValueError(
            f"{what}, row {row} (counted from 0), is {bad}; {count} of "
            f"{counted(len(tensor), 'row')} {'is' if count == 1 else 'are'} not finite: drop these "
            "rows or impute them; a task without data is Task(support=None)"
        )
