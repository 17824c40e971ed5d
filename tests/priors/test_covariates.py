"""A prior moved by the tasks' features is the model that has the same features as columns: exact
identities, and lme4.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import GUIDES, OUTERS, adam, linear_model, net_model, ragged_tasks
from tests.conftest import shared_data
from tests.verbs.test_meta_gradient import Minima, directional_errors, strategies
from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import Step, eager
from varmeta.graphs import capture
from varmeta.numerics.noise import task_id

URANIUM = {"intercept": ["log_uppm"]}


def radon(x: list[str], features: list[str]) -> vm.TaskSet:
    frame = vm.datasets.radon(as_frame=True).assign(product=lambda d: d.floor * d.log_uppm)
    return vm.TaskSet.from_frame(frame, task="county", x=x, y="log_radon", features=features)


def regression(
    columns: list[str], learn: str, shared: list[str], covariates: Any = None, **more: Any
) -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision=learn, covariates=covariates, **more)
    return vm.TaskModel(
        vm.LinearPredictor(columns), vm.likelihoods.Gaussian(), prior, shared=shared
    )


@pytest.fixture(scope="module")
def moved() -> vm.Fit:
    """Radon with the county's uranium moving its intercept."""
    tasks = radon(["floor"], ["log_uppm"])
    return vm.fit(
        regression(["floor"], "shared", ["floor"], URANIUM), tasks, vm.Joint("multivariate_normal")
    )


@pytest.fixture(scope="module")
def minima() -> defaultdict[str, Minima]:
    """Of the tasks under each guide; the outer objectives share them."""
    return defaultdict(dict)


@pytest.fixture(scope="module")
def column() -> vm.Fit:
    """The same with uranium as a column of x whose coefficient all counties share."""
    model = regression(["floor", "log_uppm"], "shared", ["floor", "log_uppm"])
    return vm.fit(model, radon(["floor", "log_uppm"], []), vm.Joint("multivariate_normal"))


def with_features(tasks: vm.TaskSet, *names: str) -> vm.TaskSet:
    """The tasks with features that are functions of their names, so that no order of tasks can make
    them right.
    """
    from dataclasses import replace

    def of(task: vm.Task) -> dict[str, float]:
        return {name: float(np.sin(task_id(f"{task.name} {name}") % 1000)) for name in names}

    return vm.TaskSet([replace(task, features=of(task)) for task in tasks], x_names=tasks.x_names)


# -- identities ------------------------------------------------------------------------------------


def test_a_feature_of_the_intercept_is_a_shared_column(moved: vm.Fit, column: vm.Fit) -> None:
    assert moved.converged and column.converged
    assert moved.log_likelihood == pytest.approx(column.log_likelihood, abs=1e-8)
    pairs = {
        "intercept:log_uppm": "log_uppm",
        "intercept": "intercept",
        "floor": "floor",
        "log_scale": "log_scale",
    }
    for ours, theirs in pairs.items():
        assert float(moved.eta[ours]) == pytest.approx(float(column.eta[theirs]), abs=1e-6)
    assert float(moved.prior.coefficients["intercept:log_uppm"]) == float(
        moved.eta["intercept:log_uppm"]
    )
    assert moved.prior.sd["intercept"] == pytest.approx(
        float(column.prior.sd["intercept"]), abs=1e-6
    )
    errors, others = moved.standard_errors, column.standard_errors
    assert errors is not None and others is not None
    assert float(errors["intercept:log_uppm"]) == pytest.approx(float(others["log_uppm"]), rel=1e-6)


def test_posteriors_hold_what_the_features_add(moved: vm.Fit, column: vm.Fit) -> None:
    uranium = moved.tasks.batch().support.features["log_uppm"]
    own, other = moved.posterior(), column.posterior()
    expected = other.mean["intercept"] + column.eta["log_uppm"] * uranium
    assert torch.allclose(own.mean["intercept"], expected, atol=1e-6)
    assert torch.allclose(own.sd["intercept"], other.sd["intercept"], rtol=1e-6)
    assert torch.allclose(own.sample(4000)["intercept"].mean(0), expected, atol=0.02)
    away = own.frame(deviations=True)["mean"]["intercept"]
    assert np.allclose(away, other.frame(deviations=True)["mean"]["intercept"], atol=1e-6)
    # the evidence in importance weights is that of the same draws, so only rounding is between them
    here, there = own.evidence(), other.evidence()
    assert np.allclose(here["evidence"], there["evidence"], atol=1e-6)


