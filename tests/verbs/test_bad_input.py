"""Bad input is refused before any work starts, by a sentence that says what came and what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import Tensor, nn

import varmeta as vm
from tests.cases import linear_model, ragged_tasks
from varmeta.fitting.run import Run

PRIOR = vm.GaussianPrior(3.0)
FREE = vm.GaussianPrior(3.0, "shared")
ONES = np.ones((3, 1))
TABLE = pd.DataFrame({"g": ["a", "b"], "dose": ["1.5", "low"], "y": [0.0, 1.0]}, index=["r0", "r1"])


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step may be taken before the complaint."""

    def record(self: Run, *args: Any, **row: Any) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr(Run, "record", record)


def fit(**changes: Any) -> vm.Fit:
    arguments: dict[str, Any] = {
        "model": linear_model(PRIOR),
        "tasks": ragged_tasks(3),
        "strategy": vm.Joint("normal"),
    }
    return vm.fit(**{**arguments, "num_steps": 1, **changes})


def tasks_of(x: Any, y: Any, name: str = "north") -> vm.TaskSet:
    return vm.TaskSet([vm.Task((ONES, np.zeros(3)), name="south"), vm.Task((x, y), name=name)])


def of_likelihood(likelihood: Any, outputs: int = 1) -> vm.TaskModel:
    return vm.TaskModel(nn.Linear(1, outputs), likelihood, PRIOR)


def strategy_of(guide: Any) -> vm.Joint:
    return vm.Joint(guide)


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Gamma(params["a"].exp(), 1.0), obs=y)


def unknown_name(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["slope"] * x[..., 0], 1.0), obs=y)


def without_obs(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["a"] * x[..., 0], 1.0))


