"""A long table, one row per observation, becomes the rows of its groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import counted, nearest
from varmeta.tasks.arrays import LARGEST
from varmeta.tasks.common import in_precision
from varmeta.tasks.features import as_features
from varmeta.tasks.rows import Rows

if TYPE_CHECKING:
    import pandas as pd

Columns = str | Sequence[str]


@dataclass(frozen=True)
class Table:
    """A long table by its tasks, in order of first appearance; a task's rows keep their order.

    features: by name, `(tasks,)`, float64.
    """

    names: list[str]
    support: Rows
    query: Rows
    features: dict[str, Tensor]


def table_of_frame(
    frame: pd.DataFrame,
    task: str,
    x: Columns,
    y: Columns,
    query: str | None,
    features: Sequence[str],
) -> Table:
    """Columns of a table, checked once for all tasks, as rows in one floating dtype.

    Raises ValueError, with the row's label in the table, for missing columns or values, and for a
    feature that differs within a task; TypeError for a column that is not numeric.
    """
    if not hasattr(frame, "columns"):
        raise TypeError(f"expected a pandas DataFrame, got {type(frame).__name__}")
    if not len(frame):
        raise ValueError("the table has no rows: give at least one observation")
    _refuse_twice(task, x, y)
    codes, names = _tasks(frame, task)
    rows_of = _RowNames(frame, names, codes)
    xs, ys = _block(frame, x, rows_of), _block(frame, y, rows_of)
    if ys.ndim == 2 and not ys.shape[1]:
        raise ValueError("y=[] has no columns: name at least one")
    is_query = None if query is None else _flags(frame, query, rows_of)
    if isinstance(features, str):
        raise TypeError(
            f"features must list column names, not the string {features!r}: write [{features!r}]"
        )
    order = np.argsort(codes, kind="stable")
    first = order[np.concatenate([[0], np.bincount(codes).cumsum()[:-1]])]
    known = {name: _feature(frame, name, codes, first, rows_of) for name in features}
    # the first task's, for names that are no strings; the numbers have been checked
    as_features([{name: float(value[0]) for name, value in known.items()}], names[:1])
    asked = np.zeros(len(order), bool) if is_query is None else is_query[order]
    support, held_out = (
        _rows(xs, ys, codes, at, names, what)
        for what, at in (("support", order[~asked]), ("query", order[asked]))
    )
    return Table(names, support, held_out, known)


def _refuse_twice(task: str, x: Columns, y: Columns) -> None:
    """Raise ValueError for a column that has two parts to play."""
    xs, ys = ([names] if isinstance(names, str) else [*names] for names in (x, y))
    for what, names in (("x", xs), ("y", ys)):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{what} names the column {twice[0]!r} twice: name it once")
    both = [name for name in xs if name in ys]
    if both:
        raise ValueError(
            f"the column {both[0]!r} is among x and among y, so that y predicts itself: leave it "
            "out of one"
        )
    if task in (*xs, *ys):
        raise ValueError(
            f"the column {task!r} says which task a row belongs to, and is among "
            f"{'x' if task in xs else 'y'} too: leave it out, or copy it under another name"
        )


def of_dates(name: str) -> TypeError:
    """What to do with a column that holds dates."""
    return TypeError(
        f"column {name!r} holds dates or times, expected numbers: count from a day, such as "
        f"(frame[{name!r}] - frame[{name!r}].min()) / pandas.Timedelta(days=1)"
    )


def _tasks(frame: pd.DataFrame, task: str) -> tuple[np.ndarray, list[str]]:
    """For each row the position of its task, and the tasks' names."""
    codes, values = _column(frame, task).factorize()
    if (codes < 0).any():
        where = np.flatnonzero(codes < 0)
        raise ValueError(
            f"column {task!r} is missing in {counted(len(where), 'row')}, first in row "
            f"{label_of(frame, where[0])}: every row must belong to a task; drop them with "
            f"frame.dropna(subset=[{task!r}])"
        )
    return codes, [str(value) for value in values.tolist()]


def _rows(
    xs: np.ndarray, ys: np.ndarray, codes: np.ndarray, at: np.ndarray, names: list[str], what: str
) -> Rows:
    """The rows at the positions `at`, which are sorted by task, as tensors of their own."""
    counts = torch.from_numpy(np.bincount(codes[at], minlength=len(names)))
    rows = Rows(torch.from_numpy(xs[at]), torch.from_numpy(ys[at]), counts)
    # one table, so its columns are brought to their common precision instead of refused
    floating = [part.dtype for part in (rows.x, rows.y) if part.is_floating_point()]
    kind = reduce(torch.promote_types, floating) if floating else torch.float64
    return rows.mapped(lambda part, name: in_precision(part, kind, name, what), names)


