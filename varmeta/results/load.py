"""Read a fit that `Fit.save` wrote, into a model that the caller gives; no code is ever read."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from varmeta.files.columns import rows_of
from varmeta.files.container import MAGIC, DamagedError, unpacked
from varmeta.files.plain import difference
from varmeta.fitting.checkpoint import Checkpoint
from varmeta.fitting.run import Run
from varmeta.guides.guide import Guide
from varmeta.models import constants
from varmeta.models.check_cut import check_cut
from varmeta.models.ensemble import Ensemble
from varmeta.models.formula import FormulaModel
from varmeta.models.hyper_posterior import HyperPosterior
from varmeta.models.model import TaskModel
from varmeta.numerics.learning_rates import LearnedRates
from varmeta.numerics.linear_solve import LinearSolver
from varmeta.numerics.minimize import Minimizer
from varmeta.results import old_format, schema
from varmeta.results.configuration import configuration, numbers_of, same_numbers
from varmeta.results.result import Fit
from varmeta.strategies.alg import StochasticAlg
from varmeta.strategies.check import check_strategy
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.inner_rates import RATE, initial_eta
from varmeta.strategies.strategy import State, Strategy
from varmeta.tasks import Task, TaskSet
from varmeta.tasks.fingerprint import AbsentTasks
from varmeta.tasks.scaling import Scaling

MEMBERS = {field.name for field in dataclasses.fields(Ensemble)}
# What a strategy may be made of: every class of ours below one of these is known by its name.
PARTS: tuple[Any, ...] = (
    Strategy,
    Minimizer,
    ClosedForm,
    LinearSolver,
    Guide,
    StochasticAlg,
    LearnedRates,
)


def load(path: str | PathLike[str], model: TaskModel, strategy: Strategy | None = None) -> Fit:
    """Read a fit that `Fit.save` wrote; the model's code is the caller's, so it is passed in.

    strategy: only where the fit used a guide or solver of the user's own, which is code and so is
        not stored.

    The model must be made as the fitted one was: argument by argument, but for where its weights
    start, and by what it makes of a few rows of the data.

    Raises FileNotFoundError and OSError where there is nothing to read; ValueError for a file that
    is not a fit or was changed after it was written, for a fit of another model, naming the
    argument, and for another kind of strategy.  Warns of a file of an older format, which knows
    less.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "lines.fit")
    ...     vm.fit(model, tasks).save(path)
    ...     load(path, model).converged
    True
    """
    if not isinstance(model, TaskModel):
        raise TypeError(f"model must be the TaskModel that was fitted, not {type(model).__name__}")
    shown = repr(fspath(path))
    data = _read(path, shown)
    try:
        if data.startswith(MAGIC):
            content, checks = unpacked(data), schema.PRESENT
        else:
            content, checks = old_format.unpacked(data), schema.BEFORE
    except DamagedError as error:
        raise ValueError(f"{shown} is not a varmeta fit (Fit.save writes one): {error}") from error
    fault = schema.fault(content, checks)
    if fault is not None:
        raise ValueError(f"{shown} is damaged: {fault}")
    try:
        return _fit(content, shown, model, strategy)
    except Refused:
        raise
    # what somebody wrote on purpose may break anything that is made of it
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{shown} is damaged: no fit can be made of it ({type(error).__name__}: {error})"
        ) from error


class Refused(ValueError):
    """A sound file, but not of this model or strategy."""


class IsCode(Refused):
    """A sound file, of a strategy that must be given."""


def _read(path: str | PathLike[str], shown: str) -> bytes:
    if not Path(path).exists():
        raise FileNotFoundError(2, "there is no such file: Fit.save writes one", fspath(path))
    if not Path(path).is_file():
        raise ValueError(f"{shown} is not a file")
    return Path(path).read_bytes()  # the system's own errors name the path


def _fit(content: dict[str, Any], shown: str, model: TaskModel, strategy: Strategy | None) -> Fit:
    _check_model(content, shown, model)
    _check_learned(content, shown, model)
    _check_covariance(content, shown, model)
    eta = content["eta"]
    like = next(iter(eta.values()))
    tasks = TaskSet(
        [
            Task(support, query, name, own)
            for (name, support, query), own in zip(
                content["tasks"], content["features"], strict=True
            )
        ],
        dtype=like.dtype,
        x_names=content["x_names"],
    )
    tasks.scaling = _scaling(content.get("scaling"), model, tasks)
    check_cut(model, eta, tasks.batch().support)
    known = content.get("numbers")
    if known is not None and not same_numbers(known, numbers_of(model, tasks, eta), like.dtype):
        raise Refused(
            f"{shown} is a fit of another model: of the same numbers and rows this one makes other "
            "densities.  Its code (the network's forward, the program, a distribution) has changed "
            "since, or varmeta has"
        )
    strategy = _strategy(json.loads(content["strategy"]), shown, model, tasks, strategy)
    _check_rates(content, shown, model, strategy)
    run = _run(content)
    known = content.get("left_out")
    absent = None if known is None else AbsentTasks(*known)
    fit = Fit(model, tasks, strategy, content["seed"], run, absent=absent)
    phi = run.state.phi
    if phi is not None:
        started = fit.problem.start(tasks.batch(), eta)
        # how many rows there are `schema.fault` has looked at
        rows = [{n: v.shape[1:] for n, v in one.items()} for one in (started, phi)]
        if rows[0] != rows[1]:
            raise ValueError("its 'phi' are not those of its guide and tasks")
    if "model" not in content:
        warnings.warn(old_format.LACKS.format(shown), RuntimeWarning, stacklevel=3)
    return fit


def _scaling(known: dict[str, Any] | None, model: TaskModel, tasks: TaskSet) -> Scaling | None:
    if known is None:
        return None
    numbers = {name: value for name, value in known.items() if name != "told"}
    scaling = Scaling(**numbers, likelihood=model.likelihood if known["told"] else None)
    rows = tasks.support_rows if len(tasks.support_rows.x) else tasks.query_rows
    if len(rows.x):  # else they do not know their shapes
        for name, one in (("x", rows.x[0]), ("y", rows.y[0])):
            shapes = {tuple(numbers[f"{name}_{what}"].shape) for what in ("loc", "scale")}
            if shapes != {tuple(one.shape)}:
                raise ValueError(f"its 'scaling' has {name} of the shapes {sorted(shapes)}")
    return scaling


def _check_model(content: dict[str, Any], shown: str, model: TaskModel) -> None:
    """Refuse a model made with other arguments, as far as the file knows them."""
    shapes = {name: list(shape) for name, shape in model.weights.shapes.items()}
    if json.loads(content["weights"]) != shapes:
        raise Refused(
            f"{shown} is a fit of a model with weights {content['weights']}, but this model has "
            f"{shapes}"
        )
    if "model" not in content:
        old_format.check_likelihood(content["likelihood"], model, shown)
        return
    found = difference(json.loads(content["model"]), configuration(model), model)
    if found is not None:
        raise Refused(
            f"{shown} is a fit of another model: {found}.  Give load the model as it was fitted"
        )
    kept = content.get("design")  # None in files of before
    if kept is not None and isinstance(model, FormulaModel):
        found = model.design.difference(json.loads(kept))
        if found is not None:
            raise Refused(
                f"{shown} is a fit of another model: {found}.  Read the formula with the table "
                "of the fit, and other tables by model.tasks(table) and model.x(table)"
            )
    other = constants.difference(json.loads(content["constants"]), model.net, model.constants)
    if other is not None:
        raise Refused(
            f"{shown} is a fit of a network with {other}: give it the network that was fitted"
        )


def _check_learned(content: dict[str, Any], shown: str, model: TaskModel) -> None:
    eta = content["eta"]
    like = next(iter(eta.values()))
    expected = {name: list(value.shape) for name, value in model.init(like).items()}
    # the strategy's own entries are compared once it is known
    own = {name for name in eta if name.partition(".")[0] == RATE} - set(expected)
    learned = {name: list(value.shape) for name, value in eta.items() if name not in own}
    if learned != expected:
        raise Refused(
            f"{shown} learned {learned}, but this model has {expected}: give it the fit's "
            "learn_precision, shared and covariates"
        )


def _check_rates(content: dict[str, Any], shown: str, model: TaskModel, strategy: Strategy) -> None:
    """Refuse a strategy that learns other inner rates than those of the file."""
    eta = content["eta"]
    like = next(iter(eta.values()))
    expected = {n: list(v.shape) for n, v in initial_eta(strategy, model, like).items()}
    learned = {name: list(value.shape) for name, value in eta.items()}
    if learned != expected:
        raise Refused(
            f"{shown} learned {learned}, but {strategy.describe()} learns {expected}: give it the "
            "fit's rates of inner steps"
        )


def _check_covariance(content: dict[str, Any], shown: str, model: TaskModel) -> None:
    """Refuse a model that makes another prior of the same eta."""
    prior, kept = model.prior_distribution(content["eta"]), content["covariance"]
    covariance = prior.covariance_matrix if model.prior.dense else prior.variance
    if kept.dim() > covariance.dim():  # files of before hold zeros beside the variances
        covariance = torch.diag(covariance)
    if kept.shape != covariance.shape:
        raise ValueError(f"its covariance has the shape {tuple(kept.shape)}")
    scale = prior.stddev
    units = scale.square() if covariance.dim() == 1 else torch.outer(scale, scale)
    if not torch.allclose(covariance / units, kept / units, atol=1e-4):
        raise Refused(
            f"{shown} is a fit under another prior: its covariance was {kept.tolist()}, but that "
            f"of this model would be {covariance.tolist()}"
        )


def _strategy(
    described: dict[str, Any],
    shown: str,
    model: TaskModel,
    tasks: TaskSet,
    given: Strategy | None,
) -> Strategy:
    """The strategy that the file describes, or the given one of that kind."""
    alg = None if described["kind"] == "Stochastic" else described.pop("alg", None)
    if alg is not None:  # of the time when it was an option of Unrolled and Implicit
        described = {"kind": "Stochastic", "strategy": described, "alg": alg}
    if given is not None:
        if type(given).__name__ != described["kind"]:
            raise Refused(f"{shown} is a fit by {described['kind']}, not by {given!r}")
        return given
    if described.get("expectation") == "quantiles":  # of version 0.1, for one weight a task
        described = described | {"expectation": "quadrature"}
    strategy = _rebuild(described)
    if not isinstance(strategy, Strategy):
        raise ValueError(f"{type(strategy).__name__} is no strategy")
    check_strategy(strategy, strategy.problem(model, tasks, 0), tasks, for_fit=False)
    return strategy


def _run(content: dict[str, Any]) -> Run:
    state = State(content["phi"], content["inner"], **content["counters"])
    record = (
        content[name] for name in ("history", "optimizer", "stop", "converged", "loss", "schedule")
    )
    run = Run(content["eta"], state, *record)
    history: Any = content["history"]
    if isinstance(history, dict):
        run.history = rows_of(history, len(history["step"][0]) if history else 0)
    # what older files do not know did not happen
    run.kept, run.streamed = content.get("kept"), content.get("streamed")
    checkpoint = content.get("checkpoint")
    if checkpoint is not None:
        run.checkpoint = Checkpoint(**checkpoint)
        best = (checkpoint["watched"] or {}).get("best")
        if best is not None and {n: v.shape for n, v in best["eta"].items()} != {
            n: v.shape for n, v in _descended(content).items()
        }:
            raise ValueError("its best 'eta' is not one of its model")
    hyper = content["hyper"]
    if hyper is not None:
        run.hyper = Ensemble(**hyper) if set(hyper) == MEMBERS else HyperPosterior(**hyper)
    return run


def _descended(content: dict[str, Any]) -> dict[str, Tensor]:
    """What the optimiser moved: of an ensemble all members."""
    hyper = content["hyper"]
    found: dict[str, Tensor] = content["eta"]
    return hyper["points"] if hyper is not None and set(hyper) == MEMBERS else found


def _rebuild(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rebuild(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.pop("kind")
    if kind == "code":
        raise IsCode(
            f"the fit used {value['name']!r}, which is code and is not stored: pass load(path, "
            "model, strategy=...)"
        )
    if kind == "tensor":
        return torch.tensor(
            value["values"], dtype=getattr(torch, value["dtype"].removeprefix("torch."))
        )
    known: dict[str, Any] = {made.__name__: made for part in PARTS for made in _below(part)}
    if kind not in known:
        raise IsCode(
            f"the fit used {kind!r}, which is not varmeta's own: pass load(path, model, "
            "strategy=...)"
        )
    given = {name: _rebuild(item) for name, item in value.items()}
    _check_parts(known[kind], given)
    return known[kind](**given)


def _check_parts(made: Any, given: dict[str, Any]) -> None:
    """Raise TypeError where an option has another type than its class declares: constructors do not
    look at all of it.
    """
    hints = get_type_hints(made)
    for name, value in given.items():
        if name in hints and not _is_a(value, hints[name]):
            raise TypeError(f"{made.__name__}({name}=...) is a {type(value).__name__}")


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    kind = origin or hint
    if kind is Any or not isinstance(kind, type):
        return True
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, Tensor):  # a number may be one
        return kind in (int, float, Tensor)
    return isinstance(value, (int, float) if kind is float else kind)


def _below(part: type) -> Iterator[type]:
    """The class and all below it that are part of this package."""
    if part.__module__.partition(".")[0] == "varmeta":
        yield part
    below: list[type] = part.__subclasses__()
    for made in below:
        yield from _below(made)
