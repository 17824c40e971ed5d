"""Columns keep their names from the table to the printed prior, the figures and the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import adam, known, linear_model, ragged_tasks, seeded
from varmeta.models.labels import parameter_labels

PRIOR = vm.GaussianPrior(3.0)
COLUMNS = ["age", "dose"]


def table(rows: int = 24) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"clinic": np.arange(rows) % 4, "age": rng.normal(size=rows), "dose": rng.normal(size=rows)}
    )
    return frame.assign(y=frame["age"] + rng.normal(size=rows), later=frame.index % 3 == 0)


def tasks_of(x: list[str] | str = COLUMNS, **options: str) -> vm.TaskSet:
    return vm.TaskSet.from_frame(table(), task="clinic", x=x, y="y", **options)


def regression(net: nn.Module | None = None, **options: list[str]) -> vm.TaskModel:
    return vm.TaskModel(net or nn.Linear(2, 1), vm.likelihoods.Gaussian(), PRIOR, **options)


# -- on the tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "names"), [(COLUMNS, ("age", "dose")), ("age", ("age",)), ([], ())])
def test_a_table_gives_its_names(x: list[str] | str, names: tuple[str, ...]) -> None:
    assert tasks_of(x).x_names == names


def test_names_survive_whatever_is_done_to_the_tasks() -> None:
    tasks = tasks_of(query="later")
    standard, scaling = tasks.standardized()
    derived = {
        "slice": tasks[1:3],
        "positions": tasks[[2, 0]],
        "mask": tasks[np.arange(4) > 1],
        "merged": tasks.merged(),
        "split": tasks.merged().split(2),
        "dtype": tasks.to(dtype=torch.float32),
        "standardized": standard,
        "scaled": scaling.apply(tasks[:1]),
        "nothing left": tasks.merged().split(0),
    }
    assert {name: part.x_names for name, part in derived.items()} == dict.fromkeys(
        derived, ("age", "dose")
    )


def test_arrays_may_be_given_names() -> None:
    tasks = [vm.Task((np.zeros((2, 2)), np.zeros(2))), vm.Task()]
    assert vm.TaskSet(tasks).x_names is None
    named = vm.TaskSet(tasks, x_names=COLUMNS)
    assert named.x_names == ("age", "dose") and named[[1]].x_names == ("age", "dose")
    assert vm.TaskSet([vm.Task()], x_names=COLUMNS).x_names == ("age", "dose")


def test_names_come_back_from_a_file(tmp_path: Path) -> None:
    fit = known(regression(), tasks_of(), vm.Joint())
    fit.save(tmp_path / "fit.pt")
    back = vm.load(tmp_path / "fit.pt", fit.model)
    assert back.tasks.x_names == ("age", "dose") and str(back) == str(fit)


# -- on the weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "labels"),
    [
        (nn.Linear(2, 1), ["age", "dose", "intercept"]),
        (nn.Linear(2, 1, bias=False), ["age", "dose"]),
        (
            nn.Linear(2, 2),
            ["age[0]", "dose[0]", "age[1]", "dose[1]", "intercept[0]", "intercept[1]"],
        ),
        (nn.Sequential(nn.Dropout(), nn.Linear(2, 1), nn.Softplus()), ["age", "dose", "intercept"]),
        # no number of these belongs to a column alone
        (
            nn.Sequential(nn.Linear(2, 1), nn.PReLU()),
            ["0.weight[0,0]", "0.weight[0,1]", "0.bias", "1.weight"],
        ),
        (nn.Sequential(nn.Tanh(), nn.Linear(2, 1)), ["1.weight[0,0]", "1.weight[0,1]", "1.bias"]),
        (nn.Linear(3, 1), ["weight[0,0]", "weight[0,1]", "weight[0,2]", "bias"]),
    ],
)
def test_labels_of_a_net(net: nn.Module, labels: list[str]) -> None:
    named = parameter_labels(regression(net), ("age", "dose"))
    assert [label for part in named.values() for label in part] == labels
    plain = parameter_labels(regression(net), None)
    assert (
        tuple(label for part in plain.values() for label in part) == regression(net).weights.labels
    )


def test_a_column_called_intercept_does_not_make_two() -> None:
    named = parameter_labels(regression(), ("intercept", "dose"))
    assert named == {"weight": ("weight[0,0]", "weight[0,1]"), "bias": ("bias",)}


def test_dicts_keep_the_names_of_parameters() -> None:
    fit = known(regression(shared=["weight"]), tasks_of(), vm.Joint("normal"))
    assert fit.prior.labels == ("intercept",) == fit.posterior().labels
    assert set(fit.prior.loc) == {"bias"} and set(fit.prior.shared) == {"weight"}
    assert fit.prior.shared_labels == {"weight": ("age", "dose")}


def test_the_export_is_labelled() -> None:
    fit = known(regression(), tasks_of(), vm.Joint("normal"))
    assert fit.to_arviz(30)["posterior"]["weight"].values.tolist() == ["age", "dose", "intercept"]
    unseen = fit.adapt(vm.TaskSet([vm.Task(name="new")]))  # does not know its columns itself
    assert unseen.labels == ("age", "dose", "intercept")
    assert unseen.to_arviz(30)["posterior"]["weight"].values.tolist() == [
        "age",
        "dose",
        "intercept",
    ]


def test_tasks_with_their_columns_in_another_order_are_refused() -> None:
    fit = known(regression(), tasks_of(), vm.Joint())
    turned = tasks_of(["dose", "age"])
    with pytest.raises(
        ValueError,
        match=r"these tasks' x are \['dose', 'age'\], but \['age', 'dose'\] in the training",
    ):
        fit.adapt(turned)
    with pytest.raises(ValueError, match="the same columns in the same order"):
        fit.posterior().score(turned)
    assert (
        len(fit.adapt(vm.TaskSet([vm.Task((np.zeros((1, 2)), np.zeros(1)))])).names) == 1
    )  # no names: on trust


# -- print -----------------------------------------------------------------------------------------


def test_print_has_names_values_and_says_what_was_fixed() -> None:
    fit = known(regression(shared=["weight"]), tasks_of(), vm.Joint("normal"))
    lines = str(fit).splitlines()
    age, dose = fit.prior.shared["weight"].flatten().tolist()
    sd = 3.0**-0.5
    assert f"{'intercept':<11} {float(fit.prior.loc['bias']):>12.5g} {sd:>12.5g} (fixed)" in lines
    assert (
        f"{'age':<11} {age:>12.5g} {'shared':>12}" in lines
        and f"{'dose':<11} {dose:>12.5g} {'shared':>12}" in lines
    )
    assert "tensor" not in str(fit)
    learned = linear_model(vm.GaussianPrior(3.0, "shared"))
    assert "(fixed)" not in str(vm.fit(learned, ragged_tasks(3), vm.Joint("normal"), 2, adam))


def test_print_of_a_shared_network_is_short() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 60), nn.Tanh(), nn.Linear(60, 1)))
    text = str(known(regression(net, shared=["0.*"]), ragged_tasks(2), vm.Joint()))
    assert f"{'0.weight (60, 1)':<16} " in text and len(text.splitlines()) < 12
    assert sum(line.endswith(" shared") for line in text.splitlines()) == 2


def test_print_of_a_networks_head_is_by_tensor() -> None:
    """33 weights of a head of 32 units."""
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)))
    text = str(known(regression(net, shared=["0.*"]), ragged_tasks(2), vm.Joint()))
    assert f"{'2.weight (1, 32)':<16} {'rms':>4}" in text and "[0,0]" not in text
    assert len(text.splitlines()) == 10


@pytest.mark.parametrize("outer", ["elbo", "query_elbo", "query", "query_predictive"])
def test_print_of_a_point_says_that_nothing_is_a_bound(outer: str) -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Implicit("delta", outer))
    assert "no bound" in str(fit).splitlines()[1]
    assert "no bound" not in str(
        known(linear_model(PRIOR), ragged_tasks(2), vm.Implicit("normal", outer))
    )


def test_repr_of_a_prior_is_one_short_line() -> None:
    fit = known(regression(shared=["weight"]), tasks_of(), vm.Joint())
    bias = float(fit.prior.loc["bias"])
    assert repr(fit.prior).startswith(f"LearnedPrior(intercept {bias:.4g} (sd 0.577), age ")
    assert repr(fit.prior).endswith("(shared), noise scale 1)")
    big = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    assert len(repr(big.prior)) < 200
