"""A plain function of one number, as a model and its tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from varmeta.models.model import TaskModel
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.tasks import Task, TaskSet


def model_of_function(
    f: Callable[..., Tensor], precision: float, has_coefficients: bool
) -> TaskModel:
    """The model whose negative log likelihood is f(theta), or f(theta, c).

    c is the x of a task's one data row.

    Raises TypeError for what is no function, and (when it runs) ValueError for one that does not
    keep theta's shape.
    """
    if not callable(f):
        raise TypeError(f"f must be a function of theta, not {type(f).__name__}")

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
        theta = params["theta"]
        value = f(theta, x) if has_coefficients else f(theta)
        if not isinstance(value, Tensor) or value.shape != theta.shape:
            made = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"f must return one number for each theta: of theta {tuple(theta.shape)} and "
                f"coefficients {tuple(x.shape)} it made {made}"
            )
        pyro.factor("f", -value)

    return TaskModel.from_pyro(
        program, {"theta": torch.zeros((), dtype=torch.float64)}, GaussianPrior(precision)
    )


def tasks_of_coefficients(coefficients: Any, query: Any) -> TaskSet:
    """One task per row of coefficients `(tasks, K)`; `query` those of g_i, or None for the same.

    Raises ValueError for tables of another shape.
    """
    rows = _table(torch.zeros(1, 1) if coefficients is None else coefficients, "coefficients")
    asked = rows if query is None else _table(query, "query")
    if asked.shape != rows.shape:
        raise ValueError(
            f"query has shape {tuple(asked.shape)}, but the coefficients of the same tasks have "
            f"{tuple(rows.shape)}"
        )
    nothing = torch.zeros(1, dtype=torch.float64)  # for y, which no function looks at
    return TaskSet(
        [Task((c[None], nothing), (q[None], nothing)) for c, q in zip(rows, asked, strict=True)]
    )


def _table(values: Any, name: str) -> Tensor:
    table = torch.as_tensor(values, dtype=torch.float64)
    if table.dim() != 2 or not len(table):
        raise ValueError(
            f"{name} must have one row per task, (tasks, K), not the shape {tuple(table.shape)}"
        )
    return table
