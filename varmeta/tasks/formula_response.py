"""The left side of a formula: y of a table's rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta.tasks.formula_columns import FUNCTIONS, Columns

if TYPE_CHECKING:
    import pandas as pd

# Two columns, and a column of 0 and 1: what formulae makes of them depends on no other rows.
_STATELESS = re.compile(r"(proportion|prop|p)\s*\(.*\)|[^\[]+\[.*\]", re.DOTALL)


class Response:
    """y of `y ~`, `log(y) ~`, `proportion(successes, trials) ~`, `answer['yes'] ~`.

    Raises ValueError for a factor of which no level is named, and for several terms.
    """

    def __init__(self, text: str, frame: pd.DataFrame, names: Mapping[str, Any]) -> None:
        self.text, self.names = text, names
        self._columns = None
        if _STATELESS.fullmatch(text):
            return
        self._columns = Columns(f"0 + {text}", frame, names)
        if self._columns.has_levels:
            raise ValueError(
                f"the response {text!r} is a factor: name the level that counts as 1, such as "
                f"{text}[{self._columns.labels[0].partition('[')[2][:-1]!r}] ~ ..., or make "
                "numbers of its levels"
            )
        if len(self._columns.labels) != 1:
            raise ValueError(
                f"the response {text!r} is {len(self._columns.labels)} columns: write one, sums "
                "and products as I(a + b)"
            )

    @property
    def remembers(self) -> bool:
        """Whether a table's y may depend on the table that the formula was read with."""
        return self._columns is not None

    def of(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """The columns of y of a table's rows, by name."""
        if self._columns is not None:
            return {self.text: self._columns.of(frame)[:, 0]}
        from formulae import design_matrices
        from formulae.environment import Environment

        env = Environment([self.names, FUNCTIONS])
        found = design_matrices(f"{self.text} ~ 1", frame, na_action="pass", env=env).response
        values = np.asarray(found.design_matrix)
        if values.ndim == 1:
            return {self.text: values}
        return {
            f"{self.text}[{what}]": values[:, i] for i, what in enumerate(("successes", "trials"))
        }
