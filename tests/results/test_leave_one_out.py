"""A task left out, where the evidence is known: exact densities, beside importance sampling.

And fits to the other tasks, beside such fits and scipy's.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize
from torch import nn

import varmeta as vm
from tests.conftest import shared_data
from tests.linear_gaussian import REGRESSIONS, dense_evidence
from varmeta.fitting import without_each

DENSE = vm.Joint("multivariate_normal")


class Unknown(nn.Linear):
    """A layer of one's own, of which nothing is known by construction."""


def test_it_is_what_sampling_finds_without_its_noise() -> None:
    _, tasks = REGRESSIONS["full"]()
    tables = []
    for layer in (nn.Linear, Unknown):
        torch.manual_seed(0)
        prior = vm.GaussianPrior(learn_precision="per_parameter")
        model = vm.TaskModel(layer(2, 1).double(), vm.likelihoods.Gaussian(), prior)
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
        assert fit.model.is_linear_gaussian == (layer is nn.Linear)
        tables.append(fit.leave_one_task_out())
        if layer is nn.Linear:
            exact = dense_evidence(fit.model, fit.eta, tasks)
            found = torch.tensor(tables[0]["log_evidence"].to_numpy()[:-1])
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
            again = fit.leave_one_task_out(num_particles=100)  # nothing of a task is drawn
            assert again.equals(tables[0])
    known, sampled = tables
    assert (known["left_out"] - sampled["left_out"]).abs()[:-1].max() < 0.1
    assert (known["log_evidence"] - sampled["log_evidence"]).abs()[:-1].max() < 0.05
    # leaving a task out costs its density
    assert known.loc["all", "left_out"] < known.loc["all", "log_evidence"]


def without(tasks: vm.TaskSet, left: int) -> vm.TaskSet:
    return tasks[[i for i in range(len(tasks)) if i != left]]


