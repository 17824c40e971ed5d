"""Columns that formulae makes of a table for some terms, and again of another table.

Contrasts, knots, means and sds are those of the first table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta._checks import nearest
from varmeta.tasks.frame import of_dates

if TYPE_CHECKING:
    import pandas as pd

INTERCEPT = "Intercept"
# Levels that are written as numbers are often codes; so many are none.
CODES = 10
# What a formula may call without its module, as in R.
FUNCTIONS: Mapping[str, Any] = {
    "np": np,
    **{name: getattr(np, name) for name in ("log", "log2", "log10", "log1p", "exp", "sqrt", "abs")},
}


def names_in(text: str) -> set[str]:
    """The names that stand in a formula, of columns and of functions, without what is quoted."""
    quoted = re.findall(r"`([^`]+)`", text)
    bare = re.sub(r"`[^`]+`|'[^']*'|\"[^\"]*\"", " ", text)
    dotted = re.findall(r"[^\W\d][\w.]*", bare)
    return {*quoted, *dotted, *(name.partition(".")[0] for name in dotted)}


class Columns:
    """The columns of some terms.

    terms: a formula without response, as formulae reads it.
    frame: the table whose levels, means and knots are kept; no value that is used is missing.
    names: what else a formula may name.
    values: `(rows, columns)`; labels: what they are called; terms_of: the text of each term that
        is no intercept; has_levels: whether there is a factor among them.

    Raises ValueError for names of nothing and for what cannot be read; TypeError for dates.
    """

    def __init__(self, terms: str, frame: pd.DataFrame, names: Mapping[str, Any]) -> None:
        from formulae import design_matrices
        from formulae.environment import Environment

        self.terms = terms
        env = Environment([names, FUNCTIONS])
        used = _ordered(frame[[name for name in frame.columns if name in names_in(terms)]])
        try:
            # rows of a table without columns are counted by it
            self._matrix = design_matrices(terms, used, na_action="pass", env=env).common
        except Exception as error:
            raise _said_better(error, terms, frame, names) from error
        self.labels = tuple(_labels(self._matrix))
        size = (len(frame), 0)
        self.values = np.zeros(size) if self._matrix is None else self._matrix.design_matrix
        known = {} if self._matrix is None else self._matrix.terms
        self.terms_of = tuple(name for name in known if name != INTERCEPT)
        self.has_levels = any(term.kind == "categoric" for term in known.values())

    def of(self, frame: pd.DataFrame) -> np.ndarray:
        """The same columns of another table, `(rows, columns)`.

        Raises ValueError, by name, for a level that the first table has not, and for a column that
        is missing.
        """
        if self._matrix is None:
            return np.zeros((len(frame), 0))
        plain = frame[[name for name in frame.columns if name in names_in(self.terms)]]
        plain = plain.astype(
            {name: object for name, column in plain.items() if str(column.dtype) == "category"}
        )
        try:
            return np.asarray(self._matrix.evaluate_new_data(plain).design_matrix)
        except KeyError as error:
            raise ValueError(
                f"the table has no column {error.args[0]!r}, which {self.terms!r} needs; its "
                f"columns are {list(frame.columns)}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"these rows do not fit {self.terms!r}: {error}  A level that was not there when "
                "the formula was read has no coefficient: leave its rows out, or read the formula "
                "with them"
            ) from error


def many_numbers(column: pd.Series) -> bool:
    """Whether it is a column of text whose levels are numbers, and too many to be codes."""
    return _is_text(column) and column.nunique() > CODES and _are_numbers(column)


def _is_text(column: pd.Series) -> bool:
    return str(column.dtype) != "category" and column.dtype.kind not in "iufbcmM"


def _are_numbers(column: pd.Series) -> bool:
    import pandas as pd

    return bool(pd.to_numeric(column.drop_duplicates(), errors="coerce").notna().all())


def _labels(matrix: Any) -> Iterator[str]:
    for term in () if matrix is None else matrix.terms.values():
        yield from [term.labels] if isinstance(term.labels, str) else term.labels


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories in the table's own order, the first as reference, and none without rows."""
    known = {
        name: column.cat.remove_unused_categories().cat.as_ordered()
        for name, column in frame.items()
        if str(column.dtype) == "category"
    }
    return frame.assign(**known) if known else frame


def _said_better(
    error: Exception, terms: str, frame: pd.DataFrame, names: Mapping[str, Any]
) -> Exception:
    """What a mistake in a formula is, in terms of the table."""
    if isinstance(error, KeyError) and error.args:
        name = str(error.args[0])
        return ValueError(
            f"{name!r} in {terms!r} is neither a column nor a function that is known; the columns "
            f"are {list(frame.columns)}{nearest(name, frame.columns)}"
        )
    dates = [
        name
        for name, column in frame.items()
        if name in names_in(terms) and column.dtype.kind in "mM"
    ]
    if dates:
        return of_dates(dates[0])
    text = [name for name, column in frame.items() if name in names_in(terms) and _is_text(column)]
    if text and isinstance(error, TypeError):  # a function of numbers was called
        numbers = all(_are_numbers(frame[name]) for name in text)
        return TypeError(
            f"column {text[0]!r} in {terms!r} holds text, of which no function of numbers can be "
            "made" + (f": frame[{text[0]!r}] = pandas.to_numeric(frame[{text[0]!r}])" * numbers)
        )
    power = ": a power is written **" if "^" in terms else ""
    return ValueError(f"{terms!r} cannot be read as terms of a formula: {error}{power}")
