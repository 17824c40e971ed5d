"""Everything that a verb returns shows itself in a few lines, and in a notebook as a table."""

from __future__ import annotations

import warnings
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.display.shown import Shown

MAX_LINES, MAX_LETTERS = 36, 4000
PRIOR = vm.GaussianPrior(learn_precision="per_module")


def deep(layers: int, width: int) -> nn.Module:
    """2 + 2 `layers` tensors."""
    made: list[nn.Module] = [nn.Linear(1, width)]
    for _ in range(layers):
        made += [nn.Tanh(), nn.Linear(width, width)]
    return nn.Sequential(*made, nn.Tanh(), nn.Linear(width, 1))


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """What verbs return, of 160 tasks and of networks."""
    tasks = vm.datasets.lines(160, num_support=5, num_query=3, dtype=torch.float64)
    few = tasks[:4]
    line = vm.TaskModel(vm.LinearPredictor(["dose"]), vm.likelihoods.Gaussian(), PRIOR)
    wide = vm.TaskModel(deep(1, 40).double(), vm.likelihoods.Gaussian(), PRIOR)
    long = vm.TaskModel(deep(30, 2).double(), vm.likelihoods.Gaussian(), PRIOR)
    shared = vm.TaskModel(
        deep(30, 2).double(), vm.likelihoods.Gaussian(), PRIOR, shared=["[0-4]*", "*.weight"]
    )
    columns = [f"x{i}" for i in range(9)]
    dense = vm.TaskModel(
        vm.LinearPredictor(columns),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    nine = vm.TaskSet(
        [vm.Task((np.eye(9) + i, np.arange(9.0)), name=f"t{i}") for i in range(3)], x_names=columns
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = vm.fit(line, tasks, vm.Joint("multivariate_normal"))
        net = vm.fit(wide, tasks, vm.Joint("normal"), num_steps=1)
        rates = vm.Unrolled(inner_steps=2, minimizer=vm.GradientDescent("learned"))
        gradient = vm.meta_gradient(wide, tasks, vm.Implicit("delta", "query", inner_steps=1))
        return {
            "tasks": tasks,
            "fit": fit,
            "fit of a wide network": net,
            "fit of a long network": vm.fit(long, few, rates, num_steps=1),
            "fit of a network that shares": vm.fit(shared, few, vm.Joint("normal"), num_steps=1),
            "fit of nine columns": vm.fit(dense, nine, vm.Joint("normal"), num_steps=1),
            "fit with a posterior of eta": vm.fit(line, tasks[:30], hyperguide="normal"),
            "prior": fit.prior,
            "prior of a wide network": net.prior,
            "posterior": fit.posterior(),
            "posterior of a network": net.posterior(),
            "prediction": fit.posterior().predict([[0.0], [1.0]]),
            "expected": net.posterior().expected([[0.0], [1.0]], num_samples=5),
            "meta-gradient": gradient,
            "meta-gradient of a long network": vm.meta_gradient(long, few, vm.Unrolled()),
            "certificate": gradient.certificate,
            "reachability": vm.reachability(fit),
            "report": vm.compare(
                {"joint": vm.Joint("normal")}, line, tasks[:20], tasks[20:40], 1, budget=20
            ),
            "run": fit.run,
            "landscape": vm.Landscape.of(torch.cos),
            "validation": vm.Validation(tasks),
        }


class Reader(HTMLParser):
    """Counts what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.open = 0, 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.rows += tag == "tr"
        self.open += 1

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1


def test_texts_are_short(objects: dict[str, Any]) -> None:
    for name, made in objects.items():
        for text in (repr(made), str(made)):
            assert len(text.splitlines()) <= MAX_LINES, f"{name}:\n{text}"
            assert len(text) <= MAX_LETTERS, f"{name}:\n{text}"
        assert len(repr(made)) <= 300 or name == "validation", f"{name}: {made!r}"
        assert "object at 0x" not in repr(made)


def test_a_notebook_shows_a_table(objects: dict[str, Any]) -> None:
    for name, made in objects.items():
        if name in ("run", "landscape", "validation"):
            continue
        html = made._repr_html_()
        reader = Reader()
        reader.feed(html)
        assert reader.open == 0 and 2 <= reader.rows <= 24, f"{name}:\n{html}"
        assert len(html) <= 30_000, name
        # one mechanism for all
        assert type(made)._repr_html_ is Shown._repr_html_


def test_of_a_network_the_table_is_by_tensor(objects: dict[str, Any]) -> None:
    html = objects["fit of a wide network"]._repr_html_()
    assert "(40, 40)" in html and "2.weight[0,0]" not in html


def test_names_are_no_markup() -> None:
    table = pd.DataFrame({"g": ["<b>", "a"], "x": [1.0, 2.0], "y": [0.0, 1.0]})
    html = vm.TaskSet.from_frame(table, task="g", x="x", y="y")._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;" in html


COLUMNS = {
    "prior": ["kind", "value", "sd"],
    "prediction": ["task", "point", "mean", "sd", "low", "high"],
    "reachability": ["stored", "reached", "gap"],
    "meta-gradient": ["shape", "numbers", "norm", "largest"],
    "certificate": [
        "decrement", "decrement_bound", "inner_gradient", "linear_error", "linear_bound",
        "residual", "curvature", "inner_result", "linear_result", "ok",
    ],
}  # fmt: skip


def test_frames_have_the_columns_that_are_documented(objects: dict[str, Any]) -> None:
    for name, columns in COLUMNS.items():
        made = objects[name]
        assert list(made.frame().columns) == columns
        said = f"{type(made).__doc__} {made.frame.__doc__}"
        assert all(column in said for column in columns), name
    report = objects["report"]
    pd.testing.assert_frame_equal(report.frame(), report.table)


def test_the_numbers_of_a_frame(objects: dict[str, Any]) -> None:
    fit, gradient = objects["fit"], objects["meta-gradient"]
    frame = fit.prior.frame(fit.standard_errors)
    assert frame.loc["dose", "value"] == float(fit.prior.loc["dose"])
    assert frame.loc["dose", "sd"] == float(fit.prior.sd["dose"])
    assert frame.loc["dose", "std_error"] == float(fit.standard_errors["dose"])
    assert frame.loc["noise scale", "value"] == float(fit.prior.scale)
    assert frame.loc["noise scale", ["std_error", "sd"]].isna().all()
    table = gradient.frame()
    assert table.loc["0.weight", "norm"] == pytest.approx(float(gradient.grads["0.weight"].norm()))
    certificate = gradient.certificate
    assert certificate.frame()["ok"].tolist() == (~certificate.failed).tolist()
    assert certificate.frame().index.tolist() == list(certificate.names)


VERBS = (
    "Fit", "Posterior", "Prediction", "Report", "Certificate", "MetaGradient", "Reachability",
    "Accuracy", "LearnedPrior", "TaskSet",
)  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_what_verbs_return_is_shown(name: str) -> None:
    assert issubclass(getattr(vm, name), Shown)
