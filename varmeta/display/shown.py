"""What a notebook shows of an object: a few lines of text over its table, whatever its size."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROWS, COLUMNS = 20, 12


class Shown:
    """An object with a `frame()`, whose first rows a notebook shows below the object's text.

    `_headline` is the text, by default the repr; `_table` the table, by default `frame()`, None for
    none.
    """

    def _headline(self) -> str:
        return repr(self)

    def _table(self) -> pd.DataFrame | None:
        made: Any = self
        table: pd.DataFrame = made.frame()
        return table

    def _repr_html_(self) -> str:
        text = f"<pre>{escape(self._headline())}</pre>"
        table = self._table()
        return f"<div>{text}{'' if table is None else html_of(table)}</div>"


def html_of(table: pd.DataFrame) -> str:
    """The first and last rows and columns of a table, and its size where that is not all.

    >>> import pandas as pd
    >>> "<p>100 rows" in html_of(pd.DataFrame({"x": range(100)}))
    True
    """
    is_cut = len(table) > ROWS or table.shape[1] > COLUMNS
    text: str = table.to_html(
        max_rows=ROWS,
        max_cols=COLUMNS,
        border=0,
        float_format="{:.4g}".format,
        show_dimensions=is_cut,
        notebook=True,
    )
    return text
