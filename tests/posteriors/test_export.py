"""What a posterior and a fit put into which ArviZ group."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, known, linear_model, net_model, ragged_tasks, seeded
from varmeta.posteriors import arviz as inference_data

PRIOR = vm.GaussianPrior(3.0)


def groups_of(data: Any) -> set[str]:
    return (
        set(data.groups())
        if hasattr(data, "groups") and callable(data.groups)
        else set(data.children)
    )


def log_weights(data: Any) -> np.ndarray:
    """log p(theta, y) - log q(theta), `(task, draw)`."""
    sample_stats = data["sample_stats"]
    return (
        (sample_stats["log_joint"] - sample_stats["log_q"])
        .stack(s=("chain", "draw"))
        .transpose("task", "s")
        .to_numpy()
    )


def drawn(array: Any) -> np.ndarray:
    """`(draws, ...)`, chain after chain."""
    return np.asarray(array.values.reshape(-1, *array.shape[2:]))


@pytest.fixture(scope="module")
def fit() -> vm.Fit:
    return vm.fit(linear_model(PRIOR), ragged_tasks(4), vm.Joint("multivariate_normal"))


@pytest.fixture(scope="module")
def data(fit: vm.Fit) -> Any:
    return fit.to_arviz(num_samples=400, seed=2)


def test_groups_of_a_fit(data: Any, fit: vm.Fit) -> None:
    assert groups_of(data) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "fit",
    }
    posterior = fit.posterior()
    assert groups_of(posterior.to_arviz(10)) == groups_of(data) - {"fit"}
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": 100, "weight": 2, "task": 4}
    assert data["posterior"]["task"].values.tolist() == list(fit.tasks.names)
    assert data["posterior"]["weight"].values.tolist() == list(fit.model.weights.labels)
    draws = posterior.draws(400, seed=2)
    assert np.array_equal(drawn(data["posterior"]["theta"]), draws.numpy())
    theta0 = fit.model.weights.flatten(fit.prior.loc)
    assert np.allclose(
        drawn(data["posterior"]["distance"]), (draws - theta0).norm(dim=-1).numpy(), rtol=1e-12
    )
    assert (drawn(data["posterior"]["theta0"]) == theta0.numpy()).all()
    assert np.allclose(data["posterior"]["prior_sd"].values, 3.0**-0.5)
    assert np.allclose(data["posterior"]["noise_scale"].values, float(fit.prior.scale))


def test_a_summary_begins_with_the_prior() -> None:
    tasks = vm.datasets.lines(30, num_support=8, noise=0.3, dtype=torch.float64)
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["dose"]), vm.likelihoods.Gaussian(), prior)
    fit = vm.fit(model, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # ArviZ divides by the sd of a constant
        table = az.summary(fit.to_arviz(400), round_to=12)
    frame = fit.prior.sd, fit.prior.loc
    expected = {f"theta0[{name}]": float(frame[1][name]) for name in ("intercept", "dose")}
    expected |= {f"prior_sd[{name}]": float(frame[0][name]) for name in ("intercept", "dose")}
    expected["correlation[intercept, dose]"] = float(fit.prior.correlation[0, 1])
    expected["noise_scale"] = float(fit.prior.scale)
    assert list(table.index[:6]) == list(expected)
    assert np.allclose(table["mean"][:6].to_numpy(float), list(expected.values()), rtol=1e-8)
    assert table.index[6] == "theta[line 0.0, intercept]" and table.index[-1].startswith("distance")
    assert (table["r_hat"][6:].to_numpy(float) < 1.05).all()


def test_so_does_that_of_a_posterior_of_eta_whose_chains_are_mixed() -> None:
    prior = vm.GaussianPrior(learn_precision="shared")
    net = vm.LinearPredictor(["dose", "age"])
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, shared=["age"])
    rng = np.random.default_rng(0)
    tasks = []
    for i in range(20):
        x, z = rng.normal(size=(6, 2)), rng.normal(size=2)
        y = z[0] + (1.0 + 0.5 * z[1]) * x[:, 0] + 2.0 * x[:, 1] + 0.3 * rng.normal(size=6)
        tasks.append(vm.Task((x, y), name=f"t{i}"))
    fit = vm.fit(model, vm.TaskSet(tasks), hyperguide="multivariate_normal")
    table = az.summary(fit.to_arviz(1000), var_names=["~distance", "~theta"], round_to=12)
    assert list(table.index) == [
        "theta0[intercept]", "theta0[dose]", "prior_sd[intercept]", "prior_sd[dose]",
        "noise_scale", "shared[age]",
    ]  # fmt: skip
    known = fit.hyperparameters()
    named = ["intercept", "dose", "sd(intercept)", "sd(dose)", "noise scale", "age"]
    sd = known.loc[named, "sd"].to_numpy()
    assert np.allclose(table["mean"].to_numpy(float), known.loc[named, "mean"], atol=0.1 * sd.max())
    assert np.allclose(table["sd"].to_numpy(float), sd, rtol=0.1)
    assert (table["r_hat"].to_numpy(float) < 1.02).all()
    assert (table["ess_bulk"].to_numpy(float) > 500).all()


def test_the_prior_of_a_network_stands_aside() -> None:
    tasks = ragged_tasks(2)
    data = known(net_model(PRIOR, width=100), tasks, vm.Joint()).adapt(tasks).to_arviz(8)
    assert "theta0" not in data["posterior"]
    assert data["constant_data"]["theta0"].dims == data["constant_data"]["prior_sd"].dims


def test_observations_are_flat_with_their_tasks(data: Any, fit: vm.Fit) -> None:
    sizes = [len(task.support[1]) for task in fit.tasks if task.support is not None]
    ids = np.repeat(fit.tasks.names, sizes).tolist()
    for group in ("observed_data", "posterior_predictive", "log_likelihood"):
        assert data[group]["y"].dims[-1] == "obs"
        assert data[group]["task_id"].values.tolist() == ids
    y = torch.cat([task.support[1] for task in fit.tasks if task.support is not None])
    assert np.array_equal(data["observed_data"]["y"].values, y.numpy())
    # the log likelihood by scipy, from the exported draws themselves
    x = (
        torch.cat([task.support[0] for task in fit.tasks if task.support is not None])
        .flatten()
        .numpy()
    )
    theta = drawn(data["posterior"]["theta"])[:, np.repeat(range(4), sizes)]
    labels = list(fit.model.weights.labels)
    mean = theta[..., labels.index("weight")] * x + theta[..., labels.index("bias")]
    exact = stats.norm.logpdf(y.numpy(), mean, float(fit.eta["log_scale"].exp()))
    assert np.allclose(drawn(data["log_likelihood"]["y"]), exact, atol=1e-10)


def test_the_record_of_the_run(data: Any, fit: vm.Fit) -> None:
    assert data["fit"]["loss"].dims == ("step",)
    assert data["fit"]["loss"].values.tolist() == fit.history["loss"].tolist()
    assert data["fit"]["step"].values.tolist() == fit.history["step"].tolist()
    assert {"evaluations", "seconds"} <= set(data["fit"])
    facts = data.attrs
    assert facts["objective"] == "negative ELBO" and facts["loss"] == pytest.approx(fit.loss)
    assert facts["converged"] == "True" and facts["stop"] == fit.stop and facts["seed"] == 0
    assert facts["guide"] == "multivariate_normal" and facts["posterior_kind"] == "gaussian"
    assert (
        facts["inference_library"] == "varmeta"
        and facts["inference_library_version"] == vm.__version__
    )
    assert json.loads(facts["config"])["strategy"] == repr(fit.strategy)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # tasks of three points
def test_arviz_summarises_it(data: Any, fit: vm.Fit) -> None:
    summary = az.summary(data, var_names=["theta"], kind="stats", round_to=6)
    assert len(summary) == 8
    draws = fit.posterior().draws(400, seed=2)
    assert np.allclose(
        summary["mean"].to_numpy(dtype=float), draws.mean(0).flatten().numpy(), atol=1e-5
    )
    elpd = inference_data.loo_elpd(data)
    assert (
        elpd["task_id"].values.tolist() == list(fit.tasks.names) and np.isfinite(elpd.values).all()
    )


def test_files_round_trip(data: Any, tmp_path: Path) -> None:
    inference_data.save(data, tmp_path / "fit.nc")
    back = inference_data.load(tmp_path / "fit.nc")
    assert groups_of(back) == groups_of(data)
    for group in groups_of(data):
        assert set(back[group].data_vars) == set(data[group].data_vars)
        for name, values in data[group].data_vars.items():
            assert np.array_equal(back[group][name].values, values.values), (group, name)
        for name, values in data[group].coords.items():
            assert back[group][name].values.tolist() == values.values.tolist()
    assert dict(back.attrs) == dict(data.attrs)


# -- how far the guide is from the posterior -------------------------------------------------------


def test_weights_of_an_exact_guide_are_constant(data: Any) -> None:
    """In a linear-Gaussian model the dense guide is the posterior, of ragged tasks too: log
    p(theta, y) - log q(theta) is the log evidence, whatever theta.
    """
    weights = log_weights(data)
    assert np.ptp(weights, axis=1).max() <= 1e-6
    assert (inference_data.pareto_k(weights) <= 0.1).all()


def test_their_sum_is_the_evidence(data: Any, fit: vm.Fit) -> None:
    assert log_weights(data).mean(1).sum() == pytest.approx(-fit.loss, abs=1e-6)


def test_weights_of_a_guide_that_is_too_narrow_show() -> None:
    """A mean-field guide at a strongly correlated posterior."""
    generator = torch.Generator().manual_seed(0)
    x = 5.0 + torch.randn(2, 30, 1, generator=generator, dtype=torch.float64)
    y = x[..., 0] + torch.randn(2, 30, generator=generator, dtype=torch.float64)
    tasks = vm.TaskSet([vm.Task((a, b)) for a, b in zip(x, y, strict=True)])
    model = linear_model(vm.GaussianPrior(0.1))
    k = {
        guide: inference_data.pareto_k(
            log_weights(known(model, tasks, vm.Joint(guide)).adapt(tasks).to_arviz(1000))
        )
        for guide in ("normal", "multivariate_normal")
    }
    assert (k["normal"] > 0.7).all() and (k["multivariate_normal"] < 0.1).all()


# -- points ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy", [vm.Joint("delta"), vm.Implicit(), vm.Reptile(), vm.Joint(AutoDelta)], ids=repr
)
def test_a_point_has_no_log_likelihood_and_no_bound(strategy: vm.Joint) -> None:
    fit = vm.fit(linear_model(PRIOR), ragged_tasks(2), strategy, 2, adam)
    data = fit.to_arviz(30)
    assert groups_of(data) == {
        "posterior",
        "posterior_predictive",
        "observed_data",
        "fit",
    }
    assert data.attrs["posterior_kind"] == "delta"
    assert data.attrs["objective"] == "penalised loss (MAP; no bound)"
    facts = {
        name: value for name, value in data.attrs.items() if name != "config"
    }  # there, "elbo" is an argument
    assert "elbo" not in str(facts).lower()
    with pytest.raises(ValueError, match="delta posterior has no leave-one-out density"):
        inference_data.loo_elpd(data)


# -- other shapes ----------------------------------------------------------------------------------


def test_tasks_without_data_have_a_posterior_alone(fit: vm.Fit) -> None:
    data = fit.adapt(vm.TaskSet([vm.Task(name="new")])).to_arviz(50)
    assert groups_of(data) == {"posterior"}
    assert data["posterior"]["task"].values.tolist() == ["new"]


def test_several_responses() -> None:
    rng = np.random.default_rng(0)
    tasks = vm.TaskSet(
        [vm.Task((rng.normal(size=(n, 1)), rng.normal(size=(n, 2))), name=f"t{n}") for n in (2, 3)]
    )
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 2)), vm.likelihoods.Gaussian(), PRIOR)
    data = known(model, tasks, vm.Joint()).adapt(tasks).to_arviz(40)
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "obs", "response")
    assert data["posterior_predictive"]["y"].shape == (4, 10, 5, 2)
    assert data["observed_data"]["y"].shape == (5, 2)
    assert data["log_likelihood"]["y"].shape == (4, 10, 5)


def test_counts_out_of_trials() -> None:
    y = np.array([[1, 4], [2, 5], [0, 3]])
    tasks = vm.TaskSet(
        [vm.Task((np.ones((3, 1)), y), name="a"), vm.Task((np.ones((2, 1)), y[:2]), name="b")]
    )
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Binomial(), PRIOR)
    data = known(model, tasks, vm.Joint()).adapt(tasks).to_arviz(200)
    assert data["observed_data"]["y"].values.tolist() == [1, 2, 0, 1, 2]
    assert data["posterior_predictive"]["y"].values.max() <= 5
    assert data["posterior_predictive"]["y"].isel(obs=0).values.max() <= 4


def test_a_program_of_the_users_own() -> None:
    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample(
            "y", dist.StudentT(4.0, params["a"] + params["b"] * x, params["log_sd"].exp()), obs=y
        )

    rng = np.random.default_rng(0)
    tasks = vm.TaskSet(
        [vm.Task((rng.normal(size=n), rng.normal(size=n)), name=f"t{n}") for n in (3, 5)]
    )
    model = vm.TaskModel.from_pyro(
        program, {"a": (), "b": (), "log_sd": ()}, PRIOR, shared=["log_sd"]
    )
    data = known(model, tasks, vm.Joint("multivariate_normal")).adapt(tasks).to_arviz(100)
    assert data["posterior"]["weight"].values.tolist() == ["a", "b"]
    assert data["log_likelihood"]["task_id"].values.tolist() == ["t3"] * 3 + ["t5"] * 5
    assert np.isfinite(log_weights(data)).all()


def test_many_weights_are_left_out_but_their_distance_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("varmeta.posteriors.arviz_groups.MAX_WEIGHT_NUMBERS", 100)
    tasks = ragged_tasks(2)
    data = known(net_model(PRIOR), tasks, vm.Joint()).adapt(tasks).to_arviz(50)
    assert "theta" not in data["posterior"] and "distance" in data["posterior"]


def test_a_run_that_never_ran_is_exported() -> None:
    fit = known(linear_model(PRIOR), ragged_tasks(2), vm.Joint())
    fit.run.history.clear()
    fit.run.loss = float("nan")
    data = fit.to_arviz(30)
    assert data["fit"].sizes["step"] == 0 and np.isnan(data.attrs["loss"])
