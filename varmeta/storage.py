"""Fits on disk: tensors and plain values only, read back with `weights_only=True`, so that no code is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from varmeta import guides
from varmeta.baselines import Pooled
from varmeta.bayes import constants
from varmeta.bayes.likelihood import Likelihood
from varmeta.bayes.model import TaskModel
from varmeta.hyper.result import HyperPosterior
from varmeta.implicit import Implicit
from varmeta.joint import Joint, Reinit
from varmeta.numerics import linear_solve, minimize, newton
from varmeta.result import Fit
from varmeta.run import Run
from varmeta.stochastic import StochasticAlg
from varmeta.strategy import State, Strategy
from varmeta.tasks import Task, TaskSet
from varmeta.unrolled import FirstOrder, Reptile, Unrolled

FORMAT = "varmeta fit 4"
KEYS = (
    "strategy", "weights", "likelihood", "covariance", "seed", "eta", "phi", "inner", "counters", "history", "optimizer",
    "stop", "converged", "loss", "schedule", "tasks", "hyper", "features", "x_names", "constants",
)  # fmt: skip
STRATEGIES = (Joint, Reinit, Implicit, Unrolled, FirstOrder, Reptile, Pooled)  # a report's fits can be saved too
PARTS: dict[str, Any] = {
    part.__name__: part
    for part in (
        minimize.GradientDescent, minimize.Adam, newton.NewtonCG, linear_solve.CG, linear_solve.Neumann, linear_solve.Direct,
        StochasticAlg, guides.Delta, guides.MeanField, guides.Dense, guides.LowRank, guides.Structured, guides.Laplace,
    )
}  # fmt: skip


def save(fit: Fit, path: str | PathLike[str]) -> None:
    """Write a fit: eta, phi, the run's record and optimiser state, the tasks' data and the strategy's settings.

    Raises ValueError where there is no such folder.
    """
    run = fit.run
    content = {
        "format": FORMAT,
        "strategy": json.dumps(_describe(fit.strategy)),
        "weights": json.dumps({name: list(shape) for name, shape in fit.model.weights.shapes.items()}),
        "constants": json.dumps(constants.fingerprint(fit.model.net, fit.model.constants)),
        "likelihood": _settings(fit.model),
        "covariance": fit.prior.covariance,
        "seed": int(fit.seed),
        "eta": run.eta,
        "phi": run.state.phi,
        "inner": run.state.inner,
        "counters": {"step": run.state.step, "lr_scale": run.state.lr_scale},
        "history": run.history,
        "optimizer": run.optimizer_state,
        "stop": run.stop,
        "converged": run.converged,
        "loss": run.loss,
        "schedule": run.schedule,
        "hyper": None
        if run.hyper is None
        else {f.name: getattr(run.hyper, f.name) for f in dataclasses.fields(run.hyper)},
        "tasks": [(task.name, task.support, task.query) for task in fit.tasks],
        "features": [dict(task.features or {}) for task in fit.tasks],
        "x_names": fit.tasks.x_names,
    }
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"the folder of {str(path)!r} does not exist: make it first, Path(...).mkdir(parents=True)")
    if Path(path).is_dir():
        raise ValueError(f"{str(path)!r} is a folder: give the name of a file")
    torch.save(content, path)


def load(path: str | PathLike[str], model: TaskModel, strategy: Strategy | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; the model's code is the caller's, so it is passed in.

    strategy: only where the fit used a guide or solver of the user's own, which is code and so is not stored.

    Raises ValueError for a file that is not a fit, for a fit of another model (other weights, another likelihood, another
    fixed precision) and for another kind of strategy.
    """
    if not isinstance(model, TaskModel):
        raise TypeError(f"model must be the TaskModel that was fitted, not {type(model).__name__}")
    if not Path(path).is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, pickle's, zipfile's and more for foreign files
        # torch's words would advise to let the file run code
        raise ValueError(
            f"{str(path)!r} is not a varmeta fit (Fit.save writes one): it has another format, is damaged, or holds code, which "
            "is never run"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not a varmeta fit of this version: expected the format {FORMAT!r}")
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ValueError(f"{str(path)!r} is damaged: it lacks {missing}")
    shapes = {name: list(shape) for name, shape in model.weights.shapes.items()}
    if json.loads(content["weights"]) != shapes:
        raise ValueError(
            f"{str(path)!r} is a fit of a model with weights {content['weights']}, but this model has {shapes}"
        )
    other = constants.difference(json.loads(content["constants"]), model.net, model.constants)
    if other is not None:
        raise ValueError(f"{str(path)!r} is a fit of a network with {other}: give it the network that was fitted")
    eta = content["eta"]
    like = next(iter(eta.values()))
    expected = {name: list(value.shape) for name, value in model.init(like).items()}
    learned = {name: list(value.shape) for name, value in eta.items()}
    if content["likelihood"] != _settings(model):
        raise ValueError(
            f"{str(path)!r} is a fit with the likelihood {content['likelihood']}, but this model has {_settings(model)}"
        )
    if learned != expected:
        raise ValueError(
            f"{str(path)!r} learned {learned}, but this model has {expected}: give it the fit's learn_precision, shared and "
            "covariates"
        )
    prior = model.prior_distribution(eta)
    covariance = prior.covariance_matrix if model.prior.dense else torch.diag(prior.variance)
    scale = covariance.diagonal().sqrt()
    if not torch.allclose(
        covariance / torch.outer(scale, scale), content["covariance"] / torch.outer(scale, scale), atol=1e-4
    ):
        raise ValueError(
            f"{str(path)!r} is a fit under another prior: its covariance was {content['covariance'].tolist()}, but that of "
            f"this model would be {covariance.tolist()}"
        )
    described = json.loads(content["strategy"])
    if strategy is None:
        strategy = _rebuild(described)
    elif type(strategy).__name__ != described["kind"]:
        raise ValueError(f"{str(path)!r} is a fit by {described['kind']}, not by {strategy!r}")
    state = State(content["phi"], content["inner"], **content["counters"])
    record = (content[name] for name in ("history", "optimizer", "stop", "converged", "loss", "schedule"))
    kept = content["hyper"]
    run = Run(eta, state, *record)
    run.hyper = None if kept is None else HyperPosterior(**kept)
    features = content["features"]
    tasks = TaskSet(
        [
            Task(support, query, name, own)
            for (name, support, query), own in zip(content["tasks"], features, strict=True)
        ],
        dtype=like.dtype,
        x_names=content["x_names"],
    )
    return Fit(model, tasks, strategy, content["seed"], run)


def _settings(model: TaskModel) -> str:
    """The likelihood and its plain settings; a program is code, so of it only that it is one."""
    if model.likelihood is None:
        return "program"
    return _plainly(model.likelihood)


def _plainly(likelihood: Likelihood) -> str:
    plain = {
        name: _plainly(value) if isinstance(value, Likelihood) else value
        for name, value in vars(likelihood).items()
        if isinstance(value, (bool, int, float, str, Likelihood))
    }
    return f"{type(likelihood).__name__} {json.dumps(plain, sort_keys=True)}"


def _describe(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _describe(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init
        }
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
    known: dict[str, Any] = {kind.__name__: kind for kind in STRATEGIES} | PARTS
    if kind not in known:
        raise ValueError(f"the fit used {kind!r}, which is not varmeta's own: pass load(path, model, strategy=...)")
    return known[kind](**{name: _rebuild(item) for name, item in value.items()})
