"""Rows of a table that lack a value: they are refused, or left out, which is said."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from varmeta._checks import counted, nearest
from varmeta.tasks.frame import label_of

if TYPE_CHECKING:
    import pandas as pd

# So many groups are named.
MOST = 5


class Lacking:
    """Which rows of a table lack a value that is used.

    used: columns where there are such, else functions.
    needed: columns in any case.
    group: the columns that say which group a row belongs to.
    rows: whether a row lacks one, `(rows,)`.

    Raises ValueError for a table without rows and for a column that there is not, or twice;
    TypeError for what is no table.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        used: Collection[str],
        needed: Sequence[str],
        group: Sequence[str],
    ) -> None:
        if not hasattr(frame, "columns"):
            raise TypeError(f"expected a pandas DataFrame, got {type(frame).__name__}")
        if not len(frame):
            raise ValueError("the table has no rows: give at least one observation")
        absent = [name for name in needed if name not in frame.columns]
        if absent:
            raise ValueError(
                f"the table has no column {absent[0]!r}; its columns are {list(frame.columns)}"
                f"{nearest(absent[0], frame.columns)}"
            )
        self.found = frame[[name for name in frame.columns if name in used or name in needed]]
        if not self.found.columns.is_unique:
            twice = self.found.columns[self.found.columns.duplicated()][0]
            raise ValueError(f"the table has several columns called {twice!r}: rename them")
        self.frame, self.group = frame, group
        self.rows: np.ndarray = self.found.isna().any(axis=1).to_numpy()

    def refuse(self, advice: str) -> None:
        """Raise ValueError where a row lacks a value."""
        if self.rows.any():
            raise ValueError(f"{self.in_words()}: {advice}")

    def in_words(self) -> str:
        """How many rows, of which column, and which groups have no others."""
        found, lost = self.found, self._lost_groups()
        columns = [str(name) for name in found.columns if found[name].isna().any()]
        more = f" and {len(lost) - MOST} more" if len(lost) > MOST else ""
        named = f" ({', '.join(lost[:MOST])}{more})"
        whole = f", among them all rows of {counted(len(lost), 'group')}{named}" if lost else ""
        return (
            f"{counted(int(self.rows.sum()), 'row')} of {len(found)} lack a value of "
            f"{' or '.join(columns)}, first row {label_of(found, int(self.rows.argmax()))}{whole}"
        )

    def _lost_groups(self) -> list[str]:
        """The groups of which no row is complete."""
        if not self.group or any(name not in self.frame.columns for name in self.group):
            return []
        labels = self.frame[self.group[0]].astype(str)
        for name in self.group[1:]:
            labels = labels.str.cat(self.frame[name].astype(str), ":")
        known = self.frame[[*self.group]].notna().all(axis=1).to_numpy()
        return sorted(set(labels[self.rows & known]) - set(labels[~self.rows]))
