"""Many rows of numbers as a few tensors, and back: what a file holds of a history."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = list[dict[str, float]]
Columns = dict[str, tuple[Tensor, Tensor]]


def columns_of(rows: Rows) -> Columns:
    """By name, the rows that have the number, int64, and the numbers: int64 or float64, `(rows,)`.

    >>> columns_of([{"step": 1, "loss": 0.5}, {"step": 2}])["loss"]
    (tensor([0]), tensor([0.5000], dtype=torch.float64))
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    found: Columns = {}
    for name in names:
        at = [i for i, row in enumerate(rows) if name in row]
        values = [rows[i][name] for i in at]
        whole = all(isinstance(value, int) for value in values)
        kind = torch.int64 if whole else torch.float64
        found[name] = torch.tensor(at, dtype=torch.int64), torch.tensor(values, dtype=kind)
    return found


def rows_of(columns: Columns, number: int) -> Rows:
    """So many rows of the columns.  Raises IndexError for one that is not among them.

    >>> rows_of(columns_of([{"step": 1, "loss": 0.5}, {"step": 2}]), 2)
    [{'step': 1, 'loss': 0.5}, {'step': 2}]
    """
    rows: Rows = [{} for _ in range(number)]
    for name, (at, values) in columns.items():
        for i, value in zip(at.tolist(), values.tolist(), strict=True):
            rows[i][name] = value
    return rows
