"""Which tasks an index means: one position, a list of them, or a mask."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from torch import Tensor


def position_of(index: Any, number: int) -> int:
    """An integer, from the end where it is negative, as a position among `number` tasks."""
    i = operator.index(index)
    if not -number <= i < number:
        raise IndexError(f"there is no task at position {i}: the set has {number} tasks")
    return i % number


def positions_of(index: Any, number: int) -> np.ndarray:
    """A list of positions, or a mask, as positions among `number` tasks, int64 `(n,)`."""
    array = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
        raise TypeError(f"expected a list of positions or a mask, got {index!r}")
    if array.dtype.kind == "b":
        if len(array) != number:
            raise IndexError(f"the mask has {len(array)} entries but the set has {number} tasks")
        array = np.flatnonzero(array)
    outside = array[(array < -number) | (array >= number)]
    if len(outside):
        position_of(outside[0], number)  # says so
    # not one by one: a landscape asks for 100,000 rows
    return (array % number).astype(np.int64)
