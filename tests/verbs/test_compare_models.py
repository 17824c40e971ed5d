"""Fitted models side by side: lme4's maxima, scipy's tails, left-out tasks by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import varmeta as vm
from tests.model_fits import changed, lines, only, regression
from tests.verbs.test_exact_fits import reference, sleepstudy, table


def radon(*columns: str) -> vm.TaskSet:
    frame = table("radon_mn")
    return vm.TaskSet.from_frame(frame, task="county", x=list(columns), y="log_radon")


@pytest.fixture(scope="module")
def both() -> tuple[vm.Fit, vm.Fit]:
    """y ~ a + (1 | g), and y ~ a + (1 + a || g)."""
    tasks = only(lines(12, 6), "a")
    return regression(tasks, "per_parameter", ("a",)), regression(tasks, "per_parameter")


def test_radon_s_chain_is_lme4_s() -> None:
    """(1 | g), + floor, (floor || g), (floor | g): a coefficient, a variance and a correlation."""
    with_floor = radon("floor")
    fits = [
        regression(radon()),
        regression(with_floor, shared=("floor",)),
        regression(with_floor, "per_parameter"),
        regression(with_floor),
    ]
    kinds = ["partially_pooled", "intercept", "intercept_slope_indep", "intercept_slope"]
    stored = np.array([reference("radon_mn", f"{kind}_ML")["logLik"] for kind in kinds])
    found = vm.compare_models(*reversed(fits), names=kinds[::-1], leave_one_task_out=False)
    frame = found.frame()
    assert list(frame.index) == kinds and (frame["criterion"] == "ML").all()
    np.testing.assert_allclose(frame["log_likelihood"], stored, atol=1e-5)
    assert frame[["fixed", "covariance", "noise"]].to_numpy().tolist() == [
        [1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 3, 1]
    ]  # fmt: skip
    count = np.array([3, 4, 5, 6])
    np.testing.assert_allclose(frame["AIC"], 2 * count - 2 * stored, atol=2e-5)
    np.testing.assert_allclose(frame["BIC"], math.log(919) * count - 2 * stored, atol=2e-5)
    ratio = 2 * np.diff(stored)
    np.testing.assert_allclose(frame["chi2"][1:], ratio, atol=2e-5)
    assert frame["against"].tolist() == ["", *kinds[:3]] and frame["df"][1:].tolist() == [1, 1, 1]
    tails = stats.chi2.sf(ratio, 1) * [1, 0.5, 1]  # the variance of floor is 0 in the second model
    np.testing.assert_allclose(frame["p"][1:], tails, rtol=1e-4)
    assert [note for note in found.notes if "floor is 0" in note and "half" in note]


def test_sleepstudy_s_slope_and_correlation_are_lme4_s() -> None:
    fits = [regression(sleepstudy(), learn) for learn in ("per_parameter", "full")]
    stored = [reference("sleepstudy", fit)["logLik"] for fit in ("uncorrelated_ML", "ML")]
    frame = vm.compare_models(*fits, leave_one_task_out=False).frame()
    chi2 = 2 * (stored[1] - stored[0])
    assert frame["chi2"].iloc[1] == pytest.approx(chi2, abs=1e-5)
    assert frame["p"].iloc[1] == pytest.approx(stats.chi2.sf(chi2, 1), abs=1e-4)
    # a slope that varies, with its correlation: half chi-squared on 1, half on 2 degrees of freedom
    one_slope = regression(sleepstudy(), shared=("Days",))
    frame = vm.compare_models(one_slope, fits[1], leave_one_task_out=False).frame()
    # lme4's own, which a second program of mixed models has too: 42.139 on 2
    assert frame["chi2"].iloc[1] == pytest.approx(42.139, abs=1e-3) and frame["df"].iloc[1] == 2
    chi2 = frame["chi2"].iloc[1]
    half = 0.5 * (stats.chi2.sf(chi2, 1) + stats.chi2.sf(chi2, 2))
    assert frame["p"].iloc[1] == pytest.approx(half, rel=1e-9)


def test_reml_of_the_same_fixed_effects_is_lme4_s_and_untested() -> None:
    tasks = radon("floor")
    fits = [regression(tasks, shared=shared, hyperguide="reml") for shared in (("floor",), ())]
    found = vm.compare_models(*fits)
    frame = found.frame()
    kinds = ("intercept_REML", "intercept_slope_REML")
    stored = np.array([reference("radon_mn", kind)["logLik"] for kind in kinds])
    np.testing.assert_allclose(frame["log_likelihood"], stored, atol=1e-4)
    np.testing.assert_allclose(frame["AIC"], [8 - 2 * stored[0], 12 - 2 * stored[1]], atol=2e-4)
    assert frame[["BIC", "p", "left_out"]].isna().all(axis=None)
    assert sum("REML" in line or "reml" in line for line in [found.head, *found.notes]) >= 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_left_out_tasks_are_those_of_the_fits_paired_by_task(both: tuple[vm.Fit, vm.Fit]) -> None:
    small, large = both
    tables = [fit.leave_one_task_out()["refitted"].iloc[:-1] for fit in (small, large)]
    frame = vm.compare_models(large, small, names=["large", "small"]).frame()
    np.testing.assert_allclose(
        frame.loc[["small", "large"], "left_out"], [t.sum() for t in tables], rtol=1e-9
    )
    less = tables[0] - tables[1]
    worse = "small" if less.sum() < 0 else "large"
    assert frame["difference"].max() == 0
    assert frame.loc[worse, "difference"] == pytest.approx(-abs(less.sum()), rel=1e-9)
    by_hand = math.sqrt(len(less)) * less.std(ddof=1)
    assert frame.loc[worse, "std_error"] == pytest.approx(by_hand, rel=1e-9)
    best = frame.index[frame["best"].str.contains("left out")]
    assert list(best) == [name for name in frame.index if name != worse]


def test_tasks_and_rows_may_stand_in_another_order(both: tuple[vm.Fit, vm.Fit]) -> None:
    small, large = both
    turned = changed(large.tasks, lambda x, y: (x.flip(0), y.flip(0)))[::-1]
    again = regression(turned, "per_parameter")
    frame = vm.compare_models(again, large).frame()
    assert frame["difference"].abs().max() < 1e-3 and frame["std_error"].max() < 1e-3
    # which row of x is which is not looked for
    found = vm.compare_models(small, again, leave_one_task_out=False)
    assert found.frame()["against"].tolist() == ["", ""]
    assert any("another order" in note and "nested=True" in note for note in found.notes)
    told = vm.compare_models(small, again, nested=True, leave_one_task_out=False)
    # nobody said which variances are 0
    assert told.frame()["df"].iloc[1] == 1 and math.isnan(told.frame()["p"].iloc[1])
    assert any("at most" in note for note in told.notes)


def test_counts_by_quadrature_have_a_test_and_no_left_out_tasks_unasked() -> None:
    rng = np.random.default_rng(1)
    tasks = []
    for i in range(12):
        x = rng.normal(size=(6, 1))
        rate = np.exp(0.5 + 0.4 * x[:, 0] + 0.5 * rng.normal())
        tasks.append(vm.Task((x, rng.poisson(rate)), name=str(i)))
    every = vm.TaskSet(tasks, x_names=["a"])
    quadrature = vm.Implicit("quadrature")
    fits = [
        regression(some, "shared", shared, vm.likelihoods.Poisson(), quadrature)
        for some, shared in ((only(every), ()), (every, ("a",)))
    ]
    found = vm.compare_models(*fits)
    frame = found.frame()
    assert (frame["by"] == "quadrature").all() and frame["noise"].tolist() == [0, 0]
    evidence = [float(fit.posterior().evidence()["evidence"].iloc[-1]) for fit in fits]
    np.testing.assert_allclose(frame["log_likelihood"], evidence, atol=0.1)
    assert frame["p"].iloc[1] == pytest.approx(stats.chi2.sf(frame["chi2"].iloc[1], 1), rel=1e-9)
    assert frame["left_out"].isna().all()
    assert any("leave_one_task_out=True" in note for note in found.notes)


def test_without_refits_it_is_what_eta_integrated_out_gives(
    both: tuple[vm.Fit, vm.Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a refit has no maximum; and a reading that is bad is told."""
    names = [*both[0].tasks.names, "all"]
    found = pd.DataFrame({"left_out": -2.0, "refitted": -1.0, "reading": "good"}, index=names)
    tables = dict(zip(map(id, both), (found, found.copy()), strict=True))
    tables[id(both[1])].iloc[0] = [-2.5, math.nan, "unreliable"]
    monkeypatch.setattr(vm.Fit, "leave_one_task_out", lambda fit: tables[id(fit)])
    compared = vm.compare_models(*both, names=["one", "two"])
    frame = compared.frame()
    assert frame["left_out"].tolist() == [-24.0, -24.5]
    assert frame["difference"].tolist() == [0.0, -0.5]
    assert frame["std_error"].iloc[1] == pytest.approx(
        math.sqrt(12) * np.std([0.5] + 11 * [0.0], ddof=1)
    )
    assert any("1 task of two is unreliable" in note for note in compared.notes)
    tables[id(both[1])].iloc[0, 0] = math.nan
    compared = vm.compare_models(*both, names=["one", "two"])
    assert compared.frame()["left_out"].isna().tolist() == [False, True]
    assert any("of two: its evidence has no maximum" in note for note in compared.notes)


def test_it_shows_itself(both: tuple[vm.Fit, vm.Fit]) -> None:
    found = vm.compare_models(*both, names=["one <slope>", "slopes"], leave_one_task_out=False)
    text = str(found)
    assert text.startswith("2 models of 72 rows in 12 tasks: maximum likelihood by closed form")
    assert "likelihood ratio" in text and len(text.splitlines()) == 8
    assert len(repr(found)) < 80
    html = found._repr_html_()
    assert "<table" in html and "<pre>2 models" in html and "one <slope>" not in html
    frame = found.frame()
    frame["AIC"] = 0.0
    assert not found.frame()["AIC"].equals(frame["AIC"])
