"""Does varmeta give the answers of lme4, and of long runs of MCMC, on real nested data?  One table, ours beside theirs.

(a) Maximum likelihood and REML with standard errors, beside lme4: dyestuff, sleepstudy, rats, radon.
(b) The posterior of eta and of every task (`hyperguide="multivariate_normal"`), beside reference posteriors: eight schools, five
    models of radon, rats, surgical, seeds, sitecounts, peregrine, pilots.
(c) radon_all: 386 counties, the exact maximum and the time to it.

The data with their references lie beside a checkout (VARMETA_SHARED names their place), not in it.

    python -m experiments.mixed_models --out results/mixed_models --size full
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import varmeta as vm
from varmeta.hyper.posterior import IntegratedPosterior
from varmeta.hyper.result import natural

SHARED = Path(os.environ.get("VARMETA_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
INTERCEPT = "intercept"


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(SHARED / name / "data.csv")


def reference(name: str, file: str) -> dict[str, Any]:
    return json.loads((SHARED / name / file).read_text())


def regression(
    columns: Sequence[str], likelihood: Any, prior: vm.GaussianPrior, shared: Sequence[str] = ()
) -> vm.TaskModel:
    return vm.TaskModel(vm.LinearPredictor(columns), likelihood, prior, shared=shared)


def radon(x: list[str]) -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("radon_mn"), task="county", x=x, y="log_radon")


def rats() -> vm.TaskSet:
    frame = table("rats").assign(day=lambda d: d.day - 22.0)
    return vm.TaskSet.from_frame(frame, task="rat", x=["day"], y="weight")


def sleepstudy() -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("sleepstudy"), task="Subject", x=["Days"], y="Reaction")


def dyestuff() -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("dyestuff"), task="Batch", x=[], y="Yield")


# -- (a) lme4 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classical:
    """A fit of lme4: `fit` in the set's reference.json; columns in lme4's order, those in `shared` without a random effect."""

    data: str
    fit: str
    tasks: Callable[[], vm.TaskSet]
    columns: tuple[str, ...]
    learn: str
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
        assert fit.log_likelihood is not None and fit.standard_errors is not None and fit.prior.scale is not None
        ours = {"log likelihood": fit.log_likelihood, "noise scale": float(fit.prior.scale)}
        expected = {"log likelihood": theirs["logLik"], "noise scale": theirs["sigma"]}
        found = fit.prior.loc | fit.prior.shared
        errors = fit.standard_errors
        for k, name in enumerate((INTERCEPT, *self.columns)):
            ours |= {name: float(found[name]), f"se({name})": float(errors[name])}
            expected |= {name: theirs["fixed"]["estimate"][k], f"se({name})": theirs["fixed"]["std_error"][k]}
        random = [row for row in theirs["random"] if row["group"] != "Residual"]
        varying = [name for name in (INTERCEPT, *self.columns) if name not in self.shared]
        for name, row in zip(varying, [row for row in random if row["var2"] is None], strict=True):
            ours[f"sd({name})"], expected[f"sd({name})"] = float(fit.prior.sd[name]), row["sd_or_corr"]
        for row in (row for row in random if row["var2"] is not None):
            ours["cor"], expected["cor"] = float(fit.prior.correlation[0, 1]), row["sd_or_corr"]
        return [
            {
                "part": "lme4", "data": self.data, "model": self.fit, "quantity": name, "varmeta": ours[name],
                "reference": expected[name], "error": abs(ours[name] - expected[name]) / abs(expected[name]),
                "seconds": seconds,
            }
            for name in ours
        ]  # fmt: skip


CLASSICAL = (
    Classical("dyestuff", "ML", dyestuff, (), "shared"),
    Classical("dyestuff", "REML", dyestuff, (), "shared"),
    Classical("sleepstudy", "ML", sleepstudy, ("Days",), "full"),
    Classical("sleepstudy", "REML", sleepstudy, ("Days",), "full"),
    Classical("sleepstudy", "uncorrelated_REML", sleepstudy, ("Days",), "per_parameter"),
    Classical("rats", "ML", rats, ("day",), "full"),
    Classical("rats", "REML_indep", rats, ("day",), "per_parameter"),
    Classical("radon_mn", "intercept_ML", lambda: radon(["floor"]), ("floor",), "shared", ("floor",)),
    Classical("radon_mn", "intercept_REML", lambda: radon(["floor"]), ("floor",), "shared", ("floor",)),
    Classical(
        "radon_mn", "uranium_REML", lambda: radon(["floor", "log_uppm"]), ("floor", "log_uppm"), "shared", ("floor", "log_uppm"),
    ),
    Classical("radon_mn", "intercept_slope_ML", lambda: radon(["floor"]), ("floor",), "full"),
    Classical("radon_mn", "intercept_slope_REML", lambda: radon(["floor"]), ("floor",), "full"),
)  # fmt: skip

# -- (b) reference posteriors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bayesian:
    """A reference posterior: `names` of ours by theirs for what all tasks share, `effects` of a task's weights."""

    data: str
    file: str
    tasks: Callable[[], vm.TaskSet]
    model: Callable[[], vm.TaskModel]
    names: Mapping[str, str]
    effects: Mapping[str, str] = field(default_factory=dict)
    # the same less theta0, which needs draws of both together
    deviations: Mapping[str, str] = field(default_factory=dict)
    # what is to be compared and is no coefficient: from natural draws, by their name
    derived: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda draws: {}

    def fit(self, seed: int = 0) -> vm.Fit:
        return vm.fit(self.model(), self.tasks(), hyperguide="multivariate_normal", seed=seed, progress=False)

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        theirs = reference(self.data, f"posterior_{self.file}.json")["params"]
        begin = perf_counter()
        fit = self.fit(seed)
        assert fit.hyper is not None
        draws, weight = natural(fit.model, fit.hyper.points, fit.tasks.x_names), fit.hyper.log_weights.exp()
        compared = {their: draws[our] for our, their in self.names.items()} | self.derived(draws)
        moments = {}
        for name, value in compared.items():
            mean = (weight * value).sum()
            moments[name] = (float(mean), float((weight * (value - mean).square()).sum().sqrt()))
        frame = fit.posterior().frame()
        for our, their in self.effects.items():
            for position, name in enumerate(frame.index):
                number = int(name) if name.isdigit() else position + 1
                row = frame.loc[name]
                moments[f"{their}[{number}]"] = (float(row["mean"][our]), float(row["sd"][our]))
        for our, their in self.deviations.items():
            posterior = fit.posterior()
            assert isinstance(posterior, IntegratedPosterior)
            away = posterior.sample(4000, seed)[our] - posterior.eta_draws(4000)[our][:, None]
            for number in range(len(posterior.names)):
                moments[f"{their}[{number + 1}]"] = (float(away[:, number].mean()), float(away[:, number].std()))
        seconds = perf_counter() - begin
        return [
            {
                "part": "posterior", "data": self.data, "model": self.file, "quantity": name, "varmeta": mean,
                "reference": theirs[name]["mean"], "error": abs(mean - theirs[name]["mean"]) / theirs[name]["sd"],
                "sd_ratio": sd / theirs[name]["sd"], "k_hat": fit.hyper.pareto_k, "ess": fit.hyper.ess, "seconds": seconds,
            }
            for name, (mean, sd) in moments.items()
        ]  # fmt: skip


