"""Where a posterior predicts and what it is scored on, checked against the training tasks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.models.check import check_model
from varmeta.models.model import TaskModel
from varmeta.tasks import Batch, Data, Task, TaskSet
from varmeta.tasks.arrays import as_tensor, refuse_non_finite, to_dtype
from varmeta.tasks.rows import Rows
from varmeta.tasks.scaling import Scaling
from varmeta.tasks.taskset import of_rows


def check_columns(tasks: TaskSet, trained: TaskSet) -> None:
    """Raise ValueError for tasks whose x has other columns than the training tasks'.

    Warn where it is not known to be in the same units.
    """
    # tasks without any data do not know their columns
    if not len(tasks.support_rows.x) and not len(tasks.query_rows.x):
        return
    if tasks.x_shape != trained.x_shape:
        raise ValueError(
            f"a row of these tasks' x has shape {tasks.x_shape}, but {trained.x_shape} in the "
            "training tasks: give the same columns; (n,) and (n, 1) differ, see reshape"
        )
    if (
        tasks.x_names is not None
        and trained.x_names is not None
        and tasks.x_names != trained.x_names
    ):
        raise ValueError(
            f"the columns of these tasks' x are {list(tasks.x_names)}, but {list(trained.x_names)} "
            "in the training tasks: give the same columns in the same order"
        )
    sentence = _other_units(tasks.scaling, trained.scaling)
    if sentence is not None:
        warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def _other_units(given: Scaling | None, trained: Scaling | None) -> str | None:
    """A warning where tasks are not known to be in the training tasks' units."""
    if given is trained or (given is not None and trained is not None and given.is_same(trained)):
        return None
    if trained is None:
        return (
            f"these tasks were scaled, by {given!r}, and the fit's tasks were not: give them as "
            "they were before; if the fit's are in these units already, say so by "
            "fit.tasks.scaling = tasks.scaling"
        )
    if given is None:
        return (
            f"the fit's tasks were scaled, by {trained!r}, and these were not: give "
            "fit.tasks.scaling.apply(tasks); if they are in these units already, say so by "
            "tasks.scaling = fit.tasks.scaling"
        )
    return (
        f"these tasks were scaled by {given!r}, but the fit's by {trained!r}: scale them, as they "
        "were before, by fit.tasks.scaling.apply(tasks)"
    )


def points(x: Any, names: Sequence[str], trained: TaskSet, like: Tensor) -> Data:
    """x of `Posterior.predict` as padded data without y.

    In the dtype and on the device of `like`.
    """
    x = _own_rows(x, names, trained) if isinstance(x, TaskSet) else _columns_of(x, trained)
    if isinstance(x, (list, tuple)) and any(
        isinstance(part, (np.ndarray, Tensor)) and part.ndim for part in x
    ):
        if len(x) != len(names):
            raise ValueError(
                f"x lists {len(x)} arrays, but there are {len(names)} tasks: give one array for "
                "each, or one for all"
            )
        parts = []
        for value, name in zip(x, names, strict=True):
            part = as_tensor(value, f"x of task {name!r}")
            check_rows(part, f"x of task {name!r}", trained)
            parts.append(to_dtype(part, like.dtype, f"x of task {name!r}").to(like))
        counts = torch.tensor([len(part) for part in parts], device=like.device)
        flat = torch.cat(parts)
        return Data.of_rows(Rows(flat, flat.new_zeros(len(flat)), counts), {}, like.dtype)
    # nested lists of numbers are rows, as in numpy
    one = as_tensor(x, "x")
    check_rows(one, f"x of task {names[0]!r}", trained)
    one = to_dtype(one, like.dtype, f"x of task {names[0]!r}").to(like)
    shape = len(names), len(one)
    mask = torch.ones(shape, dtype=torch.bool, device=like.device)
    return Data(one.expand(len(names), *one.shape), one.new_zeros(shape), mask)


def _own_rows(tasks: TaskSet, names: Sequence[str], trained: TaskSet) -> list[Tensor]:
    """x of each task's own query rows, or of its support rows where no task has query rows."""
    check_columns(tasks, trained)
    unknown = sorted(set(tasks.names) - set(names))
    if unknown:
        raise ValueError(
            f"x has the task {unknown[0]!r}, which this posterior is not of: adapt to it first, by "
            "fit.adapt(tasks)"
        )
    rows = tasks.query_rows if len(tasks.query_rows.x) else tasks.support_rows
    own = dict(zip(tasks.names, rows.x.split(rows.counts.tolist()), strict=True))
    return [own.get(name, rows.x[:0]) for name in names]


