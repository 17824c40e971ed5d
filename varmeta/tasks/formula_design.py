"""The design of a formula: which columns x has, which of them vary, and tables through it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import one_of
from varmeta.tasks.formula_columns import INTERCEPT, Columns, many_numbers, names_in
from varmeta.tasks.formula_missing import Lacking
from varmeta.tasks.formula_probe import probe_of
from varmeta.tasks.formula_response import Response
from varmeta.tasks.formula_text import Varying, read_formula
from varmeta.tasks.taskset import TaskSet

if TYPE_CHECKING:
    import pandas as pd

Missing = Literal["refuse", "drop"]
TASK, QUERY = "(task)", "(query)"
# Less than this share of a column left by those before it is rounding.
_RANK = 1e-10


class FormulaDesign:
    """What a formula makes of a table, remembered for other tables.

    names: what else than columns the formula may name, beside numpy's functions.
    weights: a column of weights, the last of y.

    columns: of x, in order, but for the intercept; offsets: those whose coefficient is 1.
    fixed: the names of the fixed effects, the intercept's too.
    blocks: the names of what varies, of each term by itself; those of a term are correlated.
    numbers_as_text: the columns of text that are read as factors although they hold numbers.
    """

    def __init__(
        self,
        formula: str,
        frame: pd.DataFrame,
        names: Mapping[str, Any],
        weights: str | None,
        missing: Missing,
    ) -> None:
        one_of("missing", missing, get_args(Missing))
        self.formula, self.weights, self.missing = formula, weights, missing
        self.text = read_formula(formula)
        frame = self._complete(frame)
        self.response = Response(self.text.response, frame, names)
        fixed = Columns(self.text.fixed, frame, names)
        _check_rank(fixed, formula)
        self.fixed = fixed.labels
        # where each column of x is found: the part and the position in it
        self._parts, self._at = [fixed], {label: (0, i) for i, label in enumerate(fixed.labels)}
        self.blocks: tuple[tuple[str, ...], ...] = ()
        for term in self.text.varying:
            for part in _parts_of(term, frame, names):
                self._add_block(part)
        if not self.blocks:
            raise ValueError(f"{formula!r} has no term that varies: (0 | g) is nothing")
        offsets = [Columns(f"0 + {text}", frame, names) for text in self.text.offsets]
        self.offsets: tuple[str, ...] = tuple(part.labels[0] for part in offsets)
        for part in offsets:
            self._at[part.labels[0]] = len(self._parts), 0
            self._parts.append(part)
        self.columns: tuple[str, ...] = tuple(label for label in self._at if label != INTERCEPT)
        texts = [*self._texts, *([self.text.response] if self.response.remembers else [])]
        used = {name for text in texts for name in names_in(text)}
        named = frame[[name for name in frame.columns if name in used]]
        self._probe: dict[str, list[Any]] = probe_of(named)
        texts_of_numbers = (name for name in named if many_numbers(named[name]))
        self.numbers_as_text: tuple[str, ...] = tuple(texts_of_numbers)

    def kept(self) -> dict[str, Any]:
        """How tables are read, as plain values for a file: see `difference`."""
        return {
            "formula": self.formula,
            "response": self.text.response,
            "weights": self.weights,
            "columns": list(self.columns),
            "rows": self._probe,
            "read": self._read(self._probe).tolist(),
        }

    def difference(self, kept: Mapping[str, Any]) -> str | None:
        """How another design read tables in another way; None where it did not."""
        for what, own in (("response", self.text.response), ("weights", self.weights)):
            if kept[what] != own:
                return f"its {what} was {kept[what]!r}, but is {own!r}"
        if kept["columns"] != list(self.columns):
            return f"its columns of x were {kept['columns']}, but are {list(self.columns)}"
        try:
            now = self._read(kept["rows"])
        except ValueError as error:
            return f"{kept['formula']!r} read rows that {self.formula!r} does not: {error}"
        before = np.asarray(kept["read"], float).reshape(now.shape)
        off = ~np.isclose(before, now, rtol=1e-6, atol=1e-9, equal_nan=True)
        if not off.any():
            return None
        row, column = (int(at) for at in np.argwhere(off)[0])
        label = (*self.columns, kept["response"])[column]
        named = (name for name in kept["rows"] if name in names_in(label))
        given = ", ".join(f"{name} = {_short(kept['rows'][name][row])}" for name in named)
        return (
            f"of {given} its formula made {label!r} = {before[row, column]:.6g}, "
            f"but makes {now[row, column]:.6g} now: means, knots and levels belong to the table "
            "that a formula is read with"
        )

    def _read(self, rows: Mapping[str, Any]) -> np.ndarray:
        import pandas as pd

        frame = pd.DataFrame(rows)
        y = self.response.of(frame) if self.response.remembers else {}
        return np.column_stack([self._x(frame), *y.values()])

    @property
    def has_intercept(self) -> bool:
        return INTERCEPT in self._at

    @property
    def varying(self) -> tuple[str, ...]:
        """The names of all that varies."""
        return tuple(name for block in self.blocks for name in block)

    def _add_block(self, part: Columns) -> None:
        """Columns that vary and are correlated; one of the same values is not kept twice."""
        names: list[str] = []
        for position, label in enumerate(part.labels):
            own = part.values[:, position]
            if label in self._at and not np.array_equal(self._values(label), own):
                # of the same name and other contrasts
                label = f"{label}|{':'.join(self.text.group)}"
            if label in (*self.varying, *names):
                raise ValueError(
                    f"{label!r} varies in several terms of {self.formula!r}, which no data tell "
                    "apart: name it in one (0 + x, or ||, leaves the intercept to another)"
                )
            self._at.setdefault(label, (len(self._parts), position))
            names.append(label)
        self._parts.append(part)
        self.blocks += (tuple(names),) if names else ()

    def _values(self, label: str) -> np.ndarray:
        part, position = self._at[label]
        return self._parts[part].values[:, position]

    # -- tables ------------------------------------------------------------------------------------

    def x(self, frame: pd.DataFrame) -> Tensor:
        """x of a table's rows, in their order, `(rows, columns)`, float64.

        Raises ValueError as `tasks`, but that no response is needed, and for rows that lack a value
        whatever the formula says of them: each row has its place.
        """
        used = {name for text in self._texts for name in names_in(text)}
        lacking = Lacking(frame, used, (), ())
        lacking.refuse("drop them with frame.dropna(), or impute them")
        return torch.from_numpy(self._x(frame))

    def tasks(self, frame: pd.DataFrame, query: str | None = None) -> TaskSet:
        """The tasks of a table, which may have other groups: see `FormulaModel.tasks`."""
        import pandas as pd

        frame = self._complete(frame, query, tell=True)
        group = [frame[name].astype(str) for name in self.text.group]
        one = frame[self.text.group[0]] if len(group) == 1 else group[0].str.cat(group[1:], ":")
        found: dict[str, Any] = {TASK: one}
        found |= dict(zip(self.columns, self._x(frame).T, strict=True))
        y = self.response.of(frame)
        if self.weights is not None:
            y[self.weights if self.weights not in found else f"{self.weights} "] = frame[
                self.weights
            ]
        found |= y
        if query is not None:
            found[QUERY] = frame[query]
        table = pd.DataFrame(found, index=frame.index)
        names = list(y)
        return TaskSet.from_frame(
            table,
            task=TASK,
            x=list(self.columns),
            y=names if len(names) > 1 else names[0],
            query=None if query is None else QUERY,
        )

    def _x(self, frame: pd.DataFrame) -> np.ndarray:
        parts = [part.of(frame) for part in self._parts]
        found = [parts[part][:, at] for part, at in (self._at[name] for name in self.columns)]
        return np.column_stack(found).astype(float) if found else np.zeros((len(frame), 0))

    @property
    def _texts(self) -> list[str]:
        """The texts of what stands in x."""
        return [part.terms for part in self._parts]

    def _complete(
        self, frame: pd.DataFrame, query: str | None = None, tell: bool = False
    ) -> pd.DataFrame:
        """The table without rows that lack a value, where the formula says to drop them.

        tell: warn of what is left out.

        Raises as `Lacking`, and ValueError for missing values where they are not dropped.
        """
        needed = [name for name in (*self.text.group, self.weights, query) if name is not None]
        lacking = Lacking(frame, names_in(self.formula), needed, self.text.group)
        if self.missing == "refuse":
            lacking.refuse("missing='drop' leaves such rows out, or impute them")
        elif lacking.rows.all():
            lacking.refuse("no others are left")
        elif tell and lacking.rows.any():
            warnings.warn(f"left out: {lacking.in_words()}", RuntimeWarning, stacklevel=4)
        return frame[~lacking.rows] if lacking.rows.any() else frame


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def _parts_of(term: Varying, frame: pd.DataFrame, names: Mapping[str, Any]) -> list[Columns]:
    """The columns of `(terms | group)`, of `(terms || group)` for each of the terms.

    A factor by itself has a column for each of its levels, and these are correlated, as in lme4.
    """
    whole = Columns(term.terms, frame, names)
    if term.correlated:
        return [whole]
    parts = [Columns("1", frame, names)] if INTERCEPT in whole.labels else []
    return [*parts, *(Columns(f"0 + {one}", frame, names) for one in whole.terms_of)]


def _check_rank(fixed: Columns, formula: str) -> None:
    """Raise ValueError, by name, for fixed effects that follow from those before them."""
    values = fixed.values.astype(float)
    size = np.linalg.norm(values, axis=0)
    if values.shape[1] == 0 or not np.isfinite(size).all():  # which the tasks say better
        return
    r: np.ndarray = np.linalg.qr(values / np.where(size > 0, size, 1.0)).R
    left = np.zeros(values.shape[1])
    left[: min(values.shape)] = np.abs(np.diagonal(r))
    lost = [name for name, share in zip(fixed.labels, left, strict=True) if share <= _RANK]
    if lost:
        raise ValueError(
            f"the fixed effects {lost} of {formula!r} follow from those before them in all rows "
            "(a column that never changes, a sum of others, a combination of levels without rows):"
            " leave them out"
        )
