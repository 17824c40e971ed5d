"""The linear predictor of a regression, with a parameter of its own for every column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varmeta._words import counted

INTERCEPT = "intercept"


class LinearPredictor(nn.Module):
    """intercept + sum_j x_j coefficient_j, every coefficient a parameter that is called as its column is.

    So single coefficients can be shared, or get a precision of their own, by name; those of `nn.Linear` are one tensor.
    `y ~ age + dose + (1 + dose | g)` is `TaskModel(LinearPredictor(["age", "dose"]), ..., shared=["age"])`.

    columns: the names of x's columns, in x's order, such as `tasks.x_names`; [] leaves the intercept alone.
    intercept: whether there is one; it is called "intercept".
    x is `(points, columns)`, the output `(points,)`.  All coefficients start at 0.

    Raises ValueError for a name that a parameter cannot have, or that comes twice; TypeError for what is no list of names.

    >>> [name for name, _ in LinearPredictor(["age", "dose"]).named_parameters()]
    ['intercept', 'age', 'dose']
    """

    def __init__(self, columns: Sequence[str], intercept: bool = True) -> None:
        super().__init__()
        if isinstance(columns, str) or not isinstance(columns, Sequence):
            raise TypeError(f"columns must list the names of x's columns, such as tasks.x_names, not {columns!r}")
        self.columns = tuple(map(str, columns))
        self.has_intercept = bool(intercept)
        if not self.columns and not intercept:
            raise ValueError("there are neither columns nor an intercept, so there is nothing to learn")
        for name in (*([INTERCEPT] if intercept else []), *self.columns):
            # names are paths and attributes in torch
            if not name or "." in name or hasattr(self, name):
                why = "comes twice" if name in self._parameters else "cannot name a parameter of a module"
                raise ValueError(f"the column name {name!r} {why}: rename it in the table")
            self.register_parameter(name, nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.columns):
            raise ValueError(f"the network takes {counted(len(self.columns), 'column')}, x has {x.shape[-1]}")
        out = getattr(self, INTERCEPT) if self.has_intercept else x.new_zeros(())
        if not self.columns:
            return out.expand(len(x))
        return out + x @ torch.stack([getattr(self, name) for name in self.columns])

    def extra_repr(self) -> str:
        return ", ".join((*([INTERCEPT] if self.has_intercept else []), *self.columns))