def spread(means: list[float]) -> vm.TaskSet:
    """Six rows around each mean."""
    noise = torch.randn(len(means), 6, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor(means).double().unsqueeze(-1) + noise - noise.mean(1, keepdim=True)
    return vm.TaskSet([vm.Task((torch.zeros(6, 0).double(), own)) for own in y])


# singular fits are doubted, and leave no posterior of eta
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("case", "few"), [*((case, 0) for case in REGRESSIONS), ("full", 20)])
def test_refits_are_fits_to_the_other_tasks(
    case: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """few: up to so many tasks each of the fits begins anew; beyond, all are found together."""
    monkeypatch.setattr(without_each, "FEW", few)
    model, tasks = REGRESSIONS[case]()
    table = vm.fit(model, tasks, DENSE).leave_one_task_out(100)
    worst = (table["log_evidence"] - table["refitted"]).iloc[:-1].to_numpy().argmax()
    for left in (int(worst), 2, 7):
        others = vm.fit(model, without(tasks, left), DENSE)
        expected = float(dense_evidence(model, others.eta, tasks[[left]])[0])
        assert table["refitted"].iloc[left] == pytest.approx(expected, abs=1e-4)
    assert table.loc["all", "refitted"] == pytest.approx(table["refitted"].iloc[:-1].sum())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the refits are singular
def test_refits_of_a_task_that_is_unlike_the_others() -> None:
    """Five tasks, one of which makes most of the prior's sd: Newton steps that begin at the fit to
    all of them have a long way.
    """
    tasks = spread([0.0, 0.3, -0.2, 0.1, 40.0])
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(vm.LinearPredictor([]).double(), vm.likelihoods.Gaussian(), prior)
    table = vm.fit(model, tasks, DENSE).leave_one_task_out()
    for left in range(5):
        others = vm.fit(model, without(tasks, left), DENSE)
        y = tasks[left].support[1]  # type: ignore[index]
        sd, scale = others.prior.sd["intercept"], others.prior.scale
        covariance = sd**2 + scale**2 * torch.eye(6, dtype=torch.float64)  # type: ignore[operator]
        mean = others.prior.loc["intercept"].expand(6)
        expected = float(torch.distributions.MultivariateNormal(mean, covariance).log_prob(y))
        assert table["refitted"].iloc[left] == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_a_singular_fit_has_refits_and_no_posterior_of_eta() -> None:
    """A flat density of log sd has infinite mass at an sd of 0."""
    tasks = spread([0.0, 0.01, -0.02, 0.01, 0.0, 0.02])
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(vm.LinearPredictor([]).double(), vm.likelihoods.Gaussian(), prior)
    with pytest.warns(RuntimeWarning, match="runs away"):
        fit = vm.fit(model, tasks, DENSE)
    with pytest.warns(RuntimeWarning, match="left_out is NaN: .* no maximum"):
        table = fit.leave_one_task_out()
    assert table["left_out"].isna().all() and (table["reading"] == "no maximum").all()
    y = torch.stack([task.support[1] for task in tasks])  # type: ignore[index]
    for left in range(len(tasks)):
        others = torch.cat([y[:left], y[left + 1 :]])
        # without an sd: one mean and one variance
        expected = torch.distributions.Normal(others.mean(), others.std(correction=0))
        assert table["refitted"].iloc[left] == pytest.approx(
            float(expected.log_prob(y[left]).sum()), abs=1e-6
        )


# -- tiny sets: against scipy ----------------------------------------------------------------------

Rows = list[tuple[np.ndarray, np.ndarray]]


def tiny(sizes: list[int], seed: int) -> Rows:
    """Lines of their own, with one to four rows each."""
    rng, found = np.random.default_rng(seed), []
    for size in sizes:
        x, theta = rng.normal(size=size), np.array([1.0, 2.0]) + 0.8 * rng.normal(size=2)
        found.append((x, theta[0] + theta[1] * x + 0.4 * rng.normal(size=size)))
    return found


def loss_of(vector: np.ndarray, rows: Rows) -> float:
    """-log p(y | theta0, log sd, log s), written out."""
    total = 0.0
    for x, y in rows:
        design = np.c_[np.ones(len(x)), x]
        v = np.exp(2 * vector[2]) * design @ design.T + np.exp(2 * vector[3]) * np.eye(len(y))
        left = y - design @ vector[:2]
        log_det = np.linalg.slogdet(2 * np.pi * v)[1]
        total += 0.5 * (log_det + left @ np.linalg.solve(v, left))
    return total


def best(rows: Rows) -> np.ndarray:
    """By scipy, from many starts; a log sd of -12 stands for one that runs away."""
    rng, bounds = np.random.default_rng(0), [(None, None), (None, None), (-12, 4), (-12, 4)]
    found = [
        optimize.minimize(loss_of, rng.normal(size=4), rows, method="L-BFGS-B", bounds=bounds)
        for _ in range(6)
    ]
    near = min(found, key=lambda one: float(one.fun)).x
    # differences of the loss leave some 1e-3 of the left-out density, other on each processor
    sharp = {"xatol": 1e-10, "fatol": 1e-13, "maxiter": 4000, "maxfev": 4000}
    vector: np.ndarray = optimize.minimize(
        loss_of, near, rows, method="Nelder-Mead", bounds=bounds, options=sharp
    ).x
    return vector


TINY = [[1, 2, 2, 1, 1, 2], [2, 2, 1, 2, 1], [2, 1, 1, 2], [1, 1, 1], [3, 2, 1]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:varmeta.verbs")  # the fit to all is doubted too
@pytest.mark.parametrize("sizes", TINY, ids=str)
def test_a_refit_to_a_handful_of_rows_is_right_or_nan_with_a_warning(sizes: list[int]) -> None:
    """It was -1e9 nats without a word where the others' noise scale or sd runs away."""
    rows = tiny(sizes, len(TINY))
    tasks = vm.TaskSet(
        [vm.Task((torch.from_numpy(x)[:, None], torch.from_numpy(y))) for x, y in rows]
    )
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(vm.LinearPredictor(["x"]).double(), vm.likelihoods.Gaussian(), prior)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table: Any = vm.fit(model, tasks, DENSE).leave_one_task_out(100)
    said = " ".join(str(one.message) for one in told if one.category is RuntimeWarning)
    for left, name in enumerate(tasks.names):
        vector, found = best(rows[:left] + rows[left + 1 :]), table.loc[name, "refitted"]
        if math.isnan(found):
            assert vector[3] < -6 and "refitted is NaN" in said
        else:
            assert found == pytest.approx(-loss_of(vector, [rows[left]]), abs=1e-3, rel=2e-5)


def test_schools() -> None:
    """hsb82: 160 schools, refits of the three that matter most."""
    frame = pd.read_csv(shared_data("hsb82") / "data.csv", dtype={"school": str})
    tasks = vm.TaskSet.from_frame(frame, task="school", x=["cses"], y="mAch")
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["cses"]).double(), vm.likelihoods.Gaussian(), prior)
    table = vm.fit(model, tasks, DENSE).leave_one_task_out(100)
    cost = (table["log_evidence"] - table["refitted"]).iloc[:-1].to_numpy()
    for left in cost.argsort()[-3:].tolist():
        others = vm.fit(model, without(tasks, left), DENSE)
        expected = float(dense_evidence(model, others.eta, tasks[[left]])[0])
        assert table["refitted"].iloc[left] == pytest.approx(expected, abs=1e-4)
    assert table.loc["all", "refitted"] == pytest.approx(-23361.9592, abs=1e-3)
