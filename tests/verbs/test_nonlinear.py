"""Nonlinear programs: truth recovered, gradients, evidence by quadrature, and what a bad start is
told.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from experiments.mixed_models.sets import reference, table
from experiments.nonlinear import (
    CASES,
    absorption,
    beside_nlme,
    fitted,
    log_logistic,
    main,
    quadrature,
)
from tests.cases import scalar_program
from tests.conftest import shared_data
from varmeta.fitting.pooled_start import pooled_start

TRUTH = {"lKe": -2.45, "lKa": 0.45, "lCl": -3.2}
SDS = {"lKe": 0.15, "lKa": 0.5, "lCl": 0.25}
NOISE = 0.3
TIMES = [0.25, 0.5, 1.0, 2.0, 4.0, 7.0, 12.0, 24.0]


def real(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def subjects(number: int, seed: int = 0) -> vm.TaskSet:
    """Simulated from the program; every third without its last two times, so that there is
    padding.
    """
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for i in range(number):
        time = torch.tensor(TIMES[: 6 if i % 3 == 2 else 8], dtype=torch.float64)
        x = torch.stack([torch.full_like(time, 3.0 + i % 4), time], -1)
        draws = torch.randn(3, generator=generator, dtype=torch.float64)
        params = {n: real(TRUTH[n]) + SDS[n] * z for n, z in zip(TRUTH, draws, strict=True)} | {
            "log_sd": real(-50.0)
        }
        with torch.random.fork_rng():
            mean = absorption(params, x, None)
        y = mean + NOISE * torch.randn(len(time), generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((x, y), name=f"subject {i}"))
    return vm.TaskSet(tasks)


def pharmacokinetics(prior: vm.GaussianPrior) -> vm.TaskModel:
    start = {"lKe": real(-2.0), "lKa": real(0.0), "lCl": real(-3.0), "log_sd": real(0.0)}
    return vm.TaskModel.from_pyro(absorption, start, prior, shared=["log_sd"])


def test_truth_is_recovered() -> None:
    number = 60
    tasks = subjects(number)
    model = pharmacokinetics(vm.GaussianPrior(learn_precision="per_parameter"))
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), compile=False)
    assert fit.converged and fit.standard_errors is not None
    for name, true in TRUTH.items():
        assert abs(float(fit.prior.loc[name]) - true) <= 3 * float(fit.standard_errors[name]), name
        # an sd that is known without error from n tasks has a relative error of 1 / sqrt(2 n)
        assert float(fit.prior.sd[name]) == pytest.approx(
            SDS[name], rel=4 / math.sqrt(2 * number)
        ), name
    rows = sum(len(task.support[1]) for task in tasks if task.support)
    assert float(fit.prior.shared["log_sd"].exp()) == pytest.approx(
        NOISE, rel=4 / math.sqrt(2 * rows - 6 * number)
    )
    # a guide can do no better than the posterior: the bound lies below the log likelihood, here by
    # little
    posterior = fit.posterior()
    exact, again = quadrature(posterior), quadrature(posterior, 21)
    assert torch.allclose(exact, again, atol=1e-6)
    found = posterior.diagnose(num_samples=2000)
    assert 0.0 < float(exact.sum()) + fit.loss < 0.1 * number
    assert (abs(found["evidence"] - exact.numpy()) <= 4 * found["se"] + 5e-3).all()
    assert set(found["reading"][found["ess"] >= 1900]) <= {"good", "usable"}


@pytest.mark.parametrize(
    "strategy",
    [vm.Implicit("multivariate_normal"), vm.Implicit("laplace")],
    ids=["dense", "laplace"],
)
def test_gradients_are_those_of_the_problem_solved_anew(strategy: vm.Implicit) -> None:
    tasks, model = subjects(3), pharmacokinetics(vm.GaussianPrior(learn_precision="full"))
    eta = model.init(real(0.0)) | {n: real(v) for n, v in TRUTH.items()}
    eta |= {
        "log_sd": real(-1.0),
        "log_precision": torch.tensor([4.0, 1.5, 2.5], dtype=torch.float64),
    }
    eta["prior_tril"] = torch.tensor([0.2, 0.5, -0.1], dtype=torch.float64)
    grads = vm.meta_gradient(model, tasks, strategy, eta=eta).grads
    step = 1e-4
    for name, index in (
        ("lKa", 0),
        ("lCl", 0),
        ("log_sd", 0),
        ("log_precision", 1),
        ("prior_tril", 1),
    ):
        values = []
        for side in (2, 1, -1, -2):
            moved = eta[name].clone()
            moved.reshape(-1)[index] += side * step
            values.append(
                float(vm.meta_gradient(model, tasks, strategy, eta=eta | {name: moved}).value)
            )
        # of fourth order: its own error is about 1e-13 / step = 1e-9
        found = (8 * (values[1] - values[2]) - (values[0] - values[3])) / (12 * step)
        assert float(grads[name].reshape(-1)[index]) == pytest.approx(found, rel=1e-6, abs=1e-6), (
            name
        )


def test_padding_counts_for_nothing() -> None:
    """Two subjects of other lengths together, and each on its own."""
    tasks = subjects(3)[1:]
    model = pharmacokinetics(vm.GaussianPrior(precision=10.0))
    strategy = vm.Implicit("multivariate_normal")
    together = vm.meta_gradient(model, tasks, strategy)
    alone = [vm.meta_gradient(model, tasks[i : i + 1], strategy) for i in range(2)]
    assert float(together.value) == pytest.approx(
        sum(float(part.value) for part in alone), rel=1e-12
    )


# -- starts ----------------------------------------------------------------------------------------


def test_a_start_where_the_program_divides_by_zero_is_named() -> None:
    model = vm.TaskModel.from_pyro(
        absorption, {"lKe": (), "lKa": (), "lCl": (), "log_sd": ()}, shared=["log_sd"]
    )
    with pytest.raises(
        ValueError,
        match=r"task 'subject 0', row 0: loc of Normal is nan .*lKe = 0.* tensors in params",
    ):
        vm.fit(model, subjects(3), compile=False)


def _two_responses(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    loc = params["loc"] + x
    scale = params["scale"].unsqueeze(-1)
    return pyro.sample("y", dist.Normal(torch.stack([loc, loc], -1), scale).to_event(1), obs=y)


def test_a_scale_of_zero_at_the_start_is_named() -> None:
    tasks = vm.TaskSet(
        [vm.Task(([0.0], [[1.0, 2.0]])), vm.Task(([0.0, 1.0], [[1.0, 2.0], [2.0, 3.0]]))]
    )
    model = vm.TaskModel.from_pyro(_two_responses, {"loc": (), "scale": ()}, shared=["scale"])
    with pytest.raises(
        ValueError,
        match="row 0: scale of Normal is 0, 0 where the fit would start .loc = 0, scale = 0",
    ):
        vm.fit(model, tasks, compile=False)


def growth(start: dict[str, float]) -> tuple[vm.TaskModel, vm.TaskSet]:
    """Logistic curves of 12 points, by a program with a wide plateau."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(0.0, 24.0, 2.0, dtype=torch.float64)
    tasks = []
    for _ in range(20):
        z = torch.randn(2, generator=generator, dtype=torch.float64)
        mean = (5.5 + 0.4 * z[0]).exp() * torch.sigmoid((time - 12.0 - 3.0 * z[1]) / 6.0)
        tasks.append(
            vm.Task((time, mean + 5.0 * torch.randn(12, generator=generator, dtype=torch.float64)))
        )
    shared = ["log_scal", "log_sd"]
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel.from_pyro(
        log_logistic, {name: real(v) for name, v in start.items()}, prior, shared=shared
    )
    return model, vm.TaskSet(tasks)