@pytest.mark.parametrize("learn", ["per_parameter", "full"])
def test_a_feature_of_the_slope_is_a_shared_product(learn: str) -> None:
    model = regression(["floor"], learn, [], {"floor": ["log_uppm"], "intercept": ["log_uppm"]})
    fit = vm.fit(model, radon(["floor"], ["log_uppm"]), vm.Joint("multivariate_normal"))
    columns = ["floor", "log_uppm", "product"]
    other = vm.fit(
        regression(columns, learn, ["log_uppm", "product"]),
        radon(columns, []),
        vm.Joint("multivariate_normal"),
    )
    assert fit.loss == pytest.approx(other.loss, abs=1e-7)
    for ours, theirs in {
        "intercept:log_uppm": "log_uppm",
        "floor:log_uppm": "product",
        "floor": "floor",
    }.items():
        assert float(fit.eta[ours]) == pytest.approx(float(other.eta[theirs]), abs=2e-6)
    assert torch.allclose(fit.prior.covariance, other.prior.covariance, atol=1e-6)


def test_a_list_moves_all_weights() -> None:
    fit = vm.fit(regression(["floor"], "full", [], ["log_uppm"]), radon(["floor"], ["log_uppm"]))
    by_name = {"intercept": ["log_uppm"], "floor": ["log_uppm"]}
    assert (
        fit.loss
        == vm.fit(regression(["floor"], "full", [], by_name), radon(["floor"], ["log_uppm"])).loss
    )


@pytest.mark.parametrize("covariates", [[], {}, {"intercept": []}], ids=str)
def test_no_features_are_no_covariates(covariates: Any) -> None:
    tasks = radon(["floor"], [])
    fit, plain = (
        vm.fit(regression(["floor"], "full", [], some), tasks) for some in (covariates, None)
    )
    assert fit.loss == plain.loss
    assert all(torch.equal(fit.eta[name], value) for name, value in plain.eta.items())


def test_features_of_zero_leave_the_fit_as_it_is() -> None:
    frame = vm.datasets.radon(as_frame=True).assign(nothing=0.0)
    tasks = vm.TaskSet.from_frame(
        frame, task="county", x=["floor"], y="log_radon", features=["nothing"]
    )
    optimizer = lambda params: torch.optim.Adam(params, 1e-2)  # noqa: E731
    model = regression(["floor"], "shared", ["floor"], {"intercept": ["nothing"]})
    fit, plain = (
        vm.fit(some, tasks, vm.Joint("normal"), 20, optimizer, compile=False)
        for some in (model, regression(["floor"], "shared", ["floor"]))
    )
    assert fit.loss == plain.loss and float(fit.eta["intercept:nothing"]) == 0.0


# -- references ------------------------------------------------------------------------------------


def test_lme4s_reml(moved: vm.Fit) -> None:
    theirs = json.loads((shared_data("radon_mn") / "reference.json").read_text())["fits"][
        "uranium_REML"
    ]
    fit = vm.fit(moved.model, moved.tasks, hyperguide="reml")
    errors = fit.standard_errors
    assert errors is not None
    for k, name in enumerate(["intercept", "floor", "intercept:log_uppm"]):
        assert float(fit.eta[name]) == pytest.approx(theirs["fixed"]["estimate"][k], rel=1e-4)
        assert float(errors[name]) == pytest.approx(theirs["fixed"]["std_error"][k], rel=1e-4)
    assert float(fit.prior.sd["intercept"]) == pytest.approx(
        theirs["random"][0]["sd_or_corr"], rel=1e-4
    )
    assert float(fit.prior.scale) == pytest.approx(theirs["sigma"], rel=1e-4)  # type: ignore[arg-type]
    assert fit.log_likelihood == pytest.approx(theirs["logLik"], abs=1e-4)