def with_plate(name: str, params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    with pyro.plate(name, x.shape[1]):
        return pyro.sample("y", dist.Normal(params["a"] * x[..., 0], 1.0), obs=y)


class Mixing(pyro.nn.PyroModule):  # type: ignore[name-defined, misc]
    """One mean for all tasks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, eta: Any, data: Any) -> Tensor:
        with pyro.plate("tasks", len(data), dim=-2):
            return pyro.sample("theta", dist.Normal(self.loc, 1.0).to_event(1))


no_query = vm.TaskSet([vm.Task((ONES, np.zeros(3)), name="south")])
bn = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
gaussian = vm.likelihoods.Gaussian

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # data
    "no tasks": (lambda: vm.TaskSet([]), ValueError, "no tasks: a TaskSet needs at least one Task"),
    "lengths": (
        lambda: tasks_of(ONES, [0.0, 1.0]),
        ValueError,
        "task 'north': support x has 3 rows but y has 2",
    ),
    "NaN in x": (
        lambda: tasks_of([[0.0], [np.nan], [1.0]], np.zeros(3)),
        ValueError,
        "'north': support x, row 1 .* is nan",
    ),
    "NaN in y": (
        lambda: tasks_of(ONES, [0.0, 1.0, np.nan]),
        ValueError,
        "'north': support y, row 2 .* is nan",
    ),
    "infinity": (
        lambda: tasks_of(ONES, [-np.inf, 1.0, 0.0]),
        ValueError,
        "'north': support y, row 0 .* is -inf",
    ),
    "NaN in the query": (
        lambda: vm.TaskSet([vm.Task(query=(ONES, [0.0, 1.0, np.nan]), name="north")]),
        ValueError,
        "'north': query y, row 2 .* is nan",
    ),
    "words": (
        lambda: tasks_of(ONES, ["a", "b", "c"]),
        TypeError,
        "'north': support y has dtype .*code categories as 0, 1",
    ),
    "complex": (lambda: tasks_of(ONES, [1j, 0, 0]), TypeError, "'north': support y is complex"),
    "mixed precision": (
        lambda: tasks_of(ONES.astype(np.float32), np.zeros(3)),
        ValueError,
        "floating dtypes differ",
    ),
    "columns differ": (
        lambda: tasks_of(np.ones((3, 2)), np.zeros(3)),
        ValueError,
        "'north' .*: a row of x has shape",
    ),
    "a task twice": (
        lambda: tasks_of(ONES, np.zeros(3), "south"),
        ValueError,
        "'south' first: names tell tasks apart",
    ),
    # outside the support
    "half a count": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Poisson()),
            tasks=tasks_of(ONES, np.array([0, 0.5, 1])),
        ),
        ValueError,
        "'north', row 1: y = 0.5 is outside the support of Poisson: expected a count",
    ),
    "a negative count": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Poisson()), tasks=tasks_of(ONES, [0, 2, -1])
        ),
        ValueError,
        "'north', row 2: y = -1",
    ),
    "binary 2": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Bernoulli()), tasks=tasks_of(ONES, [0, 2, 1])
        ),
        ValueError,
        "'north', row 1: y = 2.* expected 0 or 1",
    ),
    "a class too many": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Categorical(3), 3),
            tasks=vm.TaskSet([vm.Task((ONES, [0, 1, 3]), name="north")]),
        ),
        ValueError,
        "'north', row 2: y = 3.* a class 0, ..., 2",
    ),
    "more successes than trials": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Binomial(5)), tasks=tasks_of(ONES, [0, 6, 1])
        ),
        ValueError,
        "'north', row 1: y = 6",
    ),
    "a program's support": (
        lambda: fit(
            model=vm.TaskModel.from_pyro(program, {"a": ()}),
            tasks=vm.TaskSet([vm.Task((ONES, np.array([1.0, 2.0, -1.0])), name="north")]),
        ),
        ValueError,
        "'north', row 2: y = -1.0 is outside the support of",
    ),
    "outside in the query": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Poisson()),
            tasks=vm.TaskSet([vm.Task((ONES, [0, 1, 2]), (ONES, [1, -2, 0]), "north")]),
        ),
        ValueError,
        "'north', row 1: y = -2",
    ),
    # names
    "unknown guide": (
        lambda: fit(strategy=vm.Joint("gaussian")),
        ValueError,
        "unknown guide 'gaussian': choose one of",
    ),
    "unknown objective": (
        lambda: fit(strategy=vm.Implicit(outer="loss")),
        ValueError,
        "unknown outer objective 'loss': choose",
    ),
    "unknown expectation": (
        lambda: fit(strategy=vm.Joint(expectation="exact")),
        ValueError,
        "expectation must be one of",
    ),
    "unknown shared": (
        lambda: vm.TaskModel(nn.Linear(1, 1), gaussian(), PRIOR, shared=["body.*"]),
        ValueError,
        r"'body.\*' matches none of the parameters \['bias', 'weight'\]",
    ),
    "unknown precision": (
        lambda: linear_model(vm.GaussianPrior({"w": 1.0, "bias": 1.0})),
        ValueError,
        r"precision names \['w'\]",
    ),
    "missing precision": (
        lambda: linear_model(vm.GaussianPrior({"bias": 1.0})),
        ValueError,
        r"says nothing about \['weight'\]",
    ),
    "unknown loc": (
        lambda: linear_model(vm.GaussianPrior(loc={"w": 1.0})),
        ValueError,
        r"loc names \['w'\]",
    ),
    "unknown learn_precision": (
        lambda: vm.GaussianPrior(1.0, "diagonal"),
        ValueError,
        "learn_precision must be one of",
    ),
    "unknown schedule": (lambda: fit(schedule="linear"), ValueError, "schedule must be one of"),
    "a schedule that is no function": (
        lambda: fit(schedule=0.5),
        TypeError,
        "a function of the fraction of the way or a scheduler",
    ),
    "a schedule that turns negative": (
        lambda: fit(schedule=lambda fraction: 0.9 - fraction),
        ValueError,
        r"schedule\(1\) must be a finite number of at least 0",
    ),
    "unknown on_unconverged": (
        lambda: vm.Implicit(on_unconverged="log"),
        ValueError,
        "on_unconverged must be",
    ),
    "unknown eta": (
        lambda: vm.meta_gradient(
            linear_model(PRIOR), ragged_tasks(2), vm.Implicit(), eta={"w": 1.0}
        ),
        ValueError,
        "eta must have the names",
    ),
    "eta of another shape": (
        lambda: vm.meta_gradient(
            linear_model(PRIOR),
            ragged_tasks(2),
            vm.Implicit(),
            eta={"weight": torch.zeros(2), "bias": torch.zeros(1), "log_scale": torch.zeros(())},
        ),
        ValueError,
        r"eta\['weight'\] has shape \(2,\), expected \(1, 1\)",
    ),
    "a name of varmeta's own": (
        lambda: vm.TaskModel.from_pyro(program, {"log_scale": ()}),
        ValueError,
        "uses itself: rename",
    ),
    # models
    "batch norm": (
        lambda: vm.TaskModel(bn, gaussian(), PRIOR),
        ValueError,
        "layer '1' is a BatchNorm1d.*GroupNorm or LayerNorm",
    ),
    "no parameters": (
        lambda: vm.TaskModel(nn.Tanh(), gaussian(), PRIOR),
        ValueError,
        "has no parameters",
    ),
    "everything shared": (
        lambda: vm.TaskModel(nn.Linear(1, 1), gaussian(), PRIOR, shared=["*"]),
        ValueError,
        "every parameter is shared",
    ),
    "columns of the net": (
        lambda: fit(model=vm.TaskModel(nn.Linear(2, 1), gaussian(), PRIOR)),
        ValueError,
        "the model does not run on task 'sine 2' .*: the network takes 2 columns, x has 1$",
    ),
    "columns of the first layer": (
        lambda: fit(
            model=vm.TaskModel(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), gaussian(), PRIOR)
        ),
        ValueError,
        "the network takes 3 columns, x has 1$",
    ),
    "no columns": (
        lambda: fit(tasks=vm.TaskSet([vm.Task((np.ones((3, 0)), np.zeros(3)))])),
        ValueError,
        "the network takes 1 column, x has 0$",
    ),
    "columns by name": (
        lambda: fit(model=vm.TaskModel(vm.LinearPredictor(["a", "b"]), gaussian(), PRIOR)),
        ValueError,
        "the network takes 2 columns, x has 1$",
    ),
    "two outputs": (
        lambda: fit(model=of_likelihood(gaussian(), 2)),
        ValueError,
        r"the network's output for a row, \(2,\), does not fit Gaussian.* of a y with rows of "
        r"shape \(\)$",
    ),
    "fewer outputs than classes": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Categorical(3), 2), tasks=tasks_of(ONES, [0, 1, 2])
        ),
        ValueError,
        r"puts out 2 numbers for a row, but Categorical\(num_classes=3\) needs one for each "
        "class, 3$",
    ),
    "fewer outputs than classes in y": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Categorical(), 2),
            tasks=vm.TaskSet([vm.Task((ONES, [0, 1, 2]), name="north")]),
        ),
        ValueError,
        "'north', row 2: y = 2 .*expected a class 0, ..., 1, since the network puts out 2 numbers",
    ),
    "one output for classes": (
        lambda: fit(
            model=of_likelihood(vm.likelihoods.Categorical()),
            tasks=vm.TaskSet([vm.Task((ONES, [0, 0, 0]))]),
        ),
        ValueError,
        r"puts out 1 number for a row, but Categorical\(\) needs one for each class, at least 2$",
    ),
    "a recurrent net": (
        lambda: fit(model=vm.TaskModel(nn.GRU(1, 1), gaussian())),
        ValueError,
        r"the network puts out a tuple, expected one tensor with a row for each row of x",
    ),
    # programs
    "a name that is no param": (
        lambda: fit(model=vm.TaskModel.from_pyro(unknown_name, {"a": (), "b": ()})),
        ValueError,
        r"raises KeyError: 'slope'; its params are \['a', 'b'\]: use one of these names",
    ),
    "y is not observed": (
        lambda: fit(model=vm.TaskModel.from_pyro(without_obs, {"a": ()})),
        ValueError,
        r"samples 'y' without observing it: if that is the data, write pyro.sample\('y', ..., "
        r"obs=y\); if it is a weight",
    ),
    **{
        f"a plate called {name}": (
            lambda name=name: fit(
                model=vm.TaskModel.from_pyro(partial(with_plate, name), {"a": ()})
            ),
            ValueError,
            rf"opens pyro.plate\('{name}'\), but the plates of tasks and of their observations "
            "are supplied: leave it out$",
        )
        for name in ("data", "tasks", "rows")
    },
    "params in a list": (
        lambda: vm.TaskModel.from_pyro(program, ["a"]),  # type: ignore[arg-type]
        TypeError,
        r"params must be a dict of shapes by name, such as {'slope': \(\)}, not \['a'\]",
    ),
    "a number for a shape": (
        lambda: vm.TaskModel.from_pyro(program, {"a": 0.0}),  # type: ignore[dict-item]
        TypeError,
        r"params\['a'\] is 0.0, expected a shape, \(\) for a single number .* or a tensor",
    ),
    "params with a negative size": (
        lambda: vm.TaskModel.from_pyro(program, {"a": (-1,)}),
        TypeError,
        r"params\['a'\] is \(-1,\), expected a shape",
    ),
    "precision 0": (
        lambda: vm.GaussianPrior(0.0),
        ValueError,
        "the precision must be positive and finite, not 0",
    ),
    "learn_precision as precision": (
        lambda: vm.GaussianPrior("full"),  # type: ignore[arg-type]
        TypeError,
        r"the precision must be a number, not 'full': write "
        r"GaussianPrior\(learn_precision='full'\)",
    ),
    "a word for a precision": (
        lambda: vm.GaussianPrior(precision="a"),  # type: ignore[arg-type]
        TypeError,
        "the precision must be a number, not 'a'$",
    ),
    "a truth value for a precision": (
        lambda: vm.GaussianPrior(True),
        TypeError,
        "must be a number, not True",
    ),
    "an object for a precision": (
        lambda: vm.GaussianPrior({"weight": object()}),  # type: ignore[dict-item]
        TypeError,
        "the precision of 'weight' must be a number or a tensor, not an object",
    ),
    "several precisions": (
        lambda: vm.GaussianPrior([1.0, 2.0]),
        ValueError,
        "must be one number, not 2: give a dict",
    ),  # type: ignore[arg-type]
    "precision of one weight": (
        lambda: vm.GaussianPrior(-1),
        ValueError,
        "^the precision must be .*, not -1$",
    ),
    "precision below 0": (
        lambda: vm.GaussianPrior({"weight": -1.0}),
        ValueError,
        "precision of 'weight' must be positive",
    ),
    "infinite precision": (
        lambda: vm.GaussianPrior(float("inf")),
        ValueError,
        "must be positive and finite",
    ),
    "covariance": (
        lambda: vm.GaussianPrior(covariance=-torch.eye(2)),
        ValueError,
        "positive definite",
    ),
    "scale 0": (lambda: gaussian(scale=0.0), ValueError, "scale must be a positive finite number"),
    # guides
    **{
        f"flattening {name}": (
            lambda name=name: fit(strategy=strategy_of(getattr(autoguide, name))),
            ValueError,
            rf"{name}\w* makes one vector of all tasks",
        )
        for name in (
            "AutoDiagonalNormal",
            "AutoMultivariateNormal",
            "AutoLowRankMultivariateNormal",
            "AutoLaplaceApproximation",
            "AutoGaussian",
        )
    },
    "a guide that mixes tasks": (
        lambda: fit(strategy=strategy_of(Mixing)),
        ValueError,
        r"\['loc'\] do not have the task axis",
    ),
    "a guide of another kind": (
        lambda: fit(strategy=strategy_of(lambda model: 3)),
        TypeError,
        "must return a Pyro guide .*not an int",
    ),
    "a guide that is made already": (
        lambda: fit(strategy=strategy_of(autoguide.AutoNormal(lambda: None))),
        TypeError,
        "made already: give AutoNormal itself, or lambda model",
    ),
    "no guide": (
        lambda: fit(strategy=strategy_of(3)),
        TypeError,
        "guide must be a name or a callable .*not int",
    ),
    # objectives
    **{
        f"{outer} without query data": (
            lambda outer=outer: fit(strategy=vm.Implicit(outer=outer), tasks=no_query),
            ValueError,
            f"outer='{outer}' needs query data, but 1 task of 1 has none, 'south' first",
        )
        for outer in ("query", "query_elbo", "query_predictive")
    },
    "MAML without query data": (
        lambda: fit(strategy=vm.Unrolled(), tasks=no_query),
        ValueError,
        "needs query data",
    ),
    "meta-gradient without query data": (
        lambda: vm.meta_gradient(linear_model(PRIOR), no_query, vm.Unrolled()),
        ValueError,
        "needs query data",
    ),
    "Reptile of the query": (lambda: vm.Reptile(outer="query"), ValueError, "outer='query'"),
    **{
        f"{kind} with a free precision": (
            lambda strategy=strategy: fit(strategy=strategy, model=linear_model(FREE)),
            ValueError,
            "Gaussian guide .*a hyperprior on the precision .*a query objective",
        )
        for kind, strategy in {
            "joint delta": vm.Joint("delta"),
            "reinit delta": vm.Reinit("delta"),
            "implicit delta": vm.Implicit("delta"),
            "implicit query_elbo": vm.Implicit("delta", "query_elbo"),
            "Reptile": vm.Reptile(),
            "unrolled elbo": vm.Unrolled("delta", "elbo"),
            "a delta of one's own": vm.Joint(autoguide.AutoDelta),
        }.items()
    },
    # numbers and kinds of arguments
    "num_steps": (
        lambda: fit(num_steps=0),
        ValueError,
        "num_steps must be a whole number of at least 1, not 0",
    ),
    "batch_size": (
        lambda: fit(batch_size=0),
        ValueError,
        "batch_size must be a whole number of at least 1, not 0",
    ),
    "budget": (lambda: fit(budget=0.0), ValueError, "budget must be a number of at least 1, not 0"),
    "inner_steps": (
        lambda: vm.Unrolled(inner_steps=0),
        ValueError,
        "inner_steps must be a whole number of at least 1, not 0",
    ),
    **{
        f"{name}={value!r}": (
            lambda name=name, value=value: fit(**{name: value}),
            TypeError if isinstance(value, str) else ValueError,
            f"{name} must be a whole number of at least {least}, not {value!r}",
        )
        for name, value, least in [
            ("num_steps", 2.5, 1),
            ("num_steps", "10", 1),
            ("batch_size", 2.5, 1),
            ("seed", 1.5, 0),
            ("seed", -1, 0),
        ]
    },
    "a word for a budget": (
        lambda: fit(budget="all"),
        TypeError,
        "budget must be a number of at least 1, not 'all'",
    ),
    "half an inner step": (
        lambda: vm.Implicit(inner_steps=2.5),  # type: ignore[arg-type]
        ValueError,
        "inner_steps must be a whole number of at least 1, not 2.5",
    ),
    **{
        f"{part} by name in {strategy.__name__}": (
            lambda strategy=strategy, part=part, name=name: fit(strategy=strategy(**{part: name})),
            TypeError,
            f"{part} must be one of vm.*, not the string {name!r}",
        )
        for strategy, part, name in [
            (vm.Implicit, "linear_solver", "cg"),
            (vm.Implicit, "minimizer", "adam"),
            (vm.Joint, "minimizer", "adam"),
        ]
    },
    "a class of minimizers": (
        lambda: fit(strategy=vm.Joint(minimizer=vm.Adam)),  # type: ignore[arg-type]
        TypeError,
        "minimizer must be one of .*not the class Adam itself: call it",
    ),
    "every": (lambda: vm.Reinit(every=0), ValueError, "every must be at least 1"),
    "odd particles": (
        lambda: fit(strategy=vm.Joint(expectation="monte_carlo", num_particles=3)),
        ValueError,
        "even number",
    ),
    "unrolling Newton": (
        lambda: vm.Unrolled(minimizer=vm.NewtonCG()),
        ValueError,
        "must be GradientDescent or Adam",
    ),  # type: ignore[arg-type]
    "an optimizer": (
        lambda: fit(optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)])),
        TypeError,
        "must be a factory",
    ),
    "model": (
        lambda: fit(model=nn.Linear(1, 1)),
        TypeError,
        "model must be a TaskModel, not a Linear",
    ),
    "tasks": (
        lambda: fit(tasks=[vm.Task((ONES, np.zeros(3)))]),
        TypeError,
        "tasks must be a TaskSet, not a list: write TaskSet",
    ),
    "strategy": (lambda: fit(strategy="joint"), TypeError, "strategy must be one of"),
    "strategy class": (lambda: fit(strategy=vm.Joint), TypeError, "strategy must be one of"),
    "a table for tasks": (
        lambda: fit(tasks=TABLE),
        TypeError,
        "tasks must be a TaskSet, not a table: make tasks of it, TaskSet.from_frame",
    ),
    "a table in a TaskSet": (
        lambda: vm.TaskSet(TABLE),
        TypeError,
        "got a table: make tasks of it, TaskSet.from_frame",
    ),
    "tasks with their scaling": (
        lambda: fit(tasks=ragged_tasks(2).standardized()),
        TypeError,
        "not a tuple: standardized.. returns .tasks, scaling., so take its first",
    ),
    "x and y of a task": (
        lambda: vm.TaskSet([vm.Task(ONES, np.zeros(3))]),  # type: ignore[arg-type]
        TypeError,
        r"support is a ndarray, expected a pair .x, y., .* write Task\(support=\(x, y\)",
    ),
    "x and y of a task in lists": (
        lambda: vm.TaskSet([vm.Task([[0.0], [1.0]], [0.0, 1.0])]),  # type: ignore[arg-type]
        TypeError,
        r"query is a list of length 2 of numbers, .* write Task\(support=\(x, y\)",
    ),
    "a word in a column": (
        lambda: vm.TaskSet.from_frame(TABLE, "g", ["dose"], "y"),
        TypeError,
        "column 'dose' .* is 'low' in row 'r1' .task 'b'., expected numbers",
    ),
    "names of columns": (
        lambda: vm.TaskSet([vm.Task((ONES, np.zeros(3)))], x_names=["a", "b"]),
        ValueError,
        r"x_names lists \['a', 'b'\], but a row of x has shape \(1,\)",
    ),
    "a string of names": (
        lambda: vm.TaskSet([vm.Task((ONES, np.zeros(3)))], x_names="a"),
        TypeError,
        r"not the string 'a': write \['a'\]",
    ),
    "prior class": (
        lambda: vm.TaskModel(nn.Linear(1, 1), gaussian(), vm.GaussianPrior),  # type: ignore[arg-type]
        TypeError,
        "prior must be a GaussianPrior.*not the class GaussianPrior itself: call it",
    ),
    "likelihood class": (
        lambda: vm.TaskModel(nn.Linear(1, 1), gaussian),  # type: ignore[arg-type]
        TypeError,
        r"such as Gaussian\(\), not the class Gaussian itself: call it",
    ),
    "net class": (
        lambda: vm.TaskModel(nn.Linear, gaussian()),
        TypeError,
        "not the class Linear itself: call it",
    ),  # type: ignore[arg-type]
    "net": (
        lambda: vm.TaskModel(lambda x: x, gaussian()),
        TypeError,
        "net must be an nn.Module.*from_pyro",
    ),  # type: ignore[arg-type]
    "likelihood": (
        lambda: vm.TaskModel(nn.Linear(1, 1), "gaussian"),
        TypeError,
        "likelihood must be one of",
    ),  # type: ignore[arg-type]
    "a string of shared": (
        lambda: vm.TaskModel(nn.Linear(1, 1), gaussian(), PRIOR, shared="bias"),
        TypeError,
        "list of patterns",
    ),
    "hyperprior": (
        lambda: vm.GaussianPrior(1.0, "shared", hyperprior=2.0),
        TypeError,
        "hyperprior must be a distribution",
    ),  # type: ignore[arg-type]
    "hyperprior of nothing": (
        lambda: vm.GaussianPrior(1.0, hyperprior=dist.Gamma(1.0, 1.0)),
        ValueError,
        "set learn_precision",
    ),
    "meta-gradient of a net": (
        lambda: vm.meta_gradient(nn.Linear(1, 1), no_query, vm.Joint()),
        TypeError,
        "model must be",
    ),  # type: ignore[arg-type]
    "meta-gradient of a list": (
        lambda: vm.meta_gradient(linear_model(PRIOR), [], vm.Joint()),
        TypeError,
        "tasks must be",
    ),  # type: ignore[arg-type]
    "meta-gradient by name": (
        lambda: vm.meta_gradient(linear_model(PRIOR), no_query, "joint"),
        TypeError,
        "strategy must",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused(name: str) -> None:
    act, error, message = CASES[name]
    with pytest.raises(error, match=message):
        act()


def test_the_guard_on_work_works() -> None:
    with pytest.raises(AssertionError, match="work has started"):
        fit()


@pytest.mark.parametrize(
    "strategy",
    [
        vm.Joint("normal"),
        vm.Implicit("delta", "query"),
        vm.Implicit("delta", "query_predictive"),
        vm.Unrolled("delta"),
    ],
    ids=lambda strategy: strategy.describe(),
)
def test_the_ways_out_are_open(strategy: vm.Joint) -> None:
    """What the message about a free precision recommends is not refused itself."""
    with pytest.raises(AssertionError, match="work has started"):
        fit(strategy=strategy, model=linear_model(FREE))
    hyperprior = vm.GaussianPrior(3.0, "shared", hyperprior=dist.Gamma(2.0, 1.0))
    with pytest.raises(AssertionError, match="work has started"):
        fit(strategy=vm.Joint("delta"), model=linear_model(hyperprior))


def test_frozen_batch_norm_is_let_in() -> None:
    with pytest.raises(AssertionError, match="work has started"):
        fit(model=vm.TaskModel(bn, gaussian(), PRIOR, batch_norm="frozen"))
