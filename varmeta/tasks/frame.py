"""A long table, one row per observation, becomes one (x, y) per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta._checks import counted
from varmeta.tasks.arrays import LARGEST

if TYPE_CHECKING:
    import pandas as pd

ArrayPart = tuple[np.ndarray, np.ndarray]
Columns = str | Sequence[str]


def parts_of_frame(
    frame: pd.DataFrame, task: str, x: Columns, y: Columns, query: str | None
) -> list[tuple[str, ArrayPart, ArrayPart | None]]:
    """(name, support, query) of every group, groups in order of first appearance, rows in the
    table's order.

    Raises ValueError, with the row's label in the table, for missing columns or values; TypeError
    for a column that is not numeric.
    """
    if not hasattr(frame, "columns"):
        raise TypeError(f"expected a pandas DataFrame, got {type(frame).__name__}")
    if not len(frame):
        raise ValueError("the table has no rows: give at least one observation")
    codes, values = _column(frame, task).factorize()
    if (codes < 0).any():
        where = np.flatnonzero(codes < 0)
        raise ValueError(
            f"column {task!r} is missing in {counted(len(where), 'row')}, first in row "
            f"{_label(frame, where[0])}: every row must belong to a task; drop them with "
            f"frame.dropna(subset=[{task!r}])"
        )
    names = [str(value) for value in values.tolist()]
    rows_of = _RowNames(frame, names, codes)
    xs, ys = _block(frame, x, rows_of), _block(frame, y, rows_of)
    if ys.ndim == 2 and not ys.shape[1]:
        raise ValueError("y=[] has no columns: name at least one")
    is_query = np.zeros(len(frame), bool) if query is None else _flags(frame, query, rows_of)
    order = np.argsort(codes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    out = []
    for name, rows in zip(names, groups, strict=True):
        support, held_out = rows[~is_query[rows]], rows[is_query[rows]]
        asked = (xs[held_out], ys[held_out]) if len(held_out) else None
        out.append((name, (xs[support], ys[support]), asked))
    return out


def features_of_frame(
    frame: pd.DataFrame, task: str, names: Sequence[str]
) -> list[dict[str, float]]:
    """The columns `names`, of one value per task, as numbers by name for every group, in order of
    first appearance.

    Raises ValueError for a column that differs within a task, naming two rows; else as
    `parts_of_frame`.
    """
    if isinstance(names, str):
        raise TypeError(
            f"features must list column names, not the string {names!r}: write [{names!r}]"
        )
    codes, values = _column(frame, task).factorize()
    found: list[dict[str, float]] = [{} for _ in values]
    _, first = np.unique(codes, return_index=True)
    rows_of = _RowNames(frame, [str(value) for value in values.tolist()], codes)
    for name in names:
        column = _numbers(frame, name, rows_of)
        expected = column[first][codes]
        if (column != expected).any():
            at = int(np.flatnonzero(column != expected)[0])
            raise ValueError(
                f"the feature {name!r} is {column[at]} in {rows_of(at)}, but {expected[at]} in "
                f"{rows_of(first[codes[at]])}: a feature has one value per task; what differs "
                "between rows belongs to x"
            )
        for known, number in zip(found, column[first].tolist(), strict=True):
            known[name] = float(number)
    return found


class _RowNames:
    """Says "row 17 (task 'CASS')" for a position in the table."""

    def __init__(self, frame: pd.DataFrame, names: list[str], codes: np.ndarray) -> None:
        self.frame, self.names, self.codes = frame, names, codes

    def __call__(self, position: int) -> str:
        return f"row {_label(self.frame, position)} (task {self.names[self.codes[position]]!r})"


def _label(frame: pd.DataFrame, position: int) -> str:
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
            "predictors pandas.get_dummies, for text pandas.to_numeric"
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
    return array if array.dtype.kind == "f" else array.astype(np.int64)


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