def test_the_reference_posterior_of_radon() -> None:
    theirs = json.loads(
        (shared_data("radon_mn") / "posterior_hierarchical_intercept.json").read_text()
    )["params"]
    normal, half = dist.Normal(0.0, 10.0), dist.HalfNormal(1.0)
    names = {"intercept": "mu_alpha", "intercept:log_uppm": "beta[1]", "floor": "beta[2]"}
    prior = vm.GaussianPrior(
        learn_precision="shared",
        covariates=URANIUM,
        scale_hyperprior=half,
        loc_hyperprior=dict.fromkeys(names, normal),
    )
    likelihood = vm.likelihoods.Gaussian(scale_hyperprior=half)
    model = vm.TaskModel(vm.LinearPredictor(["floor"]), likelihood, prior, shared=["floor"])
    fit = vm.fit(
        model, radon(["floor"], ["log_uppm"]), hyperguide="multivariate_normal", progress=False
    )
    found = fit.hyperparameters()
    for ours, their in {**names, "sd(intercept)": "sigma_alpha", "noise scale": "sigma_y"}.items():
        expected = theirs[their]
        assert abs(found["mean"][ours] - expected["mean"]) < 0.08 * expected["sd"]
        assert found["sd"][ours] == pytest.approx(expected["sd"], rel=0.06)
    # a county's weight is alpha_j + beta_1 z_j in their words
    posterior, batch = fit.posterior(), fit.tasks.batch()
    uranium = batch.support.features["log_uppm"]
    centred = (
        posterior.draws(2000)[..., 0]
        - posterior.q.etas(2000)["intercept:log_uppm"][:, None] * uranium
    )  # type: ignore[attr-defined]
    for position, name in enumerate(fit.tasks.names[:20]):
        expected = theirs[f"alpha[{name}]"]
        assert abs(float(centred[:, position].mean()) - expected["mean"]) < 0.15 * expected["sd"]
        assert float(centred[:, position].std()) == pytest.approx(expected["sd"], rel=0.15)
    mixed = posterior.distribution
    draws = posterior.draws(4000)
    assert torch.allclose(mixed.mean[:, 0], draws.mean(0), atol=0.01)
    assert torch.allclose(mixed.stddev[:, 0], draws.std(0), rtol=0.08)


@pytest.mark.parametrize("hyperguide", ["normal", "multivariate_normal"])
def test_the_posterior_of_eta_of_counts_is_that_with_a_shared_column(hyperguide: str) -> None:
    """The same random numbers in the same coordinates, so that all but rounding agrees; a task's
    own weight holds its feature.
    """
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"site": np.repeat(np.arange(12), 3), "z": np.repeat(rng.normal(size=12), 3)}
    )
    frame["count"] = rng.poisson(
        np.exp(1.0 + 0.8 * frame.z + 0.4 * np.repeat(rng.normal(size=12), 3))
    )
    half = dist.HalfNormal(1.0)
    fits = [
        vm.fit(
            vm.TaskModel(
                vm.LinearPredictor(x).double(),
                vm.likelihoods.Poisson(),
                vm.GaussianPrior(
                    learn_precision="shared", scale_hyperprior=half, covariates=covariates
                ),
                shared=x,
            ),
            vm.TaskSet.from_frame(frame, task="site", x=x, y="count", features=features).to(
                dtype=torch.float64
            ),
            hyperguide=hyperguide,
            progress=False,
        )
        for x, features, covariates in (([], ["z"], {"intercept": ["z"]}), (["z"], [], None))
    ]
    here, there = (fit.hyperparameters() for fit in fits)
    assert list(here.index) == ["intercept", "intercept:z", "sd(intercept)"]
    assert np.allclose(here, there, atol=1e-5)
    own, other = (fit.posterior() for fit in fits)
    z = fits[0].tasks.batch().support.features["z"]
    number = len(fits[0].hyper)  # type: ignore[arg-type]  # all draws, so that resampling is no difference
    by = own.q.etas(number)["intercept:z"][:, None] * z  # type: ignore[attr-defined]
    assert torch.allclose(own.mean["intercept"], other.mean["intercept"] + by.mean(0), atol=1e-5)
    assert torch.allclose(own.draws(number)[..., 0], other.draws(number)[..., 0] + by, atol=1e-4)
    rates = own.expected(torch.zeros(1, 0)).mean
    columns = other.expected([value.reshape(1, 1) for value in z]).mean
    assert torch.allclose(rates, columns, rtol=1e-4)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("guide", GUIDES, ids=str)
