"""One array from outside becomes one checked tensor; every complaint names the task and the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta._words import counted

Part = tuple[Tensor, Tensor]


def as_tensor(value: Any, what: str) -> Tensor:
    """A dense copy without graph: floating numbers keep their precision, and uint8 (images) stays; other whole numbers and
    booleans become int64.

    Python numbers have no precision of their own and take torch's default dtype.  `what` opens every complaint, e.g.
    "task 'a': support x".  Raises TypeError for what is not made of real numbers, ValueError for a ragged nested list.
    """
    # a copy, because what has been checked must not change when the caller writes into the original
    tensor = value.detach().clone() if isinstance(value, Tensor) else _from_outside(value, what)
    if tensor.is_complex():
        raise TypeError(f"{what} is complex: give the real and imaginary parts as two columns")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor.to(torch.int64)


def _from_outside(value: Any, what: str) -> Tensor:
    leaf = value
    while isinstance(leaf, (list, tuple)) and leaf:
        leaf = leaf[0]
    if isinstance(leaf, Tensor):  # a list of tensors; numpy would lose their dtype and device
        return _stack(value, what)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what} is not one array: its rows differ in shape ({error})") from error
    if array.dtype.kind == "c":
        raise TypeError(f"{what} is complex: give the real and imaginary parts as two columns")
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise TypeError(
            f"{what} has dtype {array.dtype}, expected real numbers: code categories as 0, 1, 2, ... and give numbers "
            "as float64, e.g. with np.asarray(values, dtype=float)"
        )
    # type(), not isinstance(): np.float64 is a subclass of float, and its precision was chosen
    if array.dtype.kind == "f" and type(leaf) in (float, int, bool, list, tuple):
        return torch.tensor(array.tolist(), dtype=torch.get_default_dtype()).reshape(array.shape)
    whole: Any = array.dtype if array.dtype == np.uint8 else np.int64
    kind: Any = whole if array.dtype.kind in "iub" else array.dtype.newbyteorder("=")
    # torch can read neither negative strides nor foreign byte orders
    return torch.from_numpy(np.array(array, dtype=kind, order="C"))


def _stack(value: Sequence[Any], what: str) -> Tensor:
    try:
        return torch.stack([v.detach() if isinstance(v, Tensor) else _stack(v, what) for v in value])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{what} is not one array: its rows differ in shape, dtype or device ({error})") from error


def as_part(pair: Any, what: str) -> Part | None:
    """(x, y) as tensors with one row per point each, or None; `what` as in "task 'a': support"."""
    if pair is None:
        return None
    numbers = isinstance(pair, (tuple, list)) and pair and all(isinstance(value, (int, float)) for value in pair)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or numbers:
        length = f" of length {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise TypeError(
            f"{what} is a {type(pair).__name__}{length}{' of numbers' * bool(numbers)}, expected a pair (x, y), or None where "
            "there are no data: write Task(support=(x, y), query=(x, y))"
        )
    x, y = as_tensor(pair[0], f"{what} x"), as_tensor(pair[1], f"{what} y")
    y = y.to(torch.int64) if y.dtype == torch.uint8 else y
    for name, tensor in (("x", x), ("y", y)):
        if tensor.dim() == 0:
            raise ValueError(f"{what} {name} is a single number, expected one row per point: give [{tensor.item()}]")
    if len(x) != len(y):
        raise ValueError(f"{what} x has {len(x)} rows but y has {len(y)}: give one row of each per point")
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
            f"{what}, row {row} (counted from 0), is {bad}; {count} of {counted(len(tensor), 'row')} "
            f"{'is' if count == 1 else 'are'} not finite: drop these rows or impute them; a task without data is "
            "Task(support=None)"
        )
