"""`compare` of classes: the baselines that the field has, which follow from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from scipy.spatial import distance
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, linear_model, ragged_tasks, seeded
from varmeta.fitting.baselines import BASELINES, HEAD, NEAREST, PROTOTYPES, baseline, baselines_of
from varmeta.fitting.nearest_neighbour import error_rates
from varmeta.models.initialised import initialised

matplotlib.use("Agg")
L = vm.likelihoods
WAYS = 3
QUICK: dict[str, Any] = {"budget": 20, "num_samples": 20, "compile": False, "optimizer": adam}


def clouds(num_tasks: int = 5, seed: int = 0, query: bool = True) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(seed)

    def part(centres: Tensor, n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % WAYS
        return centres[y] + torch.randn(n, 4, generator=generator, dtype=torch.float64), y

    tasks = []
    for index in range(num_tasks):
        centres = 2 * torch.randn(WAYS, 4, generator=generator, dtype=torch.float64)
        more = index % 3
        tasks.append(
            vm.Task(part(centres, 4 + more), part(centres, 4 + more) if query else None, f"{index}")
        )
    return vm.TaskSet(tasks)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WAYS)))


def model_of(likelihood: Any = None, shared: Any = ("0.*",), **prior: Any) -> vm.TaskModel:
    likelihood = L.Categorical(WAYS) if likelihood is None else likelihood
    return vm.TaskModel(net(), likelihood, vm.GaussianPrior(**prior), shared=shared)


def binary() -> vm.TaskModel:
    return vm.TaskModel(seeded(lambda: nn.Linear(4, 1)), L.Bernoulli())


ALL = (*BASELINES, NEAREST, PROTOTYPES, HEAD)


@pytest.mark.parametrize(
    ("model", "train", "expected"),
    [
        (model_of, clouds(), ALL),
        (lambda: model_of(L.LeastSquaresClasses(WAYS)), clouds(), ALL),
        (lambda: model_of(learn_precision="shared"), clouds(), ALL),
        (lambda: model_of(shared=()), clouds(), ALL[:3]),
        (lambda: model_of(shared=("2.*",)), clouds(), ALL[:3]),
        (model_of, clouds(query=False), ALL[:3]),
        (binary, clouds(), BASELINES),
        (lambda: linear_model(vm.GaussianPrior()), ragged_tasks(), BASELINES),
    ],
)
def test_which_rows_there_are_follows_from_the_model(
    model: Any, train: vm.TaskSet, expected: tuple[str, ...]
) -> None:
    assert baselines_of(model(), train) == expected


@pytest.fixture(scope="module")
def report() -> vm.Report:
    # in closed form "no pooling" takes no search
    model = model_of(L.LeastSquaresClasses(WAYS), learn_precision="shared")
    strategy = {"ridge": vm.Implicit("delta", "query", minimizer=vm.ClosedForm())}
    return vm.compare(strategy, model, clouds(), clouds(4, 1), seeds=[3], **QUICK)


def test_the_rows_stand_in_the_table_and_had_the_same_start_and_budget(report: vm.Report) -> None:
    assert list(report.table.index) == ["ridge", *ALL]
    assert not report.runs["failed"].any(), report.runs["stop"].tolist()
    learned = set(report.table.index) - {NEAREST}
    assert set(report.fits) == {(method, 3) for method in learned}
    assert (report.table.loc[[PROTOTYPES, HEAD], "evaluations"] == 20).all()
    assert report.table["error_rate"].notna().all()
    for method in (PROTOTYPES, HEAD):
        fit = report.fits[method, 3]
        own = fit.adapt(clouds(4, 1)).score().iloc[:-1]
        there = report.scores.query("method == @method and seed == 3").set_index("task")
        for metric in ("log_density", "error_rate"):
            assert there[metric].to_numpy() == pytest.approx(own[metric].to_numpy(), abs=1e-12)
    assert report.fits[PROTOTYPES, 3].strategy == vm.Prototypes()
    head = report.fits[HEAD, 3]
    assert head.strategy == vm.Implicit("delta", "query", minimizer=vm.ClosedForm())
    assert isinstance(head.model.likelihood, L.LeastSquaresClasses)


def test_the_nearest_neighbour_by_a_loop(report: vm.Report) -> None:
    tasks = clouds(4, 1)
    rows = report.scores.query("method == @NEAREST and seed == 3").set_index("task")
    for task in tasks:
        assert task.support is not None and task.query is not None
        apart = distance.cdist(task.query[0].numpy(), task.support[0].numpy())
        found = task.support[1].numpy()[apart.argmin(1)]
        error = np.mean(found != task.query[1].numpy())
        assert rows.loc[task.name, "error_rate"] == pytest.approx(error, abs=1e-12)
        assert rows.loc[task.name, "n"] == len(found)
    assert rows[["log_density", "calibration_error"]].isna().all(axis=None)
    runs = report.runs.query("method == @NEAREST")
    assert (runs["evaluations"] == 0).all() and (runs["solver"] == "none").all()
    assert np.isfinite(
        report.table.loc[NEAREST, ["error_rate_low", "error_rate_high"]].tolist()
    ).all()


def test_padding_images_and_tasks_without_support() -> None:
    images = (torch.arange(12).reshape(3, 2, 2) * 9).to(torch.uint8)
    y = torch.tensor([0, 1, 2])
    alike = vm.Task((images, y), (images + 1, y))
    short = vm.Task((images[:1], y[:1]), (images, y))
    none = vm.Task(None, (images, y))
    assert error_rates(vm.TaskSet([alike, short, none]).batch()).tolist() == pytest.approx(
        [0.0, 2 / 3, 1.0]
    )


def test_the_body_starts_where_the_strategies_do() -> None:
    model, train = initialised(model_of(), 7), clouds()
    start = model.init(torch.zeros((), dtype=torch.float64))
    for name in (PROTOTYPES, HEAD):
        own, _ = baseline(name, model, train, [])
        there = own.init(torch.zeros((), dtype=torch.float64))
        for key in model.start:
            torch.testing.assert_close(there[key], start[key], rtol=0, atol=0)


def test_the_heads_of_a_categorical_model_learn_its_body() -> None:
    train = clouds()
    for name in (PROTOTYPES, HEAD):
        own, strategy = baseline(name, model_of(learn_precision="shared"), train, [])
        assert own.prior.learn_precision is None
        assert isinstance(own.likelihood, L.Categorical if name == PROTOTYPES else L.Gaussian)
        start = vm.meta_gradient(own, train, strategy)
        assert start.grads["0.weight"].any()
        assert vm.fit(own, train, strategy, 10, adam).loss < start.value


def test_a_head_with_classes_of_its_own_keeps_them() -> None:
    """The user's least squares stay as they are, and ways that differ are told to the head."""
    own = L.LeastSquaresClasses(WAYS, temperature=0.3, learn_temperature=False)
    assert baseline(HEAD, model_of(own), clouds(), [])[0].likelihood is own
    ways = baseline(HEAD, model_of(L.Categorical(ways="ways")), clouds(), [])[0].likelihood
    assert isinstance(ways, L.LeastSquaresClasses)
    assert (ways.num_classes, ways.ways) == (WAYS, "ways")


def test_printed_saved_and_drawn(report: vm.Report, tmp_path: Path) -> None:
    line = next(line for line in str(report).splitlines() if line.startswith(NEAREST))
    assert "nan" not in line and " - " in line
    report.save(tmp_path)
    texts = [one.get_text() for one in report.plot("log_density").texts]
    assert "no such score" in texts and "no score: every run failed" not in texts
    back = report.fits[HEAD, 3]
    back.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", back.model)
    assert torch.equal(again.eta["0.weight"], back.eta["0.weight"])
    assert report.differences(PROTOTYPES).loc[NEAREST, "error_rate"] == pytest.approx(
        report.table.loc[NEAREST, "error_rate"] - report.table.loc[PROTOTYPES, "error_rate"]
    )


def test_names_of_rows_that_there_are_cannot_be_taken() -> None:
    mine = {"prototypes": vm.Prototypes()}
    with pytest.raises(ValueError, match=r"\['prototypes'\] are the names of the baselines"):
        vm.compare(mine, model_of(), clouds(), clouds(), seeds=1, **QUICK)
    found = vm.compare(mine, model_of(), clouds(), clouds(), seeds=1, baselines=False, **QUICK)
    assert list(found.table.index) == ["prototypes"]