@pytest.mark.parametrize("adjoint", ["implicit", "unrolled"])
def test_meta_gradients_equal_central_differences(
    adjoint: str, guide: Any, outer: str, minima: defaultdict[str, Minima]
) -> None:
    model = linear_model(
        vm.GaussianPrior(3.0, "shared", covariates={"weight": ["a"], "bias": ["a", "b"]})
    )
    tasks = with_features(ragged_tasks(3), "a", "b")
    names = list(model.coefficients)
    assert names == ["weight:a", "bias:a", "bias:b"]
    one = torch.ones((), dtype=torch.float64)
    ways = {name: {name: one.expand(model.start[name].shape)} for name in names}
    ways["theta0"] = {name: one.expand(model.start[name].shape) for name in ("weight", "bias")}
    errors = directional_errors(
        model, tasks, strategies(guide, outer)[adjoint], ways, minima[str(guide)]
    )
    assert max(errors.values()) <= 1e-6, errors


def test_joint_gradients_equal_central_differences() -> None:
    model, tasks = (
        net_model(vm.GaussianPrior(3.0, covariates=["a"])),
        with_features(ragged_tasks(3), "a"),
    )
    strategy, batch = vm.Joint("normal", expectation="cubature"), tasks.batch()
    problem, start = (
        strategy.problem(model, tasks, 0),
        model.init(torch.zeros((), dtype=torch.float64)),
    )
    state = strategy.init(problem, batch, start)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    outcome = eager(strategy, problem, batch, leaves, state)
    for key in model.coefficients:
        way = torch.ones_like(start[key])
        up, down = (
            chunks.value(strategy, problem, batch, start | {key: start[key] + step * way}, state)
            for step in (1e-5, -1e-5)
        )
        assert float((outcome.gradient[key] * way).sum()) == pytest.approx(
            (up - down) / 2e-5, rel=1e-6, abs=1e-8
        )


def test_implicit_and_unrolled_fits_find_the_joint_ones(moved: vm.Fit) -> None:
    for strategy in (vm.Implicit("multivariate_normal", "elbo"), vm.Implicit("laplace")):
        fit = vm.fit(moved.model, moved.tasks, strategy, compile=False)
        assert float(fit.eta["intercept:log_uppm"]) == pytest.approx(
            float(moved.eta["intercept:log_uppm"]), abs=1e-4
        )
        assert torch.allclose(
            fit.posterior().mean["intercept"], moved.posterior().mean["intercept"], atol=1e-3
        )
    # one MAML step from the prior serves a known feature at once
    unrolled = vm.Unrolled("delta", "query", inner_steps=1, minimizer=vm.GradientDescent(1e-6))
    prior = vm.GaussianPrior(1.0, covariates=URANIUM)
    fixed = vm.TaskModel(
        vm.LinearPredictor(["floor"]), vm.likelihoods.Gaussian(), prior, shared=["floor"]
    )
    counties = radon(["floor"], ["log_uppm"])
    tasks = counties[[len(task.support[1]) > 1 for task in counties]].split(0.5)  # type: ignore[index]
    fit = vm.fit(fixed, tasks, unrolled, compile=False)
    data = tasks.batch().require_query()
    uranium = data.features["log_uppm"][:, None].expand_as(data.y)
    x, y, z = (value[data.mask].numpy() for value in (data.x[..., 0], data.y, uranium))
    expected = np.linalg.lstsq(np.stack([np.ones(len(x)), x, z], 1), y, rcond=None)[0]
    found = [float(fit.eta[name]) for name in ("intercept", "floor", "intercept:log_uppm")]
    assert np.allclose(found, expected, atol=1e-4)


# -- the tasks' ways -------------------------------------------------------------------------------


