"""Parts of a user's own that hand back the wrong thing, and columns without a difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.optim.clipped_adam import ClippedAdam

import varmeta as vm
from varmeta.fitting.optimizer import check_factory

TASKS = vm.datasets.lines(3, num_support=4, num_query=2, dtype=torch.float64)
MODEL = vm.TaskModel(
    vm.LinearPredictor(["dose"]),
    vm.likelihoods.Gaussian(),
    vm.GaussianPrior(learn_precision="shared"),
)


def fit(strategy: Any = None, optimizer: Any = None) -> vm.Fit:
    return vm.fit(MODEL, TASKS, vm.Joint("normal") if strategy is None else strategy, 1, optimizer)


def gradient(strategy: Any) -> vm.MetaGradient:
    return vm.meta_gradient(MODEL, TASKS, strategy)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, 1e-2)


def guide_function(eta: Any, data: Any) -> Any:
    loc = pyro.param("loc", lambda: torch.zeros(len(data), 1, 2))
    with pyro.plate("tasks", len(data), dim=-2):
        return pyro.sample("theta", dist.Delta(loc, event_dim=1))


@dataclass(frozen=True)
class Solver(vm.LinearSolver):
    """Returns what it was told to make of b."""

    make: Callable[[Any], Any]

    def solve(self, matvec: Any, b: Any) -> Any:
        return self.make(b)


@dataclass(frozen=True)
class Rule(vm.FirstOrderMinimizer):
    make: Callable[[Any, Any], Any]

    def init(self, phi: Any) -> Any:
        return {}

    def update(self, phi: Any, gradient: Any, state: Any, lr_scale: Any = 1.0) -> Any:
        return self.make(phi, state)


@dataclass(frozen=True)
class Search(vm.Minimizer):
    def solve(self, fn: Any, phi: Any, **options: Any) -> Any:
        return phi


@dataclass(frozen=True)
class Own(vm.Strategy):
    """A strategy of which one part returns something else."""

    wrong: str = ""
    value: Any = None

    def traits(self, problem: Any) -> Any:
        return self.value if self.wrong == "traits" else vm.Traits(noisy=False)

    def init(self, problem: Any, batch: Any, eta: Any) -> Any:
        return self.value if self.wrong == "init" else vm.State()

    def loss(self, problem: Any, batch: Any, eta: Any, state: Any) -> Any:
        losses = problem.losses("elbo", batch, 0)(problem.start(batch, eta), eta)
        found = [losses.sum(), state, vm.Stats(losses.detach(), torch.tensor(1.0))]
        if self.wrong == "loss":
            return self.value
        if self.wrong in ("0", "1", "2"):
            found[int(self.wrong)] = losses if self.wrong == "0" else self.value
        return tuple(found)

    def adapt(self, problem: Any, batch: Any, eta: Any) -> Any:
        return problem.start(batch, eta)


def stats(number: int) -> dict[str, torch.Tensor]:
    return {name: torch.ones(number) for name in ("residual", "curvature", "products")}


def codes(number: int) -> torch.Tensor:
    return torch.zeros(number, dtype=torch.int64)


def implicit(make: Callable[[Any], Any]) -> vm.Implicit:
    return vm.Implicit("delta", "query", linear_solver=Solver(make))


def unrolled(make: Callable[[Any, Any], Any]) -> vm.Unrolled:
    return vm.Unrolled("delta", "query", minimizer=Rule(make))


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "guide function": (
        lambda: fit(vm.Joint(guide_function)),
        TypeError,
        "guide must be a factory, model -> Pyro guide, which 'guide_function' is not .*PyroModule",
    ),
    "guide function of the model": (
        lambda: fit(vm.Joint(lambda model: None)),
        TypeError,
        "factory '<lambda>' must return a Pyro guide .*not None",
    ),
    "pyro optimiser": (
        lambda: fit(optimizer=pyro.optim.ClippedAdam({"lr": 0.01})),
        TypeError,
        "one of pyro.optim, .*give a factory of torch's, lambda params: torch.optim.Adam",
    ),
    "pyro optimiser, not called": (
        lambda: fit(optimizer=pyro.optim.Adam),
        TypeError,
        "one of pyro.optim",
    ),
    "optimiser's name": (lambda: fit(optimizer="adam"), TypeError, "factory.*not the string"),
    "factory of nothing": (
        lambda: fit(optimizer=lambda params: None),
        TypeError,
        "factory returns None, expected a torch.optim.Optimizer",
    ),
    "tree from a solver": (lambda: gradient(implicit(lambda b: b)), TypeError, "returns a dict"),
    "no codes": (
        lambda: gradient(implicit(lambda b: vm.Solution(b, None, stats(3)))),  # type: ignore[arg-type]
        TypeError,
        "Solver.solve returns None as 'result', expected a tensor",
    ),
    "number for a stat": (
        lambda: gradient(
            implicit(lambda b: vm.Solution(b, codes(3), stats(3) | {"curvature": 1.0}))  # type: ignore[dict-item]
        ),
        TypeError,
        "returns a float as 'curvature', expected a tensor",
    ),
    "stats of other tasks": (
        lambda: gradient(implicit(lambda b: vm.Solution(b, codes(2), stats(2)))),
        ValueError,
        r"'result' of shape \(2,\), expected \(3,\), a number per task",
    ),
    "other shapes": (
        lambda: gradient(
            implicit(
                lambda b: vm.Solution({n: v[..., :1] for n, v in b.items()}, codes(3), stats(3))
            )
        ),
        ValueError,
        r"returns a value of {'loc': \(3, 1\)}, expected {'loc': \(3, 2\)}",
    ),
    "tree from a minimiser": (
        lambda: gradient(vm.Implicit("delta", "query", minimizer=Search())),
        TypeError,
        "Search.solve returns a dict, expected vm.Solution",
    ),
    "phi from a rule": (
        lambda: gradient(unrolled(lambda phi, state: phi)),
        TypeError,
        "Rule.update returns a dict, expected two dicts of tensors by name",
    ),
    "tensor from a rule": (
        lambda: gradient(unrolled(lambda phi, state: (phi["loc"], state))),
        TypeError,
        r"Rule.update returns \(a Tensor, a dict\), expected two dicts",
    ),
    "phi of another shape": (
        lambda: gradient(unrolled(lambda phi, state: ({"loc": phi["loc"][:, :1]}, state))),
        ValueError,
        r"a phi of {'loc': \(1, 1\)}, expected {'loc': \(1, 2\)}",
    ),
    "traits": (
        lambda: fit(Own("normal", wrong="traits", value={"noisy": False})),
        TypeError,
        r"Own.traits returns a dict, expected vm.Traits\(...\)",
    ),
    "state": (
        lambda: gradient(Own("normal", wrong="init")),
        TypeError,
        "Own.init returns None, expected vm.State",
    ),
    "state of a fit": (
        lambda: fit(Own("normal", wrong="init"), adam),
        TypeError,
        "Own.init returns None, expected vm.State",
    ),
    "loss": (
        lambda: fit(Own("normal", wrong="loss", value=(1, 2)), adam),
        TypeError,
        "Own.loss returns a tuple of 2, expected three things",
    ),
    "losses": (
        lambda: gradient(Own("normal", wrong="0")),
        TypeError,
        r"Own.loss returns a Tensor of shape \(3,\) as its first, .*self.total",
    ),
    "next state": (
        lambda: gradient(Own("normal", wrong="1", value={})),
        TypeError,
        "Own.loss returns a dict as its second, expected a vm.State",
    ),
    "stats": (
        lambda: gradient(Own("normal", wrong="2", value={})),
        TypeError,
        "Own.loss returns a dict as its third, expected Stats",
    ),
    "adapt": (
        lambda: fit(Own("normal"), adam).adapt(TASKS),
        TypeError,
        "Own.adapt returns a dict, expected vm.Solution",
    ),
    "file": (
        lambda: vm.load(Path("no") / "such.fit", MODEL),
        FileNotFoundError,
        "no such file: Fit.save writes one",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_came_and_what_was_expected_is_told(what: str) -> None:
    call, kind, words = REFUSED[what]
    with pytest.raises(kind, match=words):
        call()


def test_torchs_optimisers_that_live_in_pyro_are_taken() -> None:
    check_factory(ClippedAdam)
    check_factory(lambda params: ClippedAdam(params))


# -- columns that are the same in every row --------------------------------------------------------


def table(value: float) -> vm.TaskSet:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 6)
    dose = rng.normal(size=60)
    y = 1.0 + rng.normal(size=10)[group] + dose + 0.3 * rng.normal(size=60)
    frame = pd.DataFrame({"ward": group, "dose": dose, "year": value, "y": y})
    return vm.TaskSet.from_frame(frame, task="ward", x=["dose", "year"], y="y")


def regression(net: torch.nn.Module) -> vm.TaskModel:
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="shared"))


@pytest.mark.parametrize("value", [3.0, 0.0])
def test_a_constant_column_is_named(value: float) -> None:
    tasks = table(value)
    for net in (vm.LinearPredictor(tasks.x_names), torch.nn.Linear(2, 1).double()):  # type: ignore[arg-type]
        with pytest.warns(RuntimeWarning) as caught:
            vm.fit(regression(net), tasks)
        said = [str(one.message) for one in caught]
        words = f"year is {value:g} in every row, so that the data say nothing of its weight"
        assert any(one.startswith(words) for one in said), said
        assert not any("hardly tell" in one for one in said), said


def test_a_column_of_ones_may_be_the_intercept() -> None:
    tasks = table(1.0)
    vm.fit(regression(vm.LinearPredictor(["dose", "year"], intercept=False)), tasks)
    # and one that has no weight may be anything
    vm.fit(regression(vm.LinearPredictor(["dose", "year"], offset="year")), tasks)