NAMES = ("log_Asym", "xmid", "log_scal", "log_sd")


def test_logistic_curves_from_zeros() -> None:
    """Neither units nor signs of the start are near; the pooled fit finds the way."""
    near = vm.fit(
        *growth(dict(zip(NAMES, (5.0, 10.0, 1.0, 2.0), strict=True))),
        vm.Joint("multivariate_normal"),
    )
    far = vm.fit(*growth(dict.fromkeys(NAMES, 0.0)), vm.Joint("multivariate_normal"))
    assert near.converged and far.converged
    assert far.loss == pytest.approx(near.loss, abs=1e-6)
    assert float(near.prior.loc["xmid"]) == pytest.approx(12.0, abs=3 * 3.0 / math.sqrt(20))


def test_a_start_on_a_plateau_is_named() -> None:
    """A step 50 days before the first row, where no derivative leads back."""
    with pytest.warns(RuntimeWarning) as caught:
        vm.fit(
            *growth(dict(zip(NAMES, (5.0, -50.0, -1.0, 2.0), strict=True))),
            vm.Joint("multivariate_normal"),
        )
    assert any("the data say nothing about xmid" in str(item.message) for item in caught)


def test_a_pooled_fit_that_runs_onto_a_plateau_is_not_used() -> None:
    """Chicks from zeros: the step slides below all data, and a fit from there ended at -4.7e169 and
    called that converged.
    """
    shared_data("chickweight")
    model, tasks = CASES[3].model(dict.fromkeys(NAMES, 0.0)), CASES[3].tasks()
    with pytest.warns(RuntimeWarning) as caught:
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), num_steps=60, compile=False)
    said = [str(item.message) for item in caught]
    assert any("the data say nothing about xmid" in sentence for sentence in said)
    assert not fit.converged and abs(float(fit.prior.loc["xmid"])) < 1e6