def test_padding_and_minibatches_take_each_task_its_own_features() -> None:
    model = net_model(vm.GaussianPrior(3.0, covariates=["a", "b"]))
    tasks = with_features(ragged_tasks(5), "a", "b")
    eta = model.init(torch.zeros((), dtype=torch.float64))
    eta |= {
        name: 0.3
        + torch.arange(eta[name].numel(), dtype=torch.float64).reshape(eta[name].shape) / 7
        for name in model.coefficients
    }
    strategy = vm.Joint("normal", adapt_steps=50)
    problem, batch = strategy.problem(model, tasks, 3), tasks.batch()

    def losses(some: vm.tasks.Batch) -> Tensor:
        return problem.losses("elbo", some, 0)(problem.start(some, eta), eta)

    whole = losses(batch)
    assert torch.allclose(losses(tasks.batch([3, 1])), whole[[3, 1]], atol=1e-12)
    for index in range(len(tasks)):
        alone = tasks[[index]].batch()
        assert torch.allclose(losses(alone), whole[index : index + 1], atol=1e-12)
    # the minimum of a task does not depend on who stands beside it either
    fit = vm.fit(model, tasks, strategy, 3, adam, batch_size=2, compile=False)
    assert torch.allclose(
        fit.adapt(tasks[[2, 0]]).mean["0.weight"],
        fit.adapt(tasks).mean["0.weight"][[2, 0]],
        atol=1e-6,
    )
    assert not torch.equal(fit.eta["0.weight:a"], torch.zeros_like(fit.eta["0.weight:a"]))


def test_a_new_task_brings_its_features(moved: vm.Fit, column: vm.Fit) -> None:
    new = vm.TaskSet(
        [
            vm.Task(name="low", features={"log_uppm": -0.5}),
            vm.Task(name="high", features={"log_uppm": 0.5}),
        ]
    )
    posterior = moved.adapt(new)
    step = float(moved.eta["intercept:log_uppm"])
    theta0 = float(moved.prior.loc["intercept"])
    assert posterior.mean["intercept"].tolist() == pytest.approx(
        [theta0 - step / 2, theta0 + step / 2]
    )
    expected = posterior.expected([[0.0]], num_samples=4000).mean[:, 0]
    assert torch.allclose(expected, posterior.mean["intercept"], atol=0.01)
    some = moved.tasks[:6].split(0.5)
    asked = column.tasks[:6].split(0.5)
    here, there = moved.adapt(some).score(), column.adapt(asked).score()
    assert np.allclose(here["log_density"], there["log_density"], atol=1e-6)
    # held-out data given by hand need no features of their own
    again = moved.adapt(some).score([task.query for task in some])
    assert np.allclose(again["log_density"], here["log_density"])


def test_leaving_a_task_out(moved: vm.Fit, column: vm.Fit) -> None:
    few = slice(30, 42)
    here, there = (
        vm.fit(fit.model, fit.tasks[few], fit.strategy).leave_one_task_out(500, 200)
        for fit in (moved, column)
    )
    # the same random numbers in the same places
    assert np.allclose(
        here[["log_evidence", "left_out"]], there[["log_evidence", "left_out"]], atol=1e-5
    )


def test_a_guide_of_ones_own(moved: vm.Fit) -> None:
    class Points(pyro.nn.PyroModule):  # type: ignore[misc]
        def __init__(self, model: vm.TaskModel) -> None:
            super().__init__()
            self.model, self.loc = model, None

        def forward(self, eta: dict[str, Tensor], data: Any) -> Tensor:
            if self.loc is None:
                self.loc = nn.Parameter(
                    self.model.prior_distribution(eta).mean.repeat(len(data), 1, 1)
                )
            with pyro.plate("tasks", len(data), dim=-2):
                return pyro.sample("theta", dist.Delta(self.loc, event_dim=1))

    own, delta = (
        vm.Joint(guide).problem(moved.model, moved.tasks, 0) for guide in (Points, "delta")
    )
    batch = moved.tasks.batch()
    losses = [
        p.losses("elbo", batch, 0)(p.start(batch, moved.eta), moved.eta) for p in (own, delta)
    ]
    assert torch.allclose(*losses, atol=1e-12)


