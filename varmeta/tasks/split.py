"""Which of each task's rows stay support when the rest becomes query."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor

from varmeta.tasks.rows import Rows


def kept_rows(rows: Rows, num_support: int | float, seed: int, ids: Tensor) -> Tensor:
    """True for the rows that are kept, `(rows,)`, chosen at random: see `TaskSet.split`.

    ids: the tasks' numbers, which choose with the seed, int64 `(tasks,)`.
    """
    is_count = isinstance(num_support, (int, np.integer)) and not isinstance(num_support, bool)
    if not (
        num_support >= 0 if is_count else isinstance(num_support, float) and 0 < num_support < 1
    ):
        raise ValueError(
            f"num_support is {num_support!r}, expected a count 0, 1, 2, ... or a fraction like 0.5"
        )
    if operator.index(seed) < 0:
        raise ValueError(f"seed is {seed}, expected 0, 1, 2, ...")
    kept = np.zeros(len(rows.x), bool)
    begins = rows.offsets.tolist()
    for begin, end, task in zip(begins, begins[1:], ids.tolist(), strict=False):
        size = end - begin
        keep = min(int(num_support), size)
        if isinstance(num_support, float):
            keep = min(max(round(num_support * size), 1), max(size - 1, 1))
        # a generator of the task's own, made only where there is something to choose
        if 0 < keep < size:
            chosen = np.random.default_rng((seed, task)).permutation(size)[:keep]
            kept[begin + chosen] = True
        else:
            kept[begin:end] = keep > 0
    return torch.from_numpy(kept).to(rows.x.device)
