"""The linear predictor of a regression, with a parameter of its own for every column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varmeta._checks import counted, nearest

INTERCEPT = "intercept"


class LinearPredictor(nn.Module):
    """intercept + sum_j x_j coefficient_j, each coefficient a parameter called as its column is.

    A dot, which no parameter's name may have, becomes an underscore there; tables and figures
    show the column's own name.

    So single coefficients can be shared, or get a precision of their own, by name; those of
    `nn.Linear` are one tensor. `y ~ age + dose + (1 + dose | g)` is
    `TaskModel(LinearPredictor(["age", "dose"]), ..., shared=["age"])`.

    columns: the names of x's columns, in x's order, such as `tasks.x_names`; [] leaves the
        intercept alone.
    intercept: whether there is one; it is called "intercept", or as is said here.
    offset: one of the columns (or several) whose coefficient is known to be 1: the logarithm of an
    exposure. x is `(points, columns)`, the output `(points,)`.  All coefficients start at 0.

    Raises ValueError for a name that a parameter cannot have, or that comes twice; TypeError for
    what is no list of names.

    >>> [name for name, _ in LinearPredictor(["age", "dose"]).named_parameters()]
    ['intercept', 'age', 'dose']
    """

    def __init__(
        self, columns: Sequence[str], intercept: bool | str = True, offset: str | Sequence[str] = ()
    ) -> None:
        super().__init__()
        if isinstance(columns, str) or not isinstance(columns, Sequence):
            raise TypeError(
                "columns must list the names of x's columns, such as tasks.x_names, not "
                f"{columns!r}"
            )
        self.columns = tuple(map(str, columns))
        # its name; "" where there is none
        self.intercept_name = INTERCEPT if intercept is True else intercept or ""
        self.offset = (offset,) if isinstance(offset, str) else tuple(map(str, offset))
        unknown = [name for name in self.offset if name not in self.columns]
        if unknown:
            raise ValueError(
                f"offset names {unknown}, but the columns are {list(self.columns)}: name one of "
                f"them{nearest(unknown, self.columns)}"
            )
        free = [name for name in self.columns if name not in self.offset]
        if not free and not intercept:
            raise ValueError(
                "there are neither columns nor an intercept, so there is nothing to learn"
            )
        # by column, without the dots, which make a path in torch
        self.parameter_names = {column: column.replace(".", "_") for column in free}
        if len(self.parameter_names) < len(free):
            twice = next(name for name in free if free.count(name) > 1)
            raise ValueError(f"the column name {twice!r} comes twice: rename it in the table")
        named = [(self.intercept_name, self.intercept_name)] if self.intercept_name else []
        for column, name in (*named, *self.parameter_names.items()):
            if not name or "." in name or hasattr(self, name):  # what a module has itself
                why = (
                    "comes twice"
                    if name in self._parameters
                    else "cannot name a parameter of a module"
                )
                raise ValueError(f"the column name {column!r} {why}: rename it in the table")
            self.register_parameter(name, nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        """The predictions `(points,)` at x `(points, columns)`.

        Raises ValueError for another number of columns.
        """
        if x.shape[-1] != len(self.columns):
            raise ValueError(
                f"the network takes {counted(len(self.columns), 'column')}, x has {x.shape[-1]}"
            )
        out = getattr(self, self.intercept_name) if self.intercept_name else x.new_zeros(())
        if not self.columns:
            return out.expand(len(x))
        one = x.new_ones(())
        return out + x @ torch.stack(
            [
                one if name in self.offset else getattr(self, self.parameter_names[name])
                for name in self.columns
            ]
        )

    def extra_repr(self) -> str:
        names = [f"offset({name})" if name in self.offset else name for name in self.columns]
        return ", ".join((*filter(None, [self.intercept_name]), *names))