def test_saved_and_loaded(moved: vm.Fit, tmp_path: Path) -> None:
    moved.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", moved.model)
    assert again.tasks[0].features == moved.tasks[0].features
    assert torch.equal(again.posterior().mean["intercept"], moved.posterior().mean["intercept"])
    with pytest.raises(ValueError, match="another model: prior.covariates was"):
        vm.load(tmp_path / "fit", regression(["floor"], "shared", ["floor"]))
    frame = vm.datasets.radon(as_frame=True).assign(log_uppm=lambda d: 2 * d.log_uppm)
    other = vm.TaskSet.from_frame(
        frame, task="county", x=["floor"], y="log_radon", features=["log_uppm"]
    )
    with pytest.raises(ValueError, match="the features of"):
        vm.fit(moved.model, other, moved.strategy, resume=again)


def test_shown_by_name(moved: vm.Fit) -> None:
    line = next(line for line in str(moved).splitlines() if line.startswith("intercept:log_uppm"))
    assert line.split()[-1] == "covariate"
    assert moved.standard_errors is not None
    assert float(line.split()[2]) == pytest.approx(
        float(moved.standard_errors["intercept:log_uppm"]), rel=1e-4
    )
    assert "intercept:log_uppm 0.7879 (covariate)" in repr(moved.prior)
    assert "features log_uppm" in repr(moved.tasks)
    # a linear layer's weights are called as the columns are
    linear = vm.TaskModel(
        nn.Linear(1, 1),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(1.0, covariates={"bias": ["log_uppm"]}),
    )
    fit = vm.fit(linear, moved.tasks, vm.Joint("normal"), 1)
    assert "intercept:log_uppm" in str(fit) and "bias:log_uppm" in fit.eta


def test_exported(moved: vm.Fit) -> None:
    data = moved.to_arviz(200)
    assert data.posterior["coefficients"].isel(chain=0, draw=0).sel(
        coefficient="intercept:log_uppm"
    ).item() == pytest.approx(float(moved.eta["intercept:log_uppm"]))
    drawn = data.posterior["theta"].mean(("chain", "draw")).sel(weight="intercept")
    assert np.allclose(drawn, moved.posterior().mean["intercept"], atol=0.05)
    # distances are from where the features put the prior
    away = np.abs(moved.posterior().frame(deviations=True)["mean"]["intercept"])
    assert np.allclose(data.posterior["distance"].mean(("chain", "draw")) >= away - 0.05, True)
    assert float(data.posterior["distance"].mean()) < 0.3


@pytest.mark.parametrize(
    "covariates", [{"intercept": ["log_uppm"]}, ["log_uppm"]], ids=["intercept", "all"]
)
def test_standardised_and_back(covariates: Any) -> None:
    tasks = radon(["floor"], ["log_uppm"])
    scaled, scaling = tasks.standardized()
    values = scaled.batch().support.features["log_uppm"]
    assert float(values.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(values.std(correction=0)) == pytest.approx(1.0)
    assert "log_uppm" in repr(scaling)
    model = regression(["floor"], "full", [], covariates)
    raw = vm.fit(model, tasks, vm.Joint("multivariate_normal")).prior
    back = scaling.raw_prior(vm.fit(model, scaled, vm.Joint("multivariate_normal")))
    assert set(back.coefficients) == set(raw.coefficients)
    for name in raw.coefficients:
        assert float(back.coefficients[name]) == pytest.approx(
            float(raw.coefficients[name]), abs=1e-5
        )
    for name in raw.loc:
        assert float(back.loc[name]) == pytest.approx(float(raw.loc[name]), abs=1e-5)
    assert back.coefficient_labels == raw.coefficient_labels


def test_a_feature_of_the_scaled_slope_moves_the_raw_intercept() -> None:
    tasks, scaling = radon(["floor"], ["log_uppm"]).standardized()
    fit = vm.fit(
        regression(["floor"], "full", [], {"floor": ["log_uppm"]}),
        tasks,
        vm.Joint("multivariate_normal"),
    )
    back = scaling.raw_prior(fit)
    assert list(back.coefficients) == ["intercept:log_uppm", "floor:log_uppm"]
    # x = 1 in a county of log_uppm 0.2, by both roads
    z = (0.2 - scaling.features["log_uppm"][0]) / scaling.features["log_uppm"][1]
    x = (1.0 - float(scaling.x_loc)) / float(scaling.x_scale)
    eta = {name: float(value) for name, value in fit.eta.items() if value.dim() == 0}
    inside = eta["intercept"] + x * (eta["floor"] + z * eta["floor:log_uppm"])
    outside = sum(
        float(back.loc[n]) + 0.2 * float(back.coefficients[f"{n}:log_uppm"])
        for n in ("intercept", "floor")
    )
    assert outside == pytest.approx(
        float(scaling.y_inverse(torch.tensor(inside, dtype=torch.float64))), abs=1e-9
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: vm.Joint("normal"),
        lambda: vm.Unrolled("delta", inner_steps=2, minimizer=vm.GradientDescent(0.01)),
    ],
    ids=["joint", "unrolled"],
)
def test_captured_steps_are_the_same(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        capture, "compile_graph", lambda graph, inputs: graph
    )  # traced; the compiler has its own tests
    model, tasks = (
        net_model(vm.GaussianPrior(3.0, covariates=["a"])),
        with_features(ragged_tasks(4), "a"),
    )
    strategy, batch = make(), tasks.batch([2, 0]).widened()
    problem, start = (
        strategy.problem(model, tasks, 7),
        model.init(torch.zeros((), dtype=torch.float64)),
    )
    eta = {name: (value + 0.1).requires_grad_() for name, value in start.items()}
    state = strategy.init(problem, tasks.batch(), eta)
    step = Step(strategy, True, 1)
    graphs = step._prepared(problem, batch, state)
    for rows in ([2, 0], [3, 1]):  # one graph for both, so the features are its inputs
        some = tasks.batch(rows).widened()
        mine, plain = graphs(7, some, eta, state), eager(strategy, problem, some, eta, state)
        assert float(mine.value) == pytest.approx(float(plain.value), rel=1e-12)
        for name in eta:
            assert torch.allclose(mine.gradient[name], plain.gradient[name], atol=1e-10)
    assert len(graphs.captured._made) == 1