def _feature(
    frame: pd.DataFrame, name: str, codes: np.ndarray, first: np.ndarray, rows_of: _RowNames
) -> Tensor:
    """A column of one value per task, `(tasks,)`, float64; `first`: each task's first row."""
    column = _numbers(frame, name, rows_of)
    expected = column[first][codes]
    if (column != expected).any():
        at = int(np.flatnonzero(column != expected)[0])
        raise ValueError(
            f"the feature {name!r} is {column[at]} in {rows_of(at)}, but {expected[at]} in "
            f"{rows_of(first[codes[at]])}: a feature has one value per task; what differs "
            "between rows belongs to x"
        )
    return torch.from_numpy(column[first].astype(np.float64))


class _RowNames:
    """Says "row 17 (task 'CASS')" for a position in the table."""

    def __init__(self, frame: pd.DataFrame, names: list[str], codes: np.ndarray) -> None:
        self.frame, self.names, self.codes = frame, names, codes

    def __call__(self, position: int) -> str:
        return f"row {label_of(self.frame, position)} (task {self.names[self.codes[position]]!r})"


def label_of(frame: pd.DataFrame, position: int) -> str:
    """What the row at a position is called in the table."""
    label = frame.index[int(position)]
    return repr(label.item() if isinstance(label, np.generic) else label)


def _column(frame: pd.DataFrame, name: Any) -> pd.Series:
    if not isinstance(name, str) and isinstance(name, Sequence):
        raise TypeError(
            f"expected one column name, got {name!r}: join several columns into one first"
        )
    if name not in frame.columns:
        hint = (
            ": it is in the index, so call frame.reset_index() first"
            if name in frame.index.names
            else ""
        )
        raise ValueError(
            f"the table has no column {name!r}{hint}; its columns are {list(frame.columns)}"
            f"{nearest(name, frame.columns)}"
        )
    column = frame[name]
    if column.ndim != 1:
        raise ValueError(f"the table has several columns called {name!r}: rename them")
    return column


def _numbers(frame: pd.DataFrame, name: str, rows_of: _RowNames) -> np.ndarray:
    """One column as a finite array of real numbers; whole numbers and booleans as int64."""
    column = _column(frame, name)
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"column {name!r} is missing in {counted(missing.sum(), 'row')}, first in "
            f"{rows_of(int(missing.argmax()))}: drop them with frame.dropna(subset=[{name!r}]), or "
            "impute them"
        )
    array = np.asarray(column.to_numpy())
    # a period is a month or a year
    if array.dtype.kind in "mM" or str(column.dtype).startswith(("datetime", "period")):
        raise of_dates(name)
    if array.dtype.kind == "O" and getattr(column.dtype, "kind", "O") in "fiub":
        array = array.astype(
            column.dtype.kind + "8"
        )  # pandas' nullable numbers, in versions that give objects
    if (
        array.dtype.kind not in "fiub"
        or array.dtype.itemsize > 8
        or str(column.dtype) == "category"
    ):
        raise TypeError(
            f"column {name!r} has dtype {column.dtype}{_first_word(column, rows_of)}, expected "
            f"numbers: for classes use frame[{name!r}].astype('category').cat.codes, for "
            "predictors pandas.get_dummies or vm.from_formula, for text pandas.to_numeric"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(
            f"column {name!r} is {array[first]} in {rows_of(first)}: drop the row or impute it"
        )
    if array.dtype.kind == "u" and array.size and array.max() > LARGEST:
        first = int(array.argmax())
        raise ValueError(
            f"column {name!r} is {array[first]} in {rows_of(first)}, beyond the integers that are "
            f"kept (int64, up to {LARGEST}): give floats, or labels 0, 1, 2, ..."
        )
    # torch reads no foreign byte order
    kind = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.int64
    return array.astype(kind, copy=False)


def _first_word(column: pd.Series, rows_of: _RowNames) -> str:
    """The first entry that is no number, in a column that is meant to hold numbers."""
    import pandas as pd

    words = np.flatnonzero(pd.to_numeric(column.astype(object), errors="coerce").isna())
    if not len(words):
        return ""
    return f" and is {column.iloc[int(words[0])]!r} in {rows_of(int(words[0]))}"


def _block(frame: pd.DataFrame, names: Columns, rows_of: _RowNames) -> np.ndarray:
    """A column `(rows,)`, or a list of k columns `(rows, k)` in their common dtype."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        return _numbers(frame, names, rows_of)
    if not names:  # whole numbers, so that the dtype is decided by y
        return np.zeros((len(frame), 0), np.int64)
    return np.stack([_numbers(frame, name, rows_of) for name in names], axis=1)


def _flags(frame: pd.DataFrame, name: str, rows_of: _RowNames) -> np.ndarray:
    array = _numbers(frame, name, rows_of)
    odd = np.flatnonzero((array != 0) & (array != 1))
    if len(odd):
        raise ValueError(
            f"query={name!r} must mark query rows with True or 1 and support rows with False or 0, "
            f"but it is {array[odd[0]]} in {rows_of(odd[0])}"
        )
    return array.astype(bool)
