"""The posterior of eta and of every task (`hyperguide="multivariate_normal"`), beside reference
posteriors.

Eight schools, five models of radon, rats, surgical, seeds with effects as they are and centred,
sitecounts, peregrine, pilots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import varmeta as vm
from experiments.mixed_models.sets import INTERCEPT, radon, rats, reference, regression, table
from varmeta.models.hyper_posterior import natural


@dataclass(frozen=True)
class Bayesian:
    """A reference posterior: `names` of ours by theirs for what all tasks share, `effects` of a
    task's weights.
    """

    data: str
    file: str
    tasks: Callable[[], vm.TaskSet]
    model: Callable[[], vm.TaskModel]
    names: Mapping[str, str]
    effects: Mapping[str, str] = field(default_factory=dict)
    # the same less theta0, which needs draws of both together
    deviations: Mapping[str, str] = field(default_factory=dict)
    # a weight's mean over the tasks, and what it is called less that: (mean, effect)
    centred: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # what is to be compared and is no coefficient: from natural draws, by their name
    derived: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda draws: {}

    def fit(self, seed: int = 0) -> vm.Fit:
        return vm.fit(
            self.model(), self.tasks(), hyperguide="multivariate_normal", seed=seed, progress=False
        )

    def rows(self, seed: int = 0) -> list[dict[str, Any]]:
        theirs = reference(self.data, f"posterior_{self.file}.json")["params"]
        begin = perf_counter()
        fit = self.fit(seed)
        assert fit.hyper is not None
        draws, weight = (
            natural(fit.model, fit.hyper.points, fit.tasks.x_names),
            fit.hyper.log_weights.exp(),
        )
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
        posterior = fit.posterior()
        effects = {
            their: posterior.sample(4000, seed)[our] - posterior.q.etas(4000)[our][:, None]
            for our, their in self.deviations.items()
        }
        for our, (average, their) in self.centred.items():
            own = posterior.sample(4000, seed)[our]
            middle = own.mean(1)
            moments[average] = (float(middle.mean()), float(middle.std()))
            effects[their] = own - middle[:, None]
        for their, away in effects.items():
            for number in range(len(posterior.names)):
                moments[f"{their}[{number + 1}]"] = (
                    float(away[:, number].mean()),
                    float(away[:, number].std()),
                )
        seconds = perf_counter() - begin
        return [
            {
                "part": "posterior",
                "data": self.data,
                "model": self.file,
                "quantity": name,
                "varmeta": mean,
                "reference": theirs[name]["mean"],
                "error": abs(mean - theirs[name]["mean"]) / theirs[name]["sd"],
                "sd_ratio": sd / theirs[name]["sd"],
                "k_hat": fit.hyper.pareto_k,
                "ess": fit.hyper.ess,
                "seconds": seconds,
            }
            for name, (mean, sd) in moments.items()
        ]


def _radon(
    file: str, x: list[str], shared: list[str], names: dict[str, str], effects: dict[str, str]
) -> Bayesian:
    def model() -> vm.TaskModel:
        prior = vm.GaussianPrior(
            learn_precision="per_parameter", scale_hyperprior=dist.HalfNormal(1.0),
            loc_hyperprior=dict.fromkeys([INTERCEPT, *x], dist.Normal(0.0, 10.0)),
        )  # fmt: skip
        return regression(
            x, vm.likelihoods.Gaussian(scale_hyperprior=dist.HalfNormal(1.0)), prior, shared
        )

    return Bayesian(
        "radon_mn", file, lambda: radon(x), model, names | {"noise scale": "sigma_y"}, effects
    )


def _known_sd(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["effect"], x), obs=y)


def _eight_schools() -> vm.TaskModel:
    prior = vm.GaussianPrior(
        learn_precision="shared",
        loc_hyperprior=dist.Normal(0.0, 5.0),
        scale_hyperprior=dist.HalfCauchy(5.0),
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
    """sigma^-2 ~ Gamma(0.001, 0.001), BUGS's old favourite; flat coefficients but for N(0,
    1000).
    """
    prior = vm.GaussianPrior(
        learn_precision="shared", hyperprior=dist.Gamma(0.001, 0.001),
        loc_hyperprior=dict.fromkeys([INTERCEPT, *columns], dist.Normal(0.0, 1000.0)),
    )  # fmt: skip
    return regression(columns, vm.likelihoods.Binomial(), prior, columns)


def _seeds_centred() -> vm.TaskModel:
    """Effects b = c - mean(c) with alpha0 ~ N(0, 1) beside them couple the plates beyond eta; but
    c's mean is independent of b.

    So ours, alpha_i = theta0 + c_i with theta0 ~ N(0, 1), is theirs with the mean of the alpha_i as
    alpha0: its prior variance is 1 + sigma^2 / 21 instead of 1, less than 1 % more where sigma has
    its mass.
    """
    names = [INTERCEPT, "x1", "x2", "x12"]
    prior = vm.GaussianPrior(
        learn_precision="shared", scale_hyperprior=dist.HalfCauchy(1.0),
        loc_hyperprior=dict.fromkeys(names, dist.Normal(0.0, 1.0)),
    )  # fmt: skip
    return regression(names[1:], vm.likelihoods.Binomial(), prior, names[1:])


def _poisson(columns: Sequence[str], loc: dict[str, Any]) -> vm.TaskModel:
    prior = vm.GaussianPrior(
        learn_precision="shared", scale_hyperprior=dist.Uniform(0.0, 5.0), loc_hyperprior=loc
    )
    return regression(columns, vm.likelihoods.Poisson(), prior, columns)


def _pilots(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    """Crossed effects: the second grouping's are shared parameters, standardised, with a scale of
    their own.
    """
    own = 10.0 * params["mu_a"] + params["log_sigma_a"].exp() * params["z"]
    mean = params["b"] + (x * own).sum(-1)
    return pyro.sample("y", dist.Normal(mean, params["log_sigma_y"].exp()), obs=y)


def _log_uniform_scale(high: float) -> Any:
    """Of log sd, where sd is uniform below `high`."""
    return dist.TransformedDistribution(
        dist.Uniform(0.0, high), [dist.transforms.ExpTransform().inv]
    )


def _pilots_model() -> vm.TaskModel:
    prior = vm.GaussianPrior(
        learn_precision="shared", scale_hyperprior=dist.Uniform(0.0, 100.0),
        loc_hyperprior={
            "b": dist.Normal(0.0, 10.0), "z": dist.Normal(0.0, 1.0), "mu_a": dist.Normal(0.0, 1.0),
            "log_sigma_a": _log_uniform_scale(100.0), "log_sigma_y": _log_uniform_scale(100.0),
        },
    )  # fmt: skip
    params: dict[str, Any] = {
        "b": (),
        "z": (5,),
        "mu_a": (),
        "log_sigma_a": torch.tensor(-1.0),
        "log_sigma_y": torch.tensor(-1.0),
    }
    return vm.TaskModel.from_pyro(
        _pilots, params, prior, shared=["z", "mu_a", "log_sigma_a", "log_sigma_y"]
    )


def _pilots_tasks() -> vm.TaskSet:
    frame = table("pilots")
    columns = [f"g{k}" for k in range(1, 6)]
    for k, name in enumerate(columns, 1):
        frame[name] = (frame.group == k).astype(float)
    return vm.TaskSet.from_frame(frame, task="scenario", x=columns, y="success_rate")


def _pilots_effects(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    sigma = draws["log_sigma_a"].exp()
    effects = {f"a[{k + 1}]": 10.0 * draws["mu_a"] + sigma * draws[f"z[{k}]"] for k in range(5)}
    return effects | {
        "sigma_a": sigma,
        "sigma_y": draws["log_sigma_y"].exp(),
        "mu_b": draws["b"] / 10.0,
    }


def _flat(low: float) -> Any:
    return dist.Uniform(-low, low)


BAYESIAN = (
    Bayesian(
        "eight_schools",
        "eight_schools",
        lambda: vm.TaskSet.from_frame(
            table("eight_schools"), task="school", x="std_err", y="effect"
        ).to(dtype=torch.float64),
        _eight_schools,
        {"effect": "mu", "sd(effect)": "tau"},
        {"effect": "theta"},
    ),
    _radon(
        "partially_pooled",
        [],
        [],
        {INTERCEPT: "mu_alpha", "sd(intercept)": "sigma_alpha"},
        {INTERCEPT: "alpha"},
    ),
    _radon(
        "variable_intercept",
        ["floor"],
        ["floor"],
        {INTERCEPT: "mu_alpha", "floor": "beta", "sd(intercept)": "sigma_alpha"},
        {INTERCEPT: "alpha"},
    ),
    _radon(
        "variable_slope",
        ["floor"],
        [INTERCEPT],
        {INTERCEPT: "alpha", "floor": "mu_beta", "sd(floor)": "sigma_beta"},
        {"floor": "beta"},
    ),
    _radon(
        "variable_intercept_slope",
        ["floor"],
        [],
        {
            INTERCEPT: "mu_alpha",
            "floor": "mu_beta",
            "sd(intercept)": "sigma_alpha",
            "sd(floor)": "sigma_beta",
        },
        {INTERCEPT: "alpha", "floor": "beta"},
    ),
    _radon(
        "hierarchical_intercept",
        ["log_uppm", "floor"],
        ["log_uppm", "floor"],
        {
            INTERCEPT: "mu_alpha",
            "log_uppm": "beta[1]",
            "floor": "beta[2]",
            "sd(intercept)": "sigma_alpha",
        },
        {INTERCEPT: "alpha"},
    ),
    Bayesian(
        "rats",
        "rats",
        rats,
        lambda: regression(
            ["day"],
            vm.likelihoods.Gaussian(),
            vm.GaussianPrior(
                learn_precision="per_parameter", loc_hyperprior=dist.Normal(0.0, 100.0)
            ),
        ),
        {
            INTERCEPT: "mu_alpha",
            "day": "mu_beta",
            "sd(intercept)": "sigma_alpha",
            "sd(day)": "sigma_beta",
            "noise scale": "sigma_y",
        },
        {INTERCEPT: "alpha", "day": "beta"},
    ),
    Bayesian(
        "surgical",
        "surgical",
        lambda: vm.TaskSet.from_frame(table("surgical"), task="hospital", x=[], y=["r", "n"]),
        lambda: _binomial([]),
        {INTERCEPT: "mu", "sd(intercept)": "sigma"},
        {INTERCEPT: "b"},
    ),
    Bayesian(
        "seeds",
        "seeds_tau_gamma",
        _seeds,
        lambda: _binomial(["x1", "x2", "x12"]),
        {
            INTERCEPT: "alpha0",
            "x1": "alpha1",
            "x2": "alpha2",
            "x12": "alpha12",
            "sd(intercept)": "sigma",
        },
        deviations={INTERCEPT: "b"},
    ),
    Bayesian(
        "seeds",
        "seeds_sigma_cauchy_centred",
        _seeds,
        _seeds_centred,
        {"x1": "alpha1", "x2": "alpha2", "x12": "alpha12", "sd(intercept)": "sigma"},
        centred={INTERCEPT: ("alpha0", "b")},
    ),
    Bayesian(
        "sitecounts",
        "glmm_site",
        lambda: vm.TaskSet.from_frame(table("sitecounts"), task="site", x=[], y="count"),
        lambda: _poisson([], {INTERCEPT: dist.Normal(0.0, 10.0)}),
        {INTERCEPT: "mu_alpha", "sd(intercept)": "sd_alpha"},
        {INTERCEPT: "alpha"},
    ),
    Bayesian(
        "peregrine",
        "glmm_poisson",
        _peregrine,
        lambda: _poisson(
            ["year", "year2", "year3"],
            {INTERCEPT: _flat(20.0)} | dict.fromkeys(["year", "year2", "year3"], _flat(10.0)),
        ),
        {
            INTERCEPT: "alpha",
            "year": "beta1",
            "year2": "beta2",
            "year3": "beta3",
            "sd(intercept)": "sigma",
        },
        deviations={INTERCEPT: "eps"},
    ),
    Bayesian(
        "pilots",
        "pilots",
        _pilots_tasks,
        _pilots_model,
        {"sd(b)": "sigma_b", "mu_a": "mu_a"},
        {"b": "b"},
        derived=_pilots_effects,
    ),
)
