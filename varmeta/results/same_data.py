"""Whether two fits were made to the same responses, task by task."""

from __future__ import annotations

import numpy as np
import torch

from varmeta._checks import counted
from varmeta.tasks import TaskSet
from varmeta.tasks.rows import Rows


def other_data(one: TaskSet, other: TaskSet, names: tuple[str, str]) -> str | None:
    """Where the second set's responses are not the first one's, in words; None where they are.

    names: what the two are called.  Tasks go by theirs, and rows of a task may stand in another
    order.
    """
    for here, there, name in ((one, other, names[0]), (other, one, names[1])):
        alone = set(here.names) - set(there.names)
        if alone:
            first = next(task for task in here.names if task in alone)
            more = f" and {counted(len(alone) - 1, 'task')} more" if len(alone) > 1 else ""
            return f"task {first!r}{more} is in {name!r} only"
    if one.names != other.names:
        position = {task: i for i, task in enumerate(other.names)}
        other = other[[position[task] for task in one.names]]
    return _other_rows(one, other, names)


def _other_rows(one: TaskSet, other: TaskSet, names: tuple[str, str]) -> str | None:
    ours, theirs = one.support_rows, other.support_rows
    counts = ours.counts.tolist(), theirs.counts.tolist()
    for task, mine, its in zip(one.names, *counts, strict=True):
        if mine != its:
            return (
                f"task {task!r} has {counted(mine, 'row')} in {names[0]!r} and {its} in "
                f"{names[1]!r}: give both the same rows (drop a row with a missing predictor from "
                "both)"
            )
    shapes = [tuple(rows.y.shape[1:]) for rows in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return (
            f"y of a row has the shape {shapes[0]} in {names[0]!r} and {shapes[1]} in {names[1]!r}"
        )
    precision = torch.float32 if torch.float32 in (ours.y.dtype, theirs.y.dtype) else torch.float64
    found = [_ordered(rows, precision) for rows in (ours, theirs)]
    differs = (found[0] != found[1]).any(1)
    if not differs.any():
        return None
    at = int(differs.argmax())
    column = 1 + int((found[0][at, 1:] != found[1][at, 1:]).argmax())
    values = [
        f"{table[at, column]:.6g} in {name!r}" for table, name in zip(found, names, strict=True)
    ]
    return (
        f"task {one.names[int(found[0][at, 0])]!r} has other y, such as {' and '.join(values)}: a "
        "density has the units of y, so standardise or transform it for both or for neither"
    )


def _ordered(rows: Rows, precision: torch.dtype) -> np.ndarray:
    """Each row's task and y, `(rows, 1 + responses)`, in ascending order."""
    y = rows.y.to("cpu", precision).double().reshape(len(rows.y), -1)
    table = torch.cat([rows.owner.cpu().double().unsqueeze(1), y], 1).numpy()
    ordered: np.ndarray = table[np.lexsort(table.T[::-1])]
    return ordered
