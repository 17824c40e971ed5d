"""Fits of the same rows by different models, and the rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

import varmeta as vm

DENSE = vm.Joint("multivariate_normal")


def regression(
    tasks: vm.TaskSet,
    learn: Any = "full",
    shared: tuple[str, ...] = (),
    likelihood: Any = None,
    strategy: Any = DENSE,
    **options: Any,
) -> vm.Fit:
    """Of all columns, those in `shared` with one coefficient; options: of the prior."""
    hyperguide = options.pop("hyperguide", "delta")
    net = vm.LinearPredictor(tasks.x_names or ()).to(tasks.dtype)
    prior = vm.GaussianPrior(learn_precision=learn, **options)
    model = vm.TaskModel(net, likelihood or vm.likelihoods.Gaussian(), prior, shared)
    return vm.fit(model, tasks, strategy, hyperguide=hyperguide)


def lines(num_tasks: int = 20, rows: int = 8, slopes: float = 0.5) -> vm.TaskSet:
    """Lines with columns a and b, of which b does nothing, and a feature z that does nothing."""
    rng = np.random.default_rng(0)
    tasks = []
    for i in range(num_tasks):
        x = rng.normal(size=(rows, 2))
        slope, intercept = 1.0 + slopes * rng.normal(), 0.7 * rng.normal()
        y = intercept + slope * x[:, 0] + 0.5 * rng.normal(size=rows)
        tasks.append(vm.Task((x, y), name=f"t{i}", features={"z": float(i % 3)}))
    return vm.TaskSet(tasks, x_names=["a", "b"])


def only(tasks: vm.TaskSet, *columns: str) -> vm.TaskSet:
    """The same rows of y with some of x's columns."""
    names: tuple[str, ...] = tasks.x_names or ()
    at = [names.index(name) for name in columns]
    return changed(tasks, lambda x, y: (x[:, at], y), columns)


def changed(
    tasks: vm.TaskSet, change: Callable[[Tensor, Tensor], Any], x_names: Sequence[str] | None = None
) -> vm.TaskSet:
    """With `change(x, y)` of every task's rows."""
    parts = []
    for task in tasks:
        assert task.support is not None
        parts.append(vm.Task(change(*task.support), name=task.name, features=task.features))
    return vm.TaskSet(parts, x_names=tasks.x_names if x_names is None else x_names)