# -- what cannot be --------------------------------------------------------------------------------


def test_bad_features_of_tasks() -> None:
    with pytest.raises(ValueError, match=r"task 'b' has the features \[\], but task 'a' \['z'\]"):
        vm.TaskSet([vm.Task(name="a", features={"z": 1.0}), vm.Task(name="b")])
    with pytest.raises(ValueError, match="task 'a': the feature 'z' is nan"):
        vm.TaskSet([vm.Task(name="a", features={"z": float("nan")})])
    with pytest.raises(TypeError, match="must be one number, not 'high'"):
        vm.TaskSet([vm.Task(name="a", features={"z": "high"})])  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="features must be a dict of numbers by name"):
        vm.TaskSet([vm.Task(name="a", features=[1.0])])  # type: ignore[arg-type]
    frame = vm.datasets.radon(as_frame=True)
    with pytest.raises(
        ValueError, match=r"the feature 'floor' is 1 in row 3 .*, but 0 in row 0 .*belongs to x"
    ):
        vm.TaskSet.from_frame(frame, task="county", x=[], y="log_radon", features=["floor"])
    with pytest.raises(TypeError, match=r"features must list column names, .*write \['log_uppm'\]"):
        vm.TaskSet.from_frame(frame, task="county", x=[], y="log_radon", features="log_uppm")  # type: ignore[arg-type]


def test_bad_covariates(moved: vm.Fit) -> None:
    tasks = radon(["floor"], [])
    with pytest.raises(
        ValueError, match=r"need the features \['log_uppm'\], but these tasks have none"
    ):
        vm.fit(moved.model, tasks)
    with pytest.raises(ValueError, match=r"need the features \['log_uppm'\]"):
        moved.adapt(tasks)
    with pytest.raises(ValueError, match=r"covariates move \['floor'\], which all tasks share"):
        regression(["floor"], "shared", ["floor"], {"floor": ["log_uppm"]})
    with pytest.raises(ValueError, match=r"covariates name \['slope'\]"):
        regression(["floor"], "shared", ["floor"], {"slope": ["log_uppm"]})
    with pytest.raises(TypeError, match="must list names of features"):
        vm.GaussianPrior(covariates={"intercept": "log_uppm"})
    with pytest.raises(ValueError, match="names a feature twice"):
        vm.GaussianPrior(covariates=["a", "a"])
    with pytest.raises(ValueError, match="a colon joins weight and feature"):
        vm.GaussianPrior(covariates=["a:b"])
    with pytest.raises(ValueError, match="these tasks have the features"):
        radon(["floor"], ["log_uppm"]).standardized()[1].apply(tasks)
    scalar = vm.TaskModel(
        vm.LinearPredictor([]),
        vm.likelihoods.Gaussian(learn_scale=False),
        vm.GaussianPrior(1.0, covariates=URANIUM),
    )
    with pytest.raises(ValueError, match="a landscape is drawn over one theta0"):
        vm.Landscape(scalar, moved.tasks)


