"""Write a fit: tensors and plain values under a checksum, whole or not at all; no code."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import Tensor

from varmeta._checks import name_of
from varmeta.files.columns import columns_of
from varmeta.files.container import packed
from varmeta.files.version import __version__
from varmeta.fitting.run import Run
from varmeta.models import constants
from varmeta.models.formula import FormulaModel
from varmeta.models.learned_prior import LearnedPrior
from varmeta.models.model import TaskModel
from varmeta.results.configuration import configuration, numbers_of
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.tasks import TaskSet
from varmeta.tasks.fingerprint import AbsentTasks, example_of
from varmeta.tasks.scaling import Scaling


def parts_of(
    model: TaskModel,
    tasks: TaskSet,
    strategy: Strategy,
    seed: int,
    run: Run,
    prior: LearnedPrior,
    absent: AbsentTasks | None,
    data: bool,
) -> list[bytes]:
    """A fit as a file's bytes, in parts.

    eta, phi, the run's record and optimiser state, the tasks' data, the strategy's settings and the
    model's.  Without `data` there is no phi, and of tasks that are left out one stays, which tells
    the model's inputs.

    Raises TypeError where the run holds what is neither a tensor nor a plain value (an optimizer of
    the user's own might).
    """
    if absent is not None:
        tasks = example_of(tasks)
    stored = run.state if data else State()
    content = {
        "version": __version__,
        "strategy": json.dumps(_describe(strategy)),
        "weights": json.dumps({name: list(shape) for name, shape in model.weights.shapes.items()}),
        "constants": json.dumps(constants.fingerprint(model.net, model.constants)),
        "model": json.dumps(configuration(model)),
        "design": json.dumps(model.design.kept()) if isinstance(model, FormulaModel) else None,
        "numbers": _numbers(model, tasks, run.eta),
        "covariance": prior.covariance
        if model.prior.dense
        else model.weights.flatten(prior.sd).square(),
        "seed": int(seed),
        "eta": run.eta,
        "phi": stored.phi,
        "inner": stored.inner,
        "counters": {"step": run.state.step, "lr_scale": run.state.lr_scale},
        "history": columns_of(run.history),
        "optimizer": run.optimizer_state,
        "stop": run.stop,
        "converged": run.converged,
        "loss": run.loss,
        "schedule": run.schedule,
        "kept": run.kept,
        "streamed": run.streamed,
        "checkpoint": None
        if run.checkpoint is None
        else {f.name: getattr(run.checkpoint, f.name) for f in dataclasses.fields(run.checkpoint)},
        "left_out": None if absent is None else tuple(absent),
        "hyper": None
        if run.hyper is None
        else {f.name: getattr(run.hyper, f.name) for f in dataclasses.fields(run.hyper)},
        "tasks": [(task.name, task.support, task.query) for task in tasks],
        "features": [dict(task.features or {}) for task in tasks],
        "x_names": tasks.x_names,
        "scaling": _scaling(tasks.scaling),
    }
    try:
        return packed(content)
    except TypeError as error:
        raise TypeError(f"of the fit, {error}") from error


def _scaling(scaling: Scaling | None) -> dict[str, Any] | None:
    """Its numbers; of the likelihood, which is the model's, whether it was told one."""
    if scaling is None:
        return None
    numbers = {name: getattr(scaling, name) for name in ("x_loc", "x_scale", "y_loc", "y_scale")}
    known = {name: tuple(two) for name, two in scaling.features.items()}
    return numbers | {"features": known, "told": scaling.likelihood is not None}


def _numbers(model: TaskModel, tasks: TaskSet, eta: Eta) -> Tensor | None:
    """None where nothing can be computed: a fit that broke off is still worth keeping."""
    try:
        return numbers_of(model, tasks, eta)
    except (RuntimeError, ValueError):
        return None


def _describe(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _describe(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
        return {"kind": type(value).__name__} | fields
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_describe(item) for item in value]
    if isinstance(value, Tensor):
        return {
            "kind": "tensor",
            "dtype": str(value.dtype),
            "values": value.detach().cpu().tolist(),
        }
    return {"kind": "code", "name": name_of(value)}
