"""Episodes of fewer classes than the head has are told, and ordinary data are not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.models.check_ways import unsaid_ways

ROWS, LABELS = (
    torch.randn(120, 2, generator=torch.Generator().manual_seed(0)),
    torch.arange(120) % 6,
)
STEP = vm.FirstOrder("delta", "query", 1, vm.GradientDescent(0.01))


def model_of(likelihood: vm.likelihoods.Likelihood | None = None) -> vm.TaskModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))
    made = likelihood or vm.likelihoods.Categorical(5)
    return vm.TaskModel(net, made, vm.GaussianPrior(1.0), shared=["0.*"])


def few(ways: Any = 3, number: int = 4) -> vm.TaskSet:
    return vm.episodes(ROWS, LABELS, ways, 1, 2).take(number)


def test_episodes_of_fewer_classes_are_told_by_fit_and_adapt() -> None:
    told = r"episodes of 3 classes, as many rows of each, but Categorical\(num_classes=5\) has 5"
    with pytest.warns(RuntimeWarning, match=told):
        vm.fit(model_of(), few(), STEP, 2, compile=False)
    with pytest.warns(RuntimeWarning, match=told):
        vm.fit(model_of(), vm.episodes(ROWS, LABELS, 3, 1, 2), STEP, 2, batch_size=4)
    fit = vm.fit(model_of(), vm.episodes(ROWS, LABELS, 5, 1, 2), STEP, 2, batch_size=4)
    with pytest.warns(RuntimeWarning, match=told):
        fit.adapt(few())


SILENT = {
    "all classes": few(5),
    "a class is rare": vm.TaskSet(
        [vm.Task((ROWS[:8], torch.tensor([0, 0, 1, 2, 3, 1, 0, 2])), name=name) for name in "abc"]
    ),
    "a class is missing in the middle": vm.TaskSet(
        [vm.Task((ROWS[:6], torch.tensor([0, 0, 1, 1, 3, 3])), name=name) for name in "abc"]
    ),
    "some tasks have all": vm.TaskSet(
        [vm.Task((ROWS[:5], torch.arange(5))), vm.Task((ROWS[:6], torch.arange(6) % 3))]
    ),
    "a class each": vm.TaskSet(
        [vm.Task((ROWS[:6], torch.full((6,), k))) for k in (0, 0, 0)]
    ),
    "few rows": vm.TaskSet([vm.Task((ROWS[:3], torch.arange(3)))]),
    "other classes in the query": vm.TaskSet(
        [vm.Task((ROWS[:6], torch.arange(6) % 2), (ROWS[:6], torch.arange(6) % 3))]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SILENT)
def test_what_may_be_ordinary_data_is_not_told(what: str) -> None:
    assert unsaid_ways(model_of(), SILENT[what]) is None


def test_where_the_tasks_say_their_number_some_that_have_all_are_told_too() -> None:
    found = unsaid_ways(model_of(), few((2, 5), 20))
    assert found is not None and "episodes of 2 to 5 classes" in found and "ways='ways'" in found
    said = vm.likelihoods.Categorical(5, ways="ways")
    assert unsaid_ways(model_of(said), few((2, 5), 20)) is None


def test_least_squares_and_weighted_classes_are_told_and_numbers_are_not() -> None:
    assert unsaid_ways(model_of(vm.likelihoods.LeastSquaresClasses(5)), few()) is not None
    assert unsaid_ways(model_of(vm.likelihoods.Categorical()), few()) is None
    gaussian = vm.TaskModel(nn.Linear(2, 1), vm.likelihoods.Gaussian())
    assert unsaid_ways(gaussian, few()) is None


def test_prototypes_give_a_class_without_rows_no_probability() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = vm.fit(model_of(), few(), vm.Prototypes(), 2, torch.optim.Adam)
        fit.adapt(few())