# -- what stands on a fit --------------------------------------------------------------------------


def test_compared_with_baselines_that_know_the_features_too() -> None:
    tasks = radon(["floor"], ["log_uppm"])[:20]
    counties = tasks[[len(task.support[1]) > 1 for task in tasks]].split(0.5)  # type: ignore[index]
    model = regression(["floor"], "shared", ["floor"], URANIUM)
    report = vm.compare(
        {"joint": vm.Joint("normal")}, model, counties, counties, 1, budget=20, compile=False
    )
    assert not report.runs["failed"].any() and set(report.runs["method"]) == {
        "joint",
        "pooled",
        "no pooling",
    }
    assert report.fits["pooled", 0].eta["intercept:log_uppm"] != 0.0


def test_figures_draw_the_prior_at_the_features_mean(moved: vm.Fit, column: vm.Fit) -> None:
    import matplotlib.pyplot as plt

    from varmeta.plot import (
        no_pooling,
        plot_posteriors,
        plot_prior,
        plot_prior_curves,
        plot_shrinkage,
    )

    uranium = moved.tasks.batch().support.features["log_uppm"]
    middle = float(moved.eta["intercept"] + moved.eta["intercept:log_uppm"] * uranium.mean())
    ax = plot_shrinkage(moved)
    assert ax.lines[0].get_ydata()[0] == pytest.approx(middle)
    # a task on its own is where it is with the feature as a column
    own, other = (
        no_pooling(moved)[:, 0],
        no_pooling(column)[:, 0] + column.eta["log_uppm"] * uranium,
    )
    assert torch.allclose(own, other, atol=0.02)  # the two baselines' weak priors differ
    line = next(
        line for line in plot_posteriors(moved, "intercept").lines if line.get_label() == "theta0"
    )
    assert line.get_xdata()[0] == pytest.approx(middle)
    dots = plot_prior(moved)[0, 0].collections[-1].get_offsets()
    assert float(dots[0, 0]) == pytest.approx(middle)
    mean = plot_prior_curves(moved, [0.0, 1.0]).lines[-1]
    assert mean.get_ydata()[0] == pytest.approx(middle, abs=0.02)
    plt.close("all")


@pytest.mark.parametrize(
    "guide",
    [vm.guides.LowRank(1), vm.guides.Structured(dense=("*weight",)), "laplace", "delta"],
    ids=str,
)
def test_every_guides_posterior_is_moved(guide: Any) -> None:
    tasks = with_features(ragged_tasks(3), "a")
    strategy = vm.Implicit(guide, "elbo", on_unconverged="ignore")
    prior = vm.GaussianPrior(3.0, covariates={"2.bias": ["a"]}, loc={"2.bias:a": 0.5})
    fixed = net_model(prior)
    sgd = lambda params: torch.optim.SGD(params, lr=0.0)  # noqa: E731
    posterior = vm.fit(fixed, tasks, strategy, 1, sgd, compile=False).posterior()
    by = 0.5 * tasks.batch().support.features["a"]
    inside = posterior.q.guide.distribution(
        posterior.q.phi, posterior.q.eta, posterior.q.batch.support
    )
    moved_mean = posterior.distribution.mean - inside.mean
    assert torch.allclose(moved_mean[:, 0, -1], by, atol=1e-12) and not moved_mean[..., :-1].any()
    error = (posterior.sample(2000)["2.bias"].mean(0) - posterior.mean["2.bias"]).abs()
    assert bool((error <= 4.5 * posterior.sd["2.bias"] / 2000**0.5 + 1e-12).all())
