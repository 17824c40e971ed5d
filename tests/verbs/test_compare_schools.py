"""`compare` on schools in raw units, beside `fit`, `adapt` and `score` on the same split."""

from __future__ import annotations

import pandas as pd
import pytest

import varmeta as vm
from tests.conftest import shared_data


def test_schools_score_as_fit_adapt_and_score() -> None:
    """hsb82, 140 schools known and 20 new: RMSE 11.0 and log density -4.00 where 5.85 and -3.19 are
    right.
    """
    frame = pd.read_csv(shared_data("hsb82") / "data.csv")
    schools = vm.TaskSet.from_frame(frame, task="school", x=["cses"], y="mAch")
    train, test = schools[:140], schools[140:].split(0.5)
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(("cses",)), vm.likelihoods.Gaussian(), prior)
    joint = vm.Joint("multivariate_normal")
    report = vm.compare(
        {"joint": joint}, model, train, test, seeds=1, baselines=False, compile=False
    )
    score = vm.fit(model, train, joint).adapt(test).score().drop(index="all")
    for metric in ("rmse", "log_density"):
        assert report.table.loc["joint", metric] == pytest.approx(score[metric].mean(), rel=1e-6)
    assert (
        report.table.loc["joint", "rmse"] < 6.5 and report.table.loc["joint", "log_density"] > -3.4
    )
    assert report.table.loc["joint", "settled"] and report.table.loc["joint", "solver"] == "exact"
