"""Where a name is wrong, the complaint ends in the one that was meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

import varmeta as vm
from tests.test_choices import CHOICES

FRAME = pd.DataFrame({"school": ["a", "a", "b"], "hours": [1.0, 2.0, 3.0], "score": [0.5, 1.0, 2]})
TASKS = vm.TaskSet.from_frame(FRAME, task="school", x=["hours"], y="score")
NET = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
GAUSSIAN = vm.likelihoods.Gaussian()


def _model(**prior: Any) -> vm.TaskModel:
    return vm.TaskModel(vm.LinearPredictor(["hours"]), GAUSSIAN, vm.GaussianPrior(**prior))


def _posterior() -> vm.Posterior:
    return vm.fit(_model(), TASKS, vm.Joint("normal"), num_steps=1).posterior()


# what is typed wrongly, and what was meant
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "column of a table": (
        lambda: vm.TaskSet.from_frame(FRAME, task="school", x=["hour"], y="score"),
        "hours",
    ),
    "column of the task": (
        lambda: vm.TaskSet.from_frame(FRAME, task="School", x=["hours"], y="score"),
        "school",
    ),
    "column of new x": (
        lambda: _posterior().predict(FRAME.rename(columns={"hours": "Hours"})),
        "Hours",
    ),
    "task of a set": (
        lambda: vm.TaskSet([vm.Task(([1.0], [1.0]), name="north")])["nort"],
        "north",
    ),
    "task of a posterior": (lambda: _posterior().take(["A"]), "a"),
    "task of a prediction": (lambda: _posterior().predict([[1.0]]).task("B"), "b"),
    "precision": (lambda: _model(precision={"hours": 1.0, "Intercept": 1.0}), "intercept"),
    "loc": (lambda: _model(loc={"hour": 0.0}), "hours"),
    "learn_loc": (lambda: _model(learn_loc=["intercpt"]), "intercept"),
    "loc_hyperprior": (
        lambda: _model(loc_hyperprior={"hour": torch.distributions.Normal(0.0, 1.0)}),
        "hours",
    ),
    "scale_hyperprior": (
        lambda: _model(
            learn_precision="per_parameter",
            scale_hyperprior={"hour": torch.distributions.HalfNormal(1.0)},
        ),
        "hours",
    ),
    "covariates": (lambda: _model(covariates={"intrcept": ["age"]}), "intercept"),
    "shared": (lambda: vm.TaskModel(NET, GAUSSIAN, shared=["0.wieght"]), "0.weight"),
    "lr by name": (
        lambda: vm.meta_gradient(
            _model(), TASKS, vm.Unrolled(minimizer=vm.GradientDescent({"hour": 0.1, "*": 0.1}))
        ),
        "hours",
    ),
    "offset": (lambda: vm.LinearPredictor(["days"], offset="day"), "days"),
    "eta": (
        lambda: vm.meta_gradient(
            _model(),
            TASKS,
            vm.Implicit(),
            eta=dict.fromkeys(("hour", "intercept", "log_scale"), torch.zeros(())),
        ),
        "hours",
    ),
    "curves": (lambda: vm.plot.plot_curves(_posterior(), [0.0, 1.0], "A"), "a"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_name_that_was_meant_is_told(what: str) -> None:
    call, meant = WRONG[what]
    with pytest.raises((ValueError, KeyError)) as refused:
        call()
    assert str(refused.value).strip("\"'").endswith(f"; did you mean {meant!r}?"), refused.value


@pytest.mark.parametrize("what", CHOICES)
def test_so_is_the_choice(what: str) -> None:
    alias, take = CHOICES[what]
    for name in getattr(alias, "__args__", ()):
        if isinstance(name, str):
            with pytest.raises(ValueError, match="; did you mean ") as refused:
                take(name.upper() + "s")
            assert str(refused.value).endswith(f"; did you mean {name!r}?")


def test_of_a_far_name_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="its columns are") as refused:
        vm.TaskSet.from_frame(FRAME, task="school", x=["weight"], y="score")
    assert "did you mean" not in str(refused.value)