def _radon(file: str, x: list[str], shared: list[str], names: dict[str, str], effects: dict[str, str]) -> Bayesian:
    def model() -> vm.TaskModel:
        prior = vm.GaussianPrior(
            learn_precision="per_parameter", scale_hyperprior=dist.HalfNormal(1.0),
            loc_hyperprior=dict.fromkeys([INTERCEPT, *x], dist.Normal(0.0, 10.0)),
        )  # fmt: skip
        return regression(x, vm.likelihoods.Gaussian(scale_hyperprior=dist.HalfNormal(1.0)), prior, shared)

    return Bayesian("radon_mn", file, lambda: radon(x), model, names | {"noise scale": "sigma_y"}, effects)


def _known_sd(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["effect"], x), obs=y)


def _eight_schools() -> vm.TaskModel:
    prior = vm.GaussianPrior(
        learn_precision="shared", loc_hyperprior=dist.Normal(0.0, 5.0), scale_hyperprior=dist.HalfCauchy(5.0)
    )
    return vm.TaskModel.from_pyro(_known_sd, {"effect": ()}, prior)


def _seeds() -> vm.TaskSet:
    frame = table("seeds").assign(x12=lambda d: d.x1 * d.x2)
    return vm.TaskSet.from_frame(frame, task="plate", x=["x1", "x2", "x12"], y=["n", "N"])