def _columns_of(x: Any, trained: TaskSet) -> Any:
    """The columns of a table by name, so that their order in it does not matter.

    Anything else as it is.
    """
    if not hasattr(x, "columns"):
        return x
    if trained.x_names is None:
        raise TypeError(
            "x is a table, but the training tasks do not know the names of their columns: give an "
            "array, or make the tasks by TaskSet.from_frame"
        )
    missing = [name for name in trained.x_names if name not in x.columns]
    if missing:
        raise ValueError(
            f"the table has no columns {missing} (where a formula makes them, model.x(table) is "
            f"x); its columns are {list(x.columns)}{nearest(missing, x.columns)}"
        )
    table = x[list(trained.x_names)].to_numpy()
    return table.reshape(len(table), *trained.x_shape)


def check_rows(x: Tensor, what: str, trained: TaskSet) -> None:
    """A program that reads columns of x would take points for columns, and say nothing."""
    if x.dim() == 0:
        raise ValueError(
            f"{what} is a single number, expected one row per point: give [{x.item()}]"
        )
    refuse_non_finite(x, what)
    if x.shape[1:] != trained.x_shape:
        raise ValueError(
            f"{what}: a row has shape {tuple(x.shape[1:])}, but {trained.x_shape} in the training "
            "tasks: (n,) and (n, 1) differ, see reshape; one array per task is a list of arrays"
        )


def scored(query: Any, own: Batch, model: TaskModel, trained: TaskSet) -> Data:
    """What `Posterior.score` judges, as padded data: see there."""
    if query is None:
        if own.query is None:
            raise ValueError(
                "these tasks have no query data: pass score(query) the held-out data, as a TaskSet "
                "or list of (x, y)"
            )
        return own.query
    if hasattr(query, "columns"):
        raise TypeError(
            "query is a table: make tasks of it first, by TaskSet.from_frame(table, task=..., "
            "x=..., y=...)"
        )
    if not isinstance(query, Iterable):
        raise TypeError(f"query must be a TaskSet or a list of (x, y), not {type(query).__name__}")
    if isinstance(query, TaskSet):
        check_columns(query, trained)
        if query.names == own.names:
            return _judged(query, own, model)
    tasks = [item if isinstance(item, Task) else Task(support=item) for item in query]
    if len(tasks) != len(own.names):
        raise ValueError(
            f"query has {len(tasks)} tasks, but the posterior has {len(own.names)}: one for each, "
            "in the same order"
        )
    for task, name in zip(tasks, own.names, strict=True):
        if task.name is not None and task.name != name:
            raise ValueError(
                f"query lists task {task.name!r} where the posterior has {name!r}: use the same "
                "order"
            )
    # all from the one or all from the other: a task without query data must not be scored on what
    # it learned from
    asked = any(task.query is not None for task in tasks)
    parts = [task.query if asked else task.support for task in tasks]
    # the model asks for the features that its prior needs; they are the posterior's own
    features = [
        {name: float(value[i]) for name, value in own.support.features.items()}
        for i in range(len(own))
    ]
    named = TaskSet(
        [
            Task(p, None, name, known)
            for p, name, known in zip(parts, own.names, features, strict=True)
        ]
    )
    named = named.to(dtype=own.support.like.dtype, device=own.support.like.device)
    for task in named:
        if task.support is not None:
            check_rows(task.support[0], f"query x of task {task.name!r}", trained)
    check_model(model, named)
    return named.batch().support


def _judged(query: TaskSet, own: Batch, model: TaskModel) -> Data:
    """The same of a set of these very tasks, whose rows have been checked."""
    rows = query.query_rows if len(query.query_rows.x) else query.support_rows
    # the model asks for the features that its prior needs; they are the posterior's own
    named = of_rows(query, rows, own.support.features)
    named = named.to(dtype=own.support.like.dtype, device=own.support.like.device)
    check_model(model, named)
    return named.batch().support
