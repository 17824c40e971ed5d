"""A set remembers the scaling that made it, so that a fit knows tasks in other units."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import varmeta as vm

L = vm.likelihoods


def raw(seed: int = 0, number: int = 12) -> vm.TaskSet:
    """Lines over years, in hundreds."""
    made = vm.datasets.lines(number, 6, 4, noise=0.1, seed=seed, dtype=torch.float64)

    def far(part: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return 1980.0 + 10.0 * part[0], 300.0 + 50.0 * part[1]

    return vm.TaskSet([replace(t, support=far(t.support), query=far(t.query)) for t in made])


def model() -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision="full")
    return vm.TaskModel(vm.LinearPredictor(["x"]), L.Gaussian(), prior)


@pytest.fixture(scope="module")
def fits() -> dict[str, vm.Fit]:
    dense = vm.Joint("multivariate_normal")
    return {
        "scaled": vm.fit(model(), raw().standardized(L.Gaussian())[0], dense),
        "raw": vm.fit(model(), raw(), dense),
    }


NEW: dict[str, Callable[[vm.TaskSet], vm.TaskSet]] = {
    "itself": lambda tasks: tasks,
    "slice": lambda tasks: tasks[2:5],
    "split": lambda tasks: tasks.merged().split(3),
    "float32": lambda tasks: tasks.to(torch.float32),
    "listed": lambda tasks: vm.TaskSet([*tasks[:3], *tasks[3:], vm.Task(name="no data")]),
    "with query": lambda tasks: tasks.with_query(),
}


@pytest.mark.parametrize("how", NEW)
def test_what_is_taken_from_a_scaled_set_is_in_its_units(how: str, fits: dict[str, vm.Fit]) -> None:
    fit = fits["scaled"]
    assert fit.tasks.scaling is not None
    new = NEW[how](fit.tasks.scaling.apply(raw(1)))
    assert new.scaling is fit.tasks.scaling
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.adapt(new)
        fits["raw"].adapt(NEW[how](raw(1)))


def test_raw_tasks_are_told_by_a_fit_to_scaled_ones(fits: dict[str, vm.Fit]) -> None:
    fit, scaling = fits["scaled"], fits["scaled"].tasks.scaling
    assert scaling is not None
    asks = r"the fit's tasks were scaled.*and these were not: give fit.tasks.scaling.apply\(tasks\)"
    right = fit.adapt(scaling.apply(raw(1)))
    with pytest.warns(RuntimeWarning, match=asks) as told:
        fit.adapt(raw(1))
    assert told[0].filename == __file__
    with pytest.warns(RuntimeWarning, match=asks):
        right.score(raw(1))
    with pytest.warns(RuntimeWarning, match=asks):
        right.predict(raw(1))
    dense = vm.Joint("multivariate_normal")
    adam = torch.optim.Adam
    with pytest.warns(RuntimeWarning, match=asks):
        vm.fit(model(), fit.tasks, dense, 2, adam, validate=raw(1))


def test_one_says_of_tasks_scaled_by_hand_what_they_are(fits: dict[str, vm.Fit]) -> None:
    fit, scaling = fits["scaled"], fits["scaled"].tasks.scaling
    assert scaling is not None
    known = scaling.apply(raw(1))
    by_hand = vm.TaskSet([vm.Task(task.support, name=task.name) for task in known])
    assert by_hand.scaling is None
    with pytest.warns(RuntimeWarning, match=r"say so by tasks.scaling = fit.tasks.scaling"):
        fit.adapt(by_hand)
    by_hand.scaling = scaling
    fit.adapt(by_hand)


def test_tasks_of_another_scaling_are_told(fits: dict[str, vm.Fit]) -> None:
    own, _ = raw(1)[:3].standardized(L.Gaussian())
    with pytest.warns(RuntimeWarning, match="these tasks were scaled by Scaling.*but the fit's by"):
        fits["scaled"].adapt(own)
    with pytest.warns(RuntimeWarning, match="and the fit's tasks were not"):
        fits["raw"].adapt(own)
    mixed = vm.TaskSet([own[0], raw(2)[5]])
    assert mixed.scaling is None
    # the same numbers found again
    _, again = raw().standardized(L.Gaussian())
    fits["scaled"].adapt(again.apply(raw(1)))


def test_tasks_without_rows_are_in_no_units(fits: dict[str, vm.Fit]) -> None:
    fits["scaled"].adapt(vm.TaskSet([vm.Task(name="new")]))


@pytest.mark.parametrize("told", [True, False])
def test_scaled_twice_is_one_scaling(told: bool) -> None:
    likelihood = L.Gaussian() if told else None
    first = vm.TaskSet([vm.Task(([1.0, 3.0, 5.0], [10, 14, 21]), features={"a": 3.0}),
                        vm.Task(([2.0, 7.0], [10, 19]), features={"a": 5.0})])  # fmt: skip
    _, one = first[:1].standardized(likelihood)
    _, two = first.standardized(likelihood)
    twice = two.apply(one.apply(first))
    assert twice.scaling is not None
    at_once = twice.scaling.apply(first)
    torch.testing.assert_close(twice.batch().support.x, at_once.batch().support.x)
    torch.testing.assert_close(twice.batch().support.y, at_once.batch().support.y)
    assert twice.features["a"].tolist() == pytest.approx(at_once.features["a"].tolist())
    assert twice.scaling.left_raw is not told
    assert not twice.scaling.is_same(two)
    # standardised data stay as they are
    again = one.apply(first[:1]).standardized(likelihood)[0]
    assert again.scaling is not None and again.scaling.is_same(one)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_a_file_knows_the_scaling(data: bool, told: bool, tmp_path: Path) -> None:
    likelihood = L.Gaussian() if told else None
    tasks, scaling = raw().standardized(likelihood)
    vm.fit(model(), tasks, vm.Joint("multivariate_normal")).save(tmp_path / "a.fit", data=data)
    back = vm.load(tmp_path / "a.fit", model())
    found = back.tasks.scaling
    assert found is not None
    for name in ("x_loc", "x_scale", "y_loc", "y_scale"):
        assert torch.equal(getattr(found, name), getattr(scaling, name))
    assert (found.likelihood is not None) is told and found.features == scaling.features
    back.adapt(found.apply(raw(1)))
    back.adapt(scaling.apply(raw(1)))
    with pytest.warns(RuntimeWarning, match="and these were not"):
        back.adapt(raw(1))
    back.save(tmp_path / "b.fit", data=data)
    assert vm.load(tmp_path / "b.fit", model()).tasks.scaling.is_same(scaling)  # type: ignore[union-attr]


def test_a_checkpoint_and_features_and_whole_numbers_too(tmp_path: Path) -> None:
    rows = [([[1.0, 5.0], [3.0, 2.0]], [1, 4]), ([[2.0, 0.0]], [2])]
    tasks = vm.TaskSet([vm.Task(row, features={"a": float(i)}) for i, row in enumerate(rows)])
    tasks, scaling = tasks.standardized(L.Poisson())
    prior = vm.GaussianPrior(covariates=["a"])
    counts = vm.TaskModel(vm.LinearPredictor(["b", "c"]), L.Poisson(), prior)
    adam = torch.optim.Adam
    folder = tmp_path / "run"
    vm.fit(counts, tasks, vm.Joint("normal"), 2, adam, checkpoint=folder)
    (file,) = [file for file in folder.iterdir() if "2" in file.name]
    found = vm.load(file, counts).tasks.scaling
    assert found is not None and found.is_same(scaling) and found.features == scaling.features
    assert found.y_scale.dtype == torch.int64


def test_a_fit_to_raw_tasks_has_none(tmp_path: Path, fits: dict[str, vm.Fit]) -> None:
    fits["raw"].save(tmp_path / "a.fit")
    assert vm.load(tmp_path / "a.fit", model()).tasks.scaling is None


def test_raw_x_is_scaled_as_the_tasks_are() -> None:
    tasks = vm.TaskSet([vm.Task(([[1.0, 5.0], [3.0, 9.0]], [1.0, 2.0]))])
    scaled, scaling = tasks.standardized()
    x = scaling.x([[1.0, 5.0], [3.0, 9.0]])
    torch.testing.assert_close(x, scaled[0].support[0])
    torch.testing.assert_close(scaling.x(np.array([1, 5])), scaled[0].support[0][0])
    for wrong in ([1.0, 2.0, 3.0], 1.0):
        with pytest.raises(ValueError, match=r"rows of shape \(2,\): give one such row per point"):
            scaling.x(wrong)
    _, single = raw().standardized()
    assert single.x([1980.0, 1990.0]).shape == (2,) and single.x(single.x_loc[None]).item() == 0
