"""Laplace's evidence: lme4's own, closed forms, curvature that is not there, and what it must not
be taken for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit, gammaln
from torch import Tensor, nn

import varmeta as vm
from tests.cases import known, ragged_tasks, seeded
from tests.common import moved, problem, start
from tests.conftest import shared_data
from varmeta.fitting.descent import JUMP
from varmeta.guides.laplace import FLOOR


def cbpp() -> tuple[pd.DataFrame, str, list[str], Any, Any]:
    frame = pd.read_csv(shared_data("cbpp") / "data.csv")
    columns = [f"period{p}" for p in (2, 3, 4)]
    for number, name in enumerate(columns, 2):
        frame[name] = (frame.period == number).astype(float)
    return frame, "herd", columns, ["incidence", "size"], vm.likelihoods.Binomial()


def epil() -> tuple[pd.DataFrame, str, list[str], Any, Any]:
    frame = pd.read_csv(shared_data("epil") / "data.csv")
    frame["lbase"], frame["lage"] = np.log(frame.base / 4), np.log(frame.age)
    frame[["lbase", "lage"]] -= frame[["lbase", "lage"]].mean()
    frame["trt"] = (frame.trt == "progabide").astype(float)
    frame["both"] = frame.lbase * frame.trt
    return frame, "subject", ["lbase", "trt", "lage", "V4", "both"], "y", vm.likelihoods.Poisson()


def sitecounts() -> tuple[pd.DataFrame, str, list[str], Any, Any]:
    return (
        pd.read_csv(shared_data("sitecounts") / "data.csv"),
        "site",
        [],
        "count",
        vm.likelihoods.Poisson(),
    )


def grouseticks() -> tuple[pd.DataFrame, str, list[str], Any, Any]:
    frame = pd.read_csv(shared_data("grouseticks") / "data.csv")
    for year in (96, 97):
        frame[f"y{year}"] = (frame["YEAR"] == year).astype(float)
    return frame, "BROOD", ["y96", "y97", "cHEIGHT"], "TICKS", vm.likelihoods.Poisson()


def toenail() -> tuple[pd.DataFrame, str, list[str], Any, Any]:
    frame = pd.read_csv(shared_data("toenail") / "data.csv")
    frame["trt"] = (frame.treatment == "terbinafine").astype(float)
    frame["both"] = frame.trt * frame.time
    return frame, "patientID", ["trt", "time", "both"], "y", vm.likelihoods.Bernoulli()


Case = Callable[[], tuple[pd.DataFrame, str, list[str], Any, Any]]
# set, reference fit, and how far what lme4 reports lies below the maximum
CASES: dict[str, tuple[Case, str, float]] = {
    "cbpp": (cbpp, "laplace", 5e-4),
    "epil": (epil, "laplace", 5e-4),
    "sitecounts": (sitecounts, "laplace", 1e-4),
    "grouseticks": (grouseticks, "brood_only", 1e-4),
    "toenail": (toenail, "laplace", 1e-2),
}


def regression(case: Case) -> tuple[vm.TaskModel, vm.TaskSet, list[str]]:
    frame, task, x, y, likelihood = case()
    tasks = vm.TaskSet.from_frame(frame, task=task, x=x, y=y).to(dtype=torch.float64)
    prior = vm.GaussianPrior(learn_precision="shared")
    return vm.TaskModel(vm.LinearPredictor(x).double(), likelihood, prior, shared=x), tasks, x


def reference(name: str) -> dict[str, Any]:
    return json.loads((shared_data(name) / "reference.json").read_text())["fits"][CASES[name][1]]


def by_hand(
    frame: pd.DataFrame, task: str, x: list[str], y: Any, beta: np.ndarray, variance: float
) -> float:
    """Laplace's log evidence with scipy: the root of each group's score, binomial or Poisson by the
    columns of y.
    """
    total = 0.0
    for _, group in frame.groupby(task):
        offset = beta[0] + group[x].to_numpy(float) @ beta[1:]
        if isinstance(y, list):
            k, n = (group[name].to_numpy(float) for name in y)
            constant = (gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)).sum()
        elif frame[y].isin([0, 1]).all():
            k, n, constant = group[y].to_numpy(float), 1.0, 0.0
        else:
            k, n, constant = (
                group[y].to_numpy(float),
                None,
                -gammaln(group[y].to_numpy(float) + 1).sum(),
            )

        def mean(b: float, offset: np.ndarray = offset, n: Any = n) -> np.ndarray:
            return np.exp(offset + b) if n is None else n * expit(offset + b)

        def score(b: float, k: np.ndarray = k, mean: Any = mean) -> float:
            return float((k - mean(b)).sum() - b / variance)

        b = brentq(score, -50.0, 50.0, xtol=1e-13)
        weight = mean(b) if n is None else mean(b) * (1 - expit(offset + b))
        curvature, rate = weight.sum() + 1 / variance, mean(b)
        fit = (
            k * (offset + b) - (rate if n is None else n * np.logaddexp(0, offset + b))
        ).sum() + constant
        total += fit - 0.5 * b**2 / variance - 0.5 * math.log(variance * curvature)
    return total


@pytest.mark.parametrize("name", CASES)
def test_evidence_at_lme4s_estimates(name: str) -> None:
    """Scipy's to 1e-6.  glmer stops its search for the modes early, which moves what it reports by
    up to `gap`.
    """
    model, tasks, x = regression(CASES[name][0])
    expected = reference(name)
    names, variance = ["intercept", *x], expected["random"][0]["vcov"]
    numbers = torch.tensor(expected["fixed"]["estimate"], dtype=torch.float64)
    eta = dict(zip(names, numbers, strict=True))
    eta["log_precision"] = torch.tensor(-math.log(variance), dtype=torch.float64)
    value = vm.meta_gradient(model, tasks, vm.Implicit("laplace"), eta=eta).value
    frame, task, columns, y, _ = CASES[name][0]()
    assert -value == pytest.approx(
        by_hand(frame, task, columns, y, numbers.numpy(), variance), abs=1e-6
    )
    assert -value == pytest.approx(expected["logLik"], abs=CASES[name][2])


def test_cbpp_is_also_mixed_models_jls() -> None:
    """Its published deviance (from the saturated model) is solved to convergence, and ours is
    within 1e-6 of it.
    """
    model, tasks, _ = regression(cbpp)
    fit = vm.fit(model, tasks, vm.Implicit("laplace"))
    k, n = (cbpp()[0][name].to_numpy(float) for name in ("incidence", "size"))
    saturated = -2 * stats.binom(n, k / n).logpmf(k).sum()
    published = json.loads((shared_data("cbpp") / "reference.json").read_text())["published"][0][
        "deviance"
    ]
    assert 2 * fit.loss - saturated == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("name", ["cbpp", "epil", "sitecounts", "grouseticks"])
def test_fits_are_lme4s(name: str) -> None:
    """Estimates to a hundredth of their standard errors, the prior's sd to 1e-3, and never a lower
    likelihood.
    """
    model, tasks, x = regression(CASES[name][0])
    expected = reference(name)
    fit = vm.fit(model, tasks, vm.Implicit("laplace"))
    assert fit.converged
    assert (
        "Laplace" in fit.loss_name
        and "no bound" in fit.loss_name
        and "elbo" not in str(fit).lower()
    )
    assert -1e-6 <= -fit.loss - expected["logLik"] <= CASES[name][2]
    found = torch.stack([(fit.prior.loc | fit.prior.shared)[key] for key in ("intercept", *x)])
    error = (found - torch.tensor(expected["fixed"]["estimate"], dtype=torch.float64)).abs()
    assert bool(
        (error <= 0.01 * torch.tensor(expected["fixed"]["std_error"], dtype=torch.float64)).all()
    )
    assert float(fit.prior.sd["intercept"]) == pytest.approx(
        expected["random"][0]["sd_or_corr"], rel=1e-3
    )


def test_evidence_of_one_poisson_count_by_hand() -> None:
    """m(t) = e^t - y t + log y! + (lambda/2)(t - t0)^2 - 1/2 log lambda/2pi, H = e^t + lambda."""

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("y", dist.Poisson(params["t"].exp()), obs=y)

    model = vm.TaskModel.from_pyro(
        program, {"t": torch.tensor(0.3, dtype=torch.float64)}, vm.GaussianPrior(2.0)
    )
    tasks = vm.TaskSet([vm.Task(([0.0], [4.0]))]).to(dtype=torch.float64)
    fit = known(model, tasks, vm.Implicit("laplace"))
    t = float(fit.posterior().mean["t"])
    assert math.exp(t) - 4 + 2 * (t - 0.3) == pytest.approx(0, abs=1e-8)
    m = math.exp(t) - 4 * t + math.lgamma(5) + (t - 0.3) ** 2 - 0.5 * math.log(2 / (2 * math.pi))
    curvature = math.exp(t) + 2
    assert fit.loss == pytest.approx(
        m + 0.5 * math.log(curvature) - 0.5 * math.log(2 * math.pi), abs=1e-10
    )
    assert float(fit.posterior().sd["t"]) == pytest.approx(curvature**-0.5, rel=1e-8)


# -- the Gauss-Newton matrix -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Poisson", "Bernoulli", "Binomial", "Gaussian"])
def test_gauss_newton_is_exact_for_linear_predictors(kind: str) -> None:
    likelihood, of = {
        "Poisson": (vm.likelihoods.Poisson(), lambda y: y.exp().round().long()),
        "Bernoulli": (vm.likelihoods.Bernoulli(), lambda y: (y > 0).long()),
        "Binomial": (vm.likelihoods.Binomial(5), lambda y: (2 * y + 2).round().clamp(0, 5).long()),
        "Gaussian": (vm.likelihoods.Gaussian(), lambda y: y),
    }[kind]
    tasks = vm.TaskSet(
        [vm.Task((t.support[0], of(t.support[1]))) for t in ragged_tasks(4, features=2)]
    )
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(2, 1)), likelihood, vm.GaussianPrior(2.0, "shared")
    )
    batch, eta = tasks.batch(), moved(start(model))
    exact, newton = (problem(model, vm.guides.Laplace(h)) for h in ("exact", "gauss_newton"))
    phi = moved(exact.start(batch, eta))
    a, b = (
        p.guide.distribution(phi, eta, batch.support).covariance_matrix for p in (exact, newton)
    )
    torch.testing.assert_close(a, b)


def test_gauss_newton_of_a_classifier_is_the_fisher_information() -> None:
    """sum_n J_n' (diag p_n - p_n p_n') J_n, with the Jacobian by torch.func; positive semidefinite
    where H is not.
    """
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 3)))
    tasks = vm.TaskSet(
        [
            vm.Task((t.support[0], (2 * t.support[1] + 1).round().clamp(0, 2).long()))
            for t in ragged_tasks(3)
        ]
    )
    model = vm.TaskModel(net, vm.likelihoods.Categorical(3), vm.GaussianPrior(1.5))
    batch, eta = tasks.batch(), start(model)
    made = problem(model, vm.guides.Laplace("gauss_newton"))
    phi = moved(made.start(batch, eta), by=0.8)
    found = made.guide.distribution(phi, eta, batch.support).covariance_matrix.squeeze(1).inverse()
    for task, theta, matrix in zip(tasks, phi["loc"], found, strict=True):
        x = task.support[0]  # type: ignore[index]

        def logits(theta: Tensor, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(net, model.weights.unflatten(theta), (x,))

        jacobian, p = torch.func.jacrev(logits)(theta), logits(theta).softmax(-1)
        fisher = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        expected = (
            torch.einsum("ncd,nce,nef->df", jacobian, fisher, jacobian)
            + 1.5 * torch.eye(len(theta)).double()
        )
        torch.testing.assert_close(matrix, expected)
    assert bool((made.guide.raised(phi, eta, batch.support) == 0).all())


def test_many_weights_take_gauss_newton_by_themselves() -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)))  # 91 weights
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(0.5), vm.GaussianPrior(3.0))
    batch, eta = ragged_tasks(2).batch(), start(model)
    auto, newton, exact = (
        problem(model, vm.guides.Laplace(h)) for h in ("auto", "gauss_newton", "exact")
    )
    phi = moved(auto.start(batch, eta))
    a, b, c = (p.losses("elbo", batch, 0)(phi, eta) for p in (auto, newton, exact))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    program = vm.TaskModel.from_pyro(
        lambda params, x, y: pyro.sample("y", dist.Normal((params["w"] * x).sum(-1), 1.0), obs=y),
        {"w": (91,)},
    )
    with pytest.raises(ValueError, match="exact Hessian of 91 weights .*hessian='exact'"):
        problem(program, "laplace")
    with pytest.raises(ValueError, match="no output of which to take a Jacobian"):
        problem(program, vm.guides.Laplace("gauss_newton"))
    problem(program, vm.guides.Laplace("exact"))


# -- where there is no mode ------------------------------------------------------------------------


def squares(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["w"] ** 2, 1.0), obs=y)


def test_an_indefinite_hessian_is_raised_and_said() -> None:
    """At w = 0 the loss (y - w^2)^2 / 2 + w^2 / 4 has a maximum, where a gradient of 0 stops every
    inner loop.
    """
    model = vm.TaskModel.from_pyro(squares, {"w": ()}, vm.GaussianPrior(0.5, "shared"))
    tasks = vm.TaskSet(
        [vm.Task(([0.0], [3.0]), name="saddle"), vm.Task(([0.0], [-3.0]), name="bowl")]
    )
    tasks = tasks.to(dtype=torch.float64)
    batch, eta = tasks.batch(), start(model)
    made = problem(model, "laplace")
    phi = made.start(batch, eta)
    sd = made.guide.distribution(phi, eta, batch.support).stddev.squeeze()
    assert sd.tolist() == pytest.approx([(0.5 * FLOOR) ** -0.5, 6.5**-0.5])
    raised = made.guide.raised(phi, eta, batch.support)
    assert raised.tolist() == pytest.approx([(6.0 - 0.5) / 0.5 + FLOOR, 0.0])
    learned = {name: value.requires_grad_() for name, value in eta.items()}
    losses = made.losses("elbo", batch, 0)(phi, learned)
    assert bool(torch.isfinite(losses).all())
    assert all(
        bool(torch.isfinite(g)) for g in torch.autograd.grad(losses.sum(), list(learned.values()))
    )
    fit = known(
        vm.TaskModel.from_pyro(squares, {"w": ()}, vm.GaussianPrior(0.5)),
        tasks[[1]],
        vm.Implicit("laplace"),
    )
    with pytest.warns(
        RuntimeWarning, match="not positive definite for 1 task of 2, 'saddle' first"
    ):
        fit.adapt(tasks)


@pytest.mark.parametrize("strategy", [vm.Joint, vm.Reinit])
def test_joint_strategies_refuse_laplace(strategy: Any) -> None:
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian())
    with pytest.raises(ValueError, match=r"defined at the mode.*vm.Implicit\('laplace'\)"):
        vm.fit(model, ragged_tasks(3), strategy("laplace"))


def test_the_evidence_is_not_minimal_at_the_mode() -> None:
    """Why the meta-gradient needs the implicit part even where outer and inner use the same
    data.
    """
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Poisson(), vm.GaussianPrior(1.0)
    )
    tasks = vm.TaskSet(
        [vm.Task((t.support[0], t.support[1].exp().round().long())) for t in ragged_tasks(3)]
    )
    strategy = vm.Implicit("laplace", tolerance=1e-12)
    made, batch, eta = strategy.problem(model, tasks, 0), tasks.batch(), start(model)
    phi = {"loc": strategy.adapt(made, batch, eta).value["loc"].requires_grad_()}
    slopes = [
        float(
            torch.autograd.grad(made.losses(name, batch, 0)(phi, eta).sum(), phi["loc"])[0].norm()
        )
        for name in ("inner", "elbo")
    ]
    assert slopes[0] < 1e-8 < 1e-2 < slopes[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit is singular")  # which the best one is here
def test_the_fit_does_not_depend_on_where_a_predictor_is_counted_from() -> None:
    """Binary outcomes under (1 + dose | clinic): from the pooled fit L-BFGS went to a dose sd of 0
    here, 0.2 nats off.
    """
    rng = np.random.default_rng(2)
    tasks, centred = [], []
    for clinic in range(25):
        number = rng.integers(3, 41) if clinic else 1
        staff, intercept, slope = rng.normal(10, 3), rng.normal(0, 0.8), rng.normal(0, 0.01)
        age, dose = rng.normal(55, 12, number), rng.uniform(10, 90, number)
        logit = (
            -1.0 + 0.1 * (staff - 10) + intercept + 0.02 * (age - 55) + (0.02 + slope) * (dose - 46)
        )
        y = (rng.random(number) < expit(logit)).astype(float)
        for found, origin in ((tasks, 0.0), (centred, 46.0)):
            x = np.stack([age, dose - origin], -1)
            found.append(vm.Task((x, y), name=f"{clinic}", features={"staff": staff}))
    fits = []
    for found in (tasks, centred):
        prior = vm.GaussianPrior(learn_precision="full", covariates={"intercept": ["staff"]})
        model = vm.TaskModel(
            vm.LinearPredictor(["age", "dose"]), vm.likelihoods.Bernoulli(), prior, shared=["age"]
        )
        fits.append(vm.fit(model, vm.TaskSet(found, dtype=torch.float64), vm.Implicit("laplace")))
    assert fits[0].converged and fits[1].converged
    # L-BFGS claims no more of each than JUMP, on a singular optimum, which is flat
    assert fits[0].loss == pytest.approx(fits[1].loss, abs=2 * JUMP)
    for fit in fits:
        assert float(fit.prior.sd["dose"]) > 0.003
    # 2 JUMP nats apart, estimates may lie sqrt(4 JUMP) = 0.06 of their standard error apart, which
    # is 0.3 here (1 / sqrt(2 * 25 clinics) if slopes were seen, and outcomes are binary): half as
    # much again, since the optimum is flat
    log_sds = [float(fit.prior.sd["dose"].log()) for fit in fits]
    assert log_sds[0] == pytest.approx(log_sds[1], abs=1.5 * 0.3 * math.sqrt(4 * JUMP))
