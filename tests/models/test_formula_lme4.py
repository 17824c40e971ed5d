"""Formulas on real data against what lme4 found, where the data lie beside the checkout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest

import varmeta as vm
from tests.conftest import shared_data


def categories(name: str, levels: list[str]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda frame: frame.assign(**{name: pd.Categorical(frame[name], categories=levels)})


def with_floors(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["floor"].isin([0, 1])]


@dataclass(frozen=True)
class Case:
    """A stored fit of lme4 and its formula.

    called: what lme4's fixed effects are called here, where a letter more is different.
    sd: how near sds and correlations must be, relative and absolute.  lme4 stopped early on rats
        (1.5e-6 below the maximum of log p(y)) and orthodont (2e-7 below), by ML, so that its sds
        are a little off.
    """

    data: str
    fit: str
    formula: str
    change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame
    called: tuple[tuple[str, str], ...] = ()
    sd: float = 1e-4


MALE_FIRST = categories("Sex", ["Male", "Female"])
PUBLIC_FIRST = categories("sector", ["Public", "Catholic"])
DAY, AGE = (("dc", "I(day - 22)"),), (("agec", "I(age - 11)"),)
POWERS = tuple((f"I(age^{k})", f"I(age ** {k})") for k in (2, 3, 4))
MACHINES = tuple((f"Machine{level}", f"Machine[{level}]") for level in "BC")
CASES = [
    Case("sleepstudy", "ML", "Reaction ~ Days + (Days | Subject)"),
    Case("sleepstudy", "REML", "Reaction ~ Days + (Days | Subject)"),
    Case("sleepstudy", "uncorrelated_ML", "Reaction ~ Days + (Days || Subject)"),
    Case("sleepstudy", "uncorrelated_REML", "Reaction ~ Days + (Days || Subject)"),
    Case("dyestuff", "ML", "Yield ~ 1 + (1 | Batch)"),
    Case("dyestuff", "REML", "Yield ~ (1 | Batch)"),
    Case("machines", "slopes_ML", "score ~ Machine + (0 + Machine | Worker)", called=MACHINES),
    Case("machines", "slopes_REML", "score ~ Machine + (0 + Machine | Worker)", called=MACHINES),
    Case("radon_mn", "partially_pooled_ML", "log_radon ~ (1 | county)"),
    Case("radon_mn", "intercept_ML", "log_radon ~ floor + (1 | county)"),
    Case("radon_mn", "intercept_REML", "log_radon ~ floor + (1 | county)"),
    Case("radon_mn", "uranium_REML", "log_radon ~ floor + log_uppm + (1 | county)"),
    Case("radon_mn", "intercept_slope_ML", "log_radon ~ floor + (floor | county)"),
    Case("radon_mn", "intercept_slope_REML", "log_radon ~ floor + (1 + floor | county)"),
    Case("radon_mn", "intercept_slope_indep_ML", "log_radon ~ floor + (floor || county)"),
    Case("rats", "ML", "weight ~ I(day - 22) + (I(day - 22) | rat)", called=DAY, sd=3e-4),
    Case("rats", "REML_indep", "weight ~ I(day - 22) + (I(day - 22) || rat)", called=DAY),
    Case("dietox", "ML", "Weight ~ Time + (Time | Pig)"),
    Case("dietox", "intercept_REML", "Weight ~ Time + (1 | Pig)"),
    Case(
        "orthodont", "ML", "distance ~ I(age - 11) + (I(age - 11) | Subject)", called=AGE, sd=2e-4
    ),
    Case("orthodont", "REML", "distance ~ I(age - 11) + (I(age - 11) | Subject)", called=AGE),
    Case(
        "orthodont",
        "with_sex_REML",
        "distance ~ I(age - 11) * Sex + (I(age - 11) | Subject)",
        MALE_FIRST,
        (*AGE, ("SexFemale", "Sex[Female]"), ("agec:SexFemale", "I(age - 11):Sex[Female]")),
    ),
    Case("oxboys", "linear_REML", "height ~ age + (age | Subject)"),
    Case(
        "oxboys",
        "quadratic_ML",
        "height ~ age + I(age**2) + (age + I(age**2) | Subject)",
        called=POWERS,
    ),
    Case(
        "oxboys",
        "mX1_REML",
        "height ~ age + I(age**2) + I(age**3) + I(age**4) + (age + I(age**2) | Subject)",
        called=POWERS,
    ),
    Case("hsb82", "ML", "mAch ~ cses + (cses | school)"),
    Case("hsb82", "REML", "mAch ~ cses + (cses | school)"),
    Case(
        "hsb82",
        "full_REML",
        "mAch ~ meanses * cses + sector * cses + (cses | school)",
        PUBLIC_FIRST,
        (
            ("sectorCatholic", "sector[Catholic]"),
            ("cses:sectorCatholic", "sector[Catholic]:cses"),
        ),
    ),
    Case(
        "chickweight",
        "quadratic_ML",
        "weight ~ Time + I(Time**2) + (Time | Chick)",
        called=(("I(Time^2)", "I(Time ** 2)"),),
    ),
    Case(
        "cheese",
        "ML",
        "log(volume) ~ disp + log(price) + (disp + log(price) | retailer)",
        called=(("DISP", "disp"), ("lprice", "log(price)")),
    ),
    Case("radon_all", "intercept_ML", "log_radon ~ floor + (1 | county)", with_floors),
    Case("radon_all", "intercept_slope_ML", "log_radon ~ floor + (floor | county)", with_floors),
    Case("radon_all", "uranium_ML", "log_radon ~ floor + log_uppm + (1 | county)", with_floors),
]


def fitted(case: Case, **options: Any) -> tuple[vm.FormulaModel, vm.Fit, dict[str, Any]]:
    folder = shared_data(case.data)
    expected = json.loads((folder / "reference.json").read_text())["fits"][case.fit]
    frame = pd.read_csv(folder / "data.csv", dtype={"period": str})
    tasks, model = vm.from_formula(case.formula, case.change(frame), **options)
    fit = vm.fit(model, tasks, hyperguide="reml" if "REML" in case.fit else None)
    return model, fit, expected


def fixed_effects(model: vm.FormulaModel, fit: vm.Fit) -> dict[str, float]:
    both = fit.prior.loc | fit.prior.shared
    assert isinstance(model.net, vm.LinearPredictor)
    names = model.net.parameter_names
    return {name: float(both[names.get(name, name)]) for name in model.design.fixed}


def assert_fixed_and_sds(
    case: Case, model: vm.FormulaModel, fit: vm.Fit, expected: dict[str, Any], fixed: float = 1e-4
) -> None:
    called = {"(Intercept)": "Intercept", **dict(case.called)}
    theirs = {
        called.get(name, name): value
        for name, value in zip(
            expected["fixed"]["names"], expected["fixed"]["estimate"], strict=True
        )
    }
    assert fixed_effects(model, fit) == pytest.approx(theirs, rel=fixed)
    rows = [row for row in expected["random"] if row["group"] != "Residual"]
    at = [fit.prior.labels.index(name) for name in model.design.varying]
    sds = [fit.prior.covariance[i, i].sqrt().item() for i in at]
    assert sds == pytest.approx(
        [row["sd_or_corr"] for row in rows if row["var2"] is None], rel=case.sd
    )
    correlation = [row["sd_or_corr"] for row in rows if row["var2"] is not None]
    ours = fit.prior.correlation[at][:, at]
    size = len(at) if correlation else 0
    below = [float(ours[j, i]) for i in range(size) for j in range(i + 1, size)]
    assert below == pytest.approx(correlation, abs=case.sd)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.data} {case.fit}")
def test_a_formulas_fit_is_lmers(case: Case) -> None:
    model, fit, expected = fitted(case)
    assert fit.converged and "in closed form" in fit.stop
    assert_fixed_and_sds(case, model, fit, expected)
    assert fit.prior.scale is not None
    assert float(fit.prior.scale) == pytest.approx(expected["sigma"], rel=1e-4)
    assert -fit.loss == pytest.approx(expected["logLik"], abs=1e-5)
    assert -fit.loss >= expected["logLik"] - 1e-8 * abs(expected["logLik"])  # ours is the maximum


L = vm.likelihoods
TREATMENTS = categories("trt", ["placebo", "drug", "drug+"])
PERIODS = tuple((f"period{level}", f"period[{level}]") for level in "234")
GENERALISED = [
    (
        Case("cbpp", "agq", "proportion(incidence, size) ~ period + (1 | herd)", called=PERIODS),
        L.Binomial(),
    ),
    (Case("surgical", "agq", "proportion(r, n) ~ (1 | hospital)"), L.Binomial()),
    (
        Case(
            "epil",
            "agq",
            "y ~ center(log(base / 4)) * trt + center(log(age)) + V4 + (1 | subject)",
            called=(
                ("lbase", "center(log(base / 4))"),
                ("trtprogabide", "trt[progabide]"),
                ("lage", "center(log(age))"),
                ("lbase:trtprogabide", "center(log(base / 4)):trt[progabide]"),
            ),
        ),
        L.Poisson(),
    ),
    (
        Case(
            "bacteria",
            "agq",
            "y['y'] ~ trt + {week > 2} + (1 | ID)",
            TREATMENTS,
            (
                ("trtdrug", "trt[drug]"),
                ("trtdrug+", "trt[drug+]"),
                ("I(week > 2)TRUE", "I(week > 2)"),
            ),
        ),
        L.Bernoulli(),
    ),
    (Case("sitecounts", "agq", "count ~ (1 | site)"), L.Poisson()),
]


@pytest.mark.parametrize(
    ("case", "likelihood"), GENERALISED, ids=[case.data for case, _ in GENERALISED]
)
def test_a_formulas_fit_is_glmers_by_quadrature(case: Case, likelihood: Any) -> None:
    """glmer's log likelihood by quadrature lacks a constant, so that it is not compared."""
    assert_fixed_and_sds(case, *fitted(case, likelihood=likelihood))
