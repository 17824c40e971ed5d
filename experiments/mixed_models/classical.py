"""Maximum likelihood and REML with standard errors, beside lme4: dyestuff, sleepstudy, rats, radon,
and 386 counties of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import varmeta as vm
from experiments.mixed_models.sets import (
    INTERCEPT,
    dyestuff,
    radon,
    rats,
    reference,
    regression,
    sleepstudy,
    table,
)
from varmeta.priors.check import LearnPrecision


@dataclass(frozen=True)
class Classical:
    """A fit of lme4: `fit` in the set's reference.json; columns in lme4's order, those in `shared`
    without a random effect.
    """

    data: str
    fit: str
    tasks: Callable[[], vm.TaskSet]
    columns: tuple[str, ...]
    learn: LearnPrecision
    shared: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        theirs = reference(self.data, "reference.json")["fits"][self.fit]
        prior = vm.GaussianPrior(learn_precision=self.learn)
        model = regression(self.columns, vm.likelihoods.Gaussian(), prior, self.shared)
        restricted = "REML" in self.fit
        begin = perf_counter()
        fit = vm.fit(
            model,
            self.tasks(),
            vm.Joint("multivariate_normal"),
            hyperguide="reml" if restricted else "delta",
            progress=False,
        )
        seconds = perf_counter() - begin
        assert (
            fit.log_likelihood is not None
            and fit.standard_errors is not None
            and fit.prior.scale is not None
        )
        ours = {"log likelihood": fit.log_likelihood, "noise scale": float(fit.prior.scale)}
        expected = {"log likelihood": theirs["logLik"], "noise scale": theirs["sigma"]}
        found = fit.prior.loc | fit.prior.shared
        errors = fit.standard_errors
        for k, name in enumerate((INTERCEPT, *self.columns)):
            ours |= {name: float(found[name]), f"se({name})": float(errors[name])}
            expected |= {
                name: theirs["fixed"]["estimate"][k],
                f"se({name})": theirs["fixed"]["std_error"][k],
            }
        random = [row for row in theirs["random"] if row["group"] != "Residual"]
        varying = [name for name in (INTERCEPT, *self.columns) if name not in self.shared]
        for name, row in zip(varying, [row for row in random if row["var2"] is None], strict=True):
            ours[f"sd({name})"], expected[f"sd({name})"] = (
                float(fit.prior.sd[name]),
                row["sd_or_corr"],
            )
        for row in (row for row in random if row["var2"] is not None):
            ours["cor"], expected["cor"] = float(fit.prior.correlation[0, 1]), row["sd_or_corr"]
        return [
            {
                "part": "lme4",
                "data": self.data,
                "model": self.fit,
                "quantity": name,
                "varmeta": ours[name],
                "reference": expected[name],
                "error": abs(ours[name] - expected[name]) / abs(expected[name]),
                "seconds": seconds,
            }
            for name in ours
        ]


CLASSICAL = (
    Classical("dyestuff", "ML", dyestuff, (), "shared"),
    Classical("dyestuff", "REML", dyestuff, (), "shared"),
    Classical("sleepstudy", "ML", sleepstudy, ("Days",), "full"),
    Classical("sleepstudy", "REML", sleepstudy, ("Days",), "full"),
    Classical("sleepstudy", "uncorrelated_REML", sleepstudy, ("Days",), "per_parameter"),
    Classical("rats", "ML", rats, ("day",), "full"),
    Classical("rats", "REML_indep", rats, ("day",), "per_parameter"),
    Classical(
        "radon_mn", "intercept_ML", lambda: radon(["floor"]), ("floor",), "shared", ("floor",)
    ),
    Classical(
        "radon_mn", "intercept_REML", lambda: radon(["floor"]), ("floor",), "shared", ("floor",)
    ),
    Classical(
        "radon_mn",
        "uranium_REML",
        lambda: radon(["floor", "log_uppm"]),
        ("floor", "log_uppm"),
        "shared",
        ("floor", "log_uppm"),
    ),
    Classical("radon_mn", "intercept_slope_ML", lambda: radon(["floor"]), ("floor",), "full"),
    Classical("radon_mn", "intercept_slope_REML", lambda: radon(["floor"]), ("floor",), "full"),
)


def radon_all() -> list[dict[str, Any]]:
    """The fit of lme4's `floor + (floor | county)` to 385 counties of 1 to 712 rows."""
    theirs = reference("radon_all", "reference.json")["fits"]["intercept_slope_ML"]
    frame = table("radon_all")
    tasks = vm.TaskSet.from_frame(frame[frame.floor < 2], task="county", x=["floor"], y="log_radon")
    model = regression(
        ["floor"], vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
    )
    begin = perf_counter()
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), progress=False)
    seconds = perf_counter() - begin
    assert fit.prior.scale is not None
    sds = [row["sd_or_corr"] for row in theirs["random"]]
    ours = {
        "log likelihood": -fit.loss,
        INTERCEPT: float(fit.prior.loc[INTERCEPT]),
        "floor": float(fit.prior.loc["floor"]),
        "sd(intercept)": float(fit.prior.sd[INTERCEPT]),
        "sd(floor)": float(fit.prior.sd["floor"]),
        "cor": float(fit.prior.correlation[0, 1]),
        "noise scale": float(fit.prior.scale),
    }
    expected = [theirs["logLik"], *theirs["fixed"]["estimate"], *sds]
    return [
        {
            "part": "many tasks",
            "data": "radon_all",
            "model": "intercept_slope_ML",
            "quantity": name,
            "varmeta": value,
            "reference": other,
            "error": abs(value - other) / abs(other),
            "seconds": seconds,
        }
        for (name, value), other in zip(ours.items(), expected, strict=True)
    ]