def test_a_line_search_that_is_stuck_at_a_jump_has_not_converged() -> None:
    """Tasks whose loss has several minima: which one is found depends on theta0, and the objective
    jumps.
    """
    generator = torch.Generator().manual_seed(6)
    tasks = []
    for _ in range(3):
        x = 3 * torch.randn(6, 1, generator=generator, dtype=torch.float64)
        w = 1.5 * torch.randn((), generator=generator, dtype=torch.float64)
        y = torch.sin(w * x[:, 0]) + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((x[:3], y[:3]), (x[3:], y[3:])))
    start = {"w": real(0.4), "log_sd": real(-0.3)}
    model = vm.TaskModel.from_pyro(scalar_program, start, vm.GaussianPrior(1.0), shared=["log_sd"])
    with pytest.warns(RuntimeWarning, match="its gradient promises .* nats: it jumps"):
        fit = vm.fit(model, vm.TaskSet(tasks), vm.Implicit("delta", outer="query"), compile=False)
    assert not fit.converged
    assert fit.history["gradient_norm"].iloc[-1] > 1.0


def raw_logistic(params: dict[str, Tensor], time: Tensor, y: Tensor | None) -> Tensor:
    """As one writes it by hand: the exponential overflows, and derivatives are lost, where scal is
    near 0.
    """
    mean = params["asym"] / (1 + (-(time - params["xmid"]) / params["scal"]).exp())
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


RAW_START = {"asym": 250.0, "xmid": 10.0, "scal": 5.0, "log_sd": 2.0}


def raw_growth(start: dict[str, float], learn_precision: str) -> tuple[vm.TaskModel, vm.TaskSet]:
    """30 curves whose three parameters all vary, on their own scales."""
    generator = torch.Generator().manual_seed(0)
    time, tasks = torch.arange(0.0, 22.0, 2.0, dtype=torch.float64), []
    for i in range(30):
        z = torch.randn(3, generator=generator, dtype=torch.float64)
        mean = (300 + 60 * z[0]) * torch.sigmoid((time - 12 - 2 * z[1]) / (6 + 0.8 * z[2]))
        noise = 8 * torch.randn(11, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((time, mean + noise), name=f"animal {i}"))
    prior = vm.GaussianPrior(learn_precision=learn_precision)  # type: ignore[arg-type]
    params = {name: real(value) for name, value in start.items()}
    return vm.TaskModel.from_pyro(raw_logistic, params, prior, shared=["log_sd"]), vm.TaskSet(tasks)


def check_bound(fit: vm.Fit) -> float:
    """The bound lies below the log likelihood by quadrature, by little; that log likelihood."""
    posterior = fit.posterior()
    exact, again = quadrature(posterior), quadrature(posterior, 11)
    assert torch.allclose(exact, again, atol=0.05)
    # 25 points of cubature are not exact for such curves
    assert -0.1 * len(fit.tasks) < float(exact.sum()) + fit.loss < 0.2 * len(fit.tasks)
    return float(exact.sum())


@pytest.mark.parametrize("learn_precision", ["per_parameter", "full"])
def test_a_curve_whose_scale_varies_is_fitted_in_its_own_units(
    learn_precision: str, recwarn: pytest.WarningsRecorder
) -> None:
    """The prior that one observation's information gives reaches scal = 0."""
    fit = vm.fit(
        *raw_growth(RAW_START, learn_precision), vm.Joint("multivariate_normal"), compile=False
    )
    assert fit.converged and fit.standard_errors is not None and not recwarn.list
    for name, true in {"asym": 300.0, "xmid": 12.0, "scal": 6.0}.items():
        assert abs(float(fit.prior.loc[name]) - true) <= 3 * float(fit.standard_errors[name]), name
    check_bound(fit)