def _peregrine() -> vm.TaskSet:
    frame = table("peregrine")
    frame = frame.assign(row=range(1, len(frame) + 1), year2=frame.year**2, year3=frame.year**3)
    return vm.TaskSet.from_frame(frame, task="row", x=["year", "year2", "year3"], y="count")


def _binomial(columns: Sequence[str]) -> vm.TaskModel:
    """sigma^-2 ~ Gamma(0.001, 0.001), BUGS's old favourite; flat coefficients but for N(0, 1000)."""
    prior = vm.GaussianPrior(
        learn_precision="shared", hyperprior=dist.Gamma(0.001, 0.001),
        loc_hyperprior=dict.fromkeys([INTERCEPT, *columns], dist.Normal(0.0, 1000.0)),
    )  # fmt: skip
    return regression(columns, vm.likelihoods.Binomial(), prior, columns)


def _poisson(columns: Sequence[str], loc: dict[str, Any]) -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision="shared", scale_hyperprior=dist.Uniform(0.0, 5.0), loc_hyperprior=loc)
    return regression(columns, vm.likelihoods.Poisson(), prior, columns)


def _pilots(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    """Crossed effects: the second grouping's are shared parameters, standardised, with a scale of their own."""
    own = 10.0 * params["mu_a"] + params["log_sigma_a"].exp() * params["z"]
    mean = params["b"] + (x * own).sum(-1)
    return pyro.sample("y", dist.Normal(mean, params["log_sigma_y"].exp()), obs=y)


def _log_uniform_scale(high: float) -> Any:
    """Of log sd, where sd is uniform below `high`."""
    return dist.TransformedDistribution(dist.Uniform(0.0, high), [dist.transforms.ExpTransform().inv])


def _pilots_model() -> vm.TaskModel:
    prior = vm.GaussianPrior(
        learn_precision="shared", scale_hyperprior=dist.Uniform(0.0, 100.0),
        loc_hyperprior={
            "b": dist.Normal(0.0, 10.0), "z": dist.Normal(0.0, 1.0), "mu_a": dist.Normal(0.0, 1.0),
            "log_sigma_a": _log_uniform_scale(100.0), "log_sigma_y": _log_uniform_scale(100.0),
        },
    )  # fmt: skip
    params: dict[str, Any] = {
        "b": (), "z": (5,), "mu_a": (), "log_sigma_a": torch.tensor(-1.0), "log_sigma_y": torch.tensor(-1.0)
    }  # fmt: skip
    return vm.TaskModel.from_pyro(_pilots, params, prior, shared=["z", "mu_a", "log_sigma_a", "log_sigma_y"])


def _pilots_tasks() -> vm.TaskSet:
    frame = table("pilots")
    columns = [f"g{k}" for k in range(1, 6)]
    for k, name in enumerate(columns, 1):
        frame[name] = (frame.group == k).astype(float)
    return vm.TaskSet.from_frame(frame, task="scenario", x=columns, y="success_rate")


def _pilots_effects(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    sigma = draws["log_sigma_a"].exp()
    effects = {f"a[{k + 1}]": 10.0 * draws["mu_a"] + sigma * draws[f"z[{k}]"] for k in range(5)}
    return effects | {"sigma_a": sigma, "sigma_y": draws["log_sigma_y"].exp(), "mu_b": draws["b"] / 10.0}


def _flat(low: float) -> Any:
    return dist.Uniform(-low, low)


BAYESIAN = (
    Bayesian(
        "eight_schools", "eight_schools",
        lambda: vm.TaskSet.from_frame(table("eight_schools"), task="school", x="std_err", y="effect").to(dtype=torch.float64),
        _eight_schools, {"effect": "mu", "sd(effect)": "tau"}, {"effect": "theta"},
    ),
    _radon("partially_pooled", [], [], {INTERCEPT: "mu_alpha", "sd(intercept)": "sigma_alpha"}, {INTERCEPT: "alpha"}),
    _radon(
        "variable_intercept", ["floor"], ["floor"],
        {INTERCEPT: "mu_alpha", "floor": "beta", "sd(intercept)": "sigma_alpha"}, {INTERCEPT: "alpha"},
    ),
    _radon(
        "variable_slope", ["floor"], [INTERCEPT],
        {INTERCEPT: "alpha", "floor": "mu_beta", "sd(floor)": "sigma_beta"}, {"floor": "beta"},
    ),
    _radon(
        "variable_intercept_slope", ["floor"], [],
        {INTERCEPT: "mu_alpha", "floor": "mu_beta", "sd(intercept)": "sigma_alpha", "sd(floor)": "sigma_beta"},
        {INTERCEPT: "alpha", "floor": "beta"},
    ),
    _radon(
        "hierarchical_intercept", ["log_uppm", "floor"], ["log_uppm", "floor"],
        {INTERCEPT: "mu_alpha", "log_uppm": "beta[1]", "floor": "beta[2]", "sd(intercept)": "sigma_alpha"},
        {INTERCEPT: "alpha"},
    ),
    Bayesian(
        "rats", "rats", rats,
        lambda: regression(["day"], vm.likelihoods.Gaussian(), vm.GaussianPrior(
            learn_precision="per_parameter", loc_hyperprior=dist.Normal(0.0, 100.0))),
        {INTERCEPT: "mu_alpha", "day": "mu_beta", "sd(intercept)": "sigma_alpha", "sd(day)": "sigma_beta",
         "noise scale": "sigma_y"},
        {INTERCEPT: "alpha", "day": "beta"},
    ),
    Bayesian(
        "surgical", "surgical", lambda: vm.TaskSet.from_frame(table("surgical"), task="hospital", x=[], y=["r", "n"]),
        lambda: _binomial([]), {INTERCEPT: "mu", "sd(intercept)": "sigma"}, {INTERCEPT: "b"},
    ),
    Bayesian(
        "seeds", "seeds_tau_gamma", _seeds, lambda: _binomial(["x1", "x2", "x12"]),
        {INTERCEPT: "alpha0", "x1": "alpha1", "x2": "alpha2", "x12": "alpha12", "sd(intercept)": "sigma"},
        deviations={INTERCEPT: "b"},
    ),
    Bayesian(
        "sitecounts", "glmm_site", lambda: vm.TaskSet.from_frame(table("sitecounts"), task="site", x=[], y="count"),
        lambda: _poisson([], {INTERCEPT: dist.Normal(0.0, 10.0)}), {INTERCEPT: "mu_alpha", "sd(intercept)": "sd_alpha"},
        {INTERCEPT: "alpha"},
    ),
    Bayesian(
        "peregrine", "glmm_poisson", _peregrine,
        lambda: _poisson(
            ["year", "year2", "year3"],
            {INTERCEPT: _flat(20.0)} | dict.fromkeys(["year", "year2", "year3"], _flat(10.0)),
        ),
        {INTERCEPT: "alpha", "year": "beta1", "year2": "beta2", "year3": "beta3", "sd(intercept)": "sigma"},
    ),
    Bayesian(
        "pilots", "pilots", _pilots_tasks, _pilots_model, {"sd(b)": "sigma_b", "mu_a": "mu_a"}, {"b": "b"},
        derived=_pilots_effects,
    ),
)  # fmt: skip

# -- (c) many tasks ------------------------------------------------------------------------------------------------------


def radon_all() -> list[dict[str, Any]]:
    """The fit of lme4's `floor + (floor | county)` to 386 counties of 1 to 765 rows."""
    theirs = reference("radon_all", "reference.json")["fits"]["intercept_slope_ML"]
    frame = table("radon_all")
    tasks = vm.TaskSet.from_frame(frame[frame.floor < 2], task="county", x=["floor"], y="log_radon")
    model = regression(["floor"], vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full"))
    begin = perf_counter()
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), progress=False)
    seconds = perf_counter() - begin
    assert fit.prior.scale is not None
    sds = [row["sd_or_corr"] for row in theirs["random"]]
    ours = {
        "log likelihood": -fit.loss, INTERCEPT: float(fit.prior.loc[INTERCEPT]), "floor": float(fit.prior.loc["floor"]),
        "sd(intercept)": float(fit.prior.sd[INTERCEPT]), "sd(floor)": float(fit.prior.sd["floor"]),
        "cor": float(fit.prior.correlation[0, 1]), "noise scale": float(fit.prior.scale),
    }  # fmt: skip
    expected = [theirs["logLik"], *theirs["fixed"]["estimate"], *sds]
    return [
        {
            "part": "many tasks", "data": "radon_all", "model": "intercept_slope_ML", "quantity": name, "varmeta": value,
            "reference": other, "error": abs(value - other) / abs(other), "seconds": seconds,
        }
        for (name, value), other in zip(ours.items(), expected, strict=True)
    ]  # fmt: skip


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per fit: the worst of its quantities."""
    parts = []
    for (part, data, model), group in rows.groupby(["part", "data", "model"], sort=False):
        parts.append(
            {
                "part": part, "data": data, "model": model, "quantities": len(group), "worst_error": group.error.max(),
                "sd_ratio_low": group.sd_ratio.min(), "sd_ratio_high": group.sd_ratio.max(), "k_hat": group.k_hat.max(),
                "ess": group.ess.min(), "seconds": group.seconds.max(),
            }
        )  # fmt: skip
    return pd.DataFrame(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/mixed_models"))
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not SHARED.is_dir():
        sys.exit(f"no reference data at {SHARED}: name their folder by VARMETA_SHARED")
    options.out.mkdir(parents=True, exist_ok=True)
    small = options.size == "smoke"
    rows: list[dict[str, Any]] = []
    jobs: list[Callable[[], list[dict[str, Any]]]] = [case.rows for case in (CLASSICAL[:2] if small else CLASSICAL)]
    jobs += [lambda case=case: case.rows(options.seed) for case in (BAYESIAN[:1] if small else BAYESIAN)]  # type: ignore[misc]
    jobs += [] if small else [radon_all]
    for job in jobs:
        rows += job()
        pd.DataFrame(rows).reindex(columns=COLUMNS).to_csv(options.out / "quantities.csv", index=False)
        print(
            summary(pd.DataFrame(rows).reindex(columns=COLUMNS)).iloc[[-1]].to_string(header=len(rows) < 10), flush=True
        )
    table = summary(pd.DataFrame(rows).reindex(columns=COLUMNS))
    table.to_csv(options.out / "summary.csv", index=False)
    print("\nerror: relative beside lme4, in reference sds beside posteriors\n" + table.round(5).to_string(index=False))


COLUMNS = ["part", "data", "model", "quantity", "varmeta", "reference", "error", "sd_ratio", "k_hat", "ess", "seconds"]

if __name__ == "__main__":
    main()
