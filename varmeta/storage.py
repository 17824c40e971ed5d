"""Fits on disk: tensors and plain values only, read back with `weights_only=True`, so that no code is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from varmeta.bayes.model import TaskModel
from varmeta.numerics import linear_solve, minimize, newton
from varmeta.result import Fit
from varmeta.strategy import STRATEGIES, State, Strategy
from varmeta.tasks import Task, TaskSet
from varmeta.training import Run

FORMAT = "varmeta fit 1"
PARTS = {
    part.__name__: part
    for part in (
        minimize.GradientDescent, minimize.Adam, newton.NewtonCG, linear_solve.CG, linear_solve.Neumann, linear_solve.Direct,
    )
}  # fmt: skip


def save(fit: Fit, path: str | PathLike[str]) -> None:
    """Write a fit: eta, phi, the run's record and optimiser state, the tasks' data and the strategy's settings."""
    run = fit.run
    content = {
        "format": FORMAT,
        "strategy": json.dumps(_describe(fit.strategy)),
        "weights": json.dumps({name: list(shape) for name, shape in fit.model.weights.shapes.items()}),
        "seed": fit.seed,
        "eta": run.eta,
        "phi": run.state.phi,
        "inner": run.state.inner,
        "counters": {"step": run.state.step, "lr_scale": run.state.lr_scale},
        "history": run.history,
        "optimizer": run.optimizer_state,
        "stop": run.stop,
        "converged": run.converged,
        "tasks": [(task.name, task.support, task.query) for task in fit.tasks],
    }
    torch.save(content, path)


def load(path: str | PathLike[str], model: TaskModel, strategy: Strategy | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; the model's code is the caller's, so it is passed in.

    strategy: only where the fit used a guide or solver of the user's own, which is code and so is not stored.

    Raises ValueError for a file that is not a fit, and for a fit of another model.
    """
    if not Path(path).is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, pickle's, zipfile's and more for foreign files
        raise ValueError(f"{str(path)!r} is not a varmeta fit (Fit.save writes one): {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a varmeta fit of this version: expected the format {FORMAT!r}")
    shapes = {name: list(shape) for name, shape in model.weights.shapes.items()}
    if json.loads(content["weights"]) != shapes:
        raise ValueError(
            f"{str(path)!r} is a fit of a model with weights {content['weights']}, but this model has {shapes}"
        )
    expected = set(model.init(torch.zeros(())))
    if set(content["eta"]) != expected:
        raise ValueError(f"{str(path)!r} learned {sorted(content['eta'])}, but this model has {sorted(expected)}")
    if strategy is None:
        strategy = _rebuild(json.loads(content["strategy"]))
    state = State(content["phi"], content["inner"], **content["counters"])
    run = Run(content["eta"], state, content["history"], content["optimizer"], content["stop"], content["converged"])
    tasks = TaskSet([Task(support=support, query=query, name=name) for name, support, query in content["tasks"]])
    return Fit(model, tasks, strategy, content["seed"], run)


def _describe(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_describe(item) for item in value]
    return {"kind": "code", "name": getattr(value, "__name__", type(value).__name__)}


def _rebuild(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rebuild(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.pop("kind")
    if kind == "code":
        raise ValueError(
            f"the fit used {value['name']!r}, which is code and is not stored: pass load(path, model, strategy=...)"
        )
    known = {**STRATEGIES, **PARTS}
    if kind not in known:
        raise ValueError(f"the fit used {kind!r}, which this version of varmeta does not know")
    return known[kind](**{name: _rebuild(item) for name, item in value.items()})