def test_chicks_whose_scale_varies_too_beside_nlme() -> None:
    """nlme's estimates, where Asym and xmid vary, as the start; that model is this one at prior
    sd(scal) = 0.
    """
    shared_data("chickweight")
    there = reference("chickweight", "reference.json")["fits"]["logistic_ML"]
    rows: dict[str, list[tuple[float, float]]] = {}
    for row in table("chickweight").itertuples():
        rows.setdefault(str(row.Chick), []).append((row.Time, row.weight))
    tasks = vm.TaskSet(
        [vm.Task(torch.tensor(rows[k], dtype=torch.float64).unbind(-1), name=k) for k in rows]
    )
    begin = dict(zip(("asym", "xmid", "scal"), map(real, there["fixed"]["estimate"]), strict=True))
    begin["log_sd"] = real(there["sigma"]).log()
    model = vm.TaskModel.from_pyro(
        raw_logistic, begin, vm.GaussianPrior(learn_precision="per_parameter"), shared=["log_sd"]
    )
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), compile=False)
    assert fit.converged
    assert there["logLik"] < -fit.loss < check_bound(fit)
    # Laplace's evidence at its own optimum, which 40 seconds find
    assert fit.loss == pytest.approx(2147.574, abs=0.1 * len(tasks))


def test_a_program_that_does_not_bend_starts_at_the_information_of_one_observation() -> None:
    """y = a + b x with noise of sd 2: that information is the mean of (1, x)'(1, x) / 4."""

    def line(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        return pyro.sample("y", dist.Normal(params["a"] + params["b"] * x, 2.0), obs=y)

    x = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    tasks = vm.TaskSet([vm.Task((x, 100 + 7 * x + shift)) for shift in (-1.0, 0.0, 2.0)])
    model = vm.TaskModel.from_pyro(
        line, {"a": (), "b": ()}, vm.GaussianPrior(learn_precision="full")
    )
    start = pooled_start(
        vm.Joint("multivariate_normal").problem(model, tasks, 0), tasks.batch(), model.init(x)
    )
    information = torch.tensor([[1.0, 4 / 3], [4 / 3, 10 / 3]], dtype=torch.float64) / 4
    covariance = model.prior_distribution(start).covariance_matrix.squeeze()
    torch.testing.assert_close(covariance, torch.linalg.inv(information), rtol=1e-6, atol=1e-6)


def test_a_weight_that_ran_off_is_named() -> None:
    """From zeros with scal = 1 the step slides to where the curve is an exponential, and so for
    ever.
    """
    zeros = {"asym": 0.0, "xmid": 0.0, "scal": 1.0, "log_sd": 0.0}
    with pytest.warns(
        RuntimeWarning,
        match=r"xmid = -[\d.]+e\+\d+, scal = .* ran off, far beyond any number in the data",
    ):
        vm.fit(
            *raw_growth(zeros, "per_parameter"),
            vm.Joint("multivariate_normal"),
            num_steps=5,
            compile=False,
        )


# -- theophylline ----------------------------------------------------------------------------------


def test_theophylline_beside_nlme() -> None:
    """nlme linearises, so its estimates are a little off the likelihood's maximum: ours has the
    higher log likelihood.
    """
    shared_data("theoph")
    fit, said = fitted(CASES[0], "dense")
    assert fit.converged and not said
    rows = {row["quantity"]: row for row in beside_nlme(CASES[0], {"dense": fit})}
    assert fit.standard_errors is not None
    for name in ("lKa", "lCl", "lKe"):
        assert abs(rows[name]["dense"] - rows[name]["nlme"]) <= 0.1 * float(
            fit.standard_errors[name]
        ), name
    for name in ("sd(lKa)", "sd(lCl)", "noise scale"):
        assert rows[name]["dense"] == pytest.approx(rows[name]["nlme"], rel=0.03), name
    assert rows["log likelihood"]["dense"] > rows["log likelihood"]["nlme"]
    # what nlme reports is a linearised model's likelihood, not that of its estimates
    assert rows["reported"]["nlme"] > rows["log likelihood"]["nlme"] + 0.5


def test_the_experiment_in_smoke_size(tmp_path: Path) -> None:
    shared_data("theoph")
    main(["--out", str(tmp_path), "--size", "smoke"])
    found = pd.read_csv(tmp_path / "fits.csv")
    assert len(found) == 2 and found["converged"].all()
    # two routes to the log likelihood
    assert (abs(found["quadrature"] - found["importance"]) <= 4 * found["se"]).all()
    assert {"theoph.png", "chickweight.png", "quantities.csv", "starts.csv"} <= {
        path.name for path in tmp_path.iterdir()
    }
