"""REML in closed form: against guides that move, lme4, and closed forms."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch

import varmeta as vm
from tests.conftest import shared_data
from tests.linear_gaussian import REGRESSIONS, intercepts
from varmeta.hyper import integrate

DENSE = vm.Joint("multivariate_normal")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of sds at 0
@pytest.mark.parametrize(
    "case", ["fixed", "shared sd", "one shared", "known noise", "theta0 held", "covariates"]
)
def test_no_guide_need_move(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = REGRESSIONS[case]()
    exact = vm.fit(model, tasks, DENSE, hyperguide="reml")
    monkeypatch.setattr(integrate, "profiled", lambda *_, **__: None)
    moved = vm.fit(model, tasks, DENSE, hyperguide="reml")
    assert "REML criterion" in exact.stop and "REML criterion" not in moved.stop
    assert exact.converged and exact.hyper is not None and moved.hyper is not None
    assert exact.loss == pytest.approx(moved.loss, abs=1e-5)
    assert exact.hyper.log_evidence == pytest.approx(moved.hyper.log_evidence, abs=1e-3)
    for name, value in exact.eta.items():
        torch.testing.assert_close(value, moved.eta[name], rtol=0.02, atol=0.02)
    torch.testing.assert_close(exact.hyper.factor, moved.hyper.factor, rtol=1e-3, atol=1e-5)
    errors, expected = exact.standard_errors, moved.standard_errors
    assert errors is not None and expected is not None
    for name, value in errors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "group", "x", "y", "fit"),
    [
        ("sleepstudy", "Subject", ["Days"], "Reaction", "REML"),
        ("hsb82", "school", ["cses"], "mAch", "REML"),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_reml_is_lme4s(data: str, group: str, x: list[str], y: str, fit: str, shift: float) -> None:
    """Wherever the predictor's origin is: of theta0 with its slope, the volume stays the same."""
    frame = pd.read_csv(shared_data(data) / "data.csv", dtype={group: str})
    theirs = json.loads((shared_data(data) / "reference.json").read_text())["fits"][fit]
    frame[x] += shift
    tasks = vm.TaskSet.from_frame(frame, task=group, x=x, y=y)
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(x).double(), vm.likelihoods.Gaussian(), prior)
    found = vm.fit(model, tasks, DENSE, hyperguide="reml")
    assert found.converged and "REML criterion" in found.stop
    assert found.log_likelihood == pytest.approx(theirs["logLik"], abs=1e-5)
    errors = found.standard_errors
    assert errors is not None
    assert float(errors[x[0]]) == pytest.approx(theirs["fixed"]["std_error"][1], rel=1e-4)


def test_reml_of_one_sample_is_the_unbiased_variance() -> None:
    """Tasks that do not differ: one mean and one variance, with n - 1 in it."""
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    y = noise - noise.mean(1, keepdim=True)  # no task differs from another
    tasks = vm.TaskSet([vm.Task((torch.zeros(5, 0).double(), own)) for own in y])
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(vm.LinearPredictor([]).double(), vm.likelihoods.Gaussian(), prior)
    with pytest.warns(RuntimeWarning, match="runs away"):
        fit = vm.fit(model, tasks, DENSE, hyperguide="reml")
    assert fit.prior.scale is not None
    variance = float(y.square().sum()) / 29
    assert float(fit.prior.scale) ** 2 == pytest.approx(variance, rel=1e-6)
    # log of the integral of the likelihood over the mean
    expected = -0.5 * (29 * math.log(2 * math.pi * variance) + math.log(30) + 29)
    assert -fit.loss == pytest.approx(expected, abs=1e-6)


def test_many_tasks() -> None:
    """5,000, of which no rows of guides are made."""
    model, tasks = intercepts(5_000)
    fit = vm.fit(model, tasks, DENSE, hyperguide="reml")
    assert float(fit.prior.sd["intercept"]) == pytest.approx(1.0, abs=0.05)
