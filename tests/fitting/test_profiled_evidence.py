"""The evidence as a function of the relative covariance: the same number as at the eta that it
stands for, and Newton's method on it against the iterated fit.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.cases import ragged_tasks
from tests.conftest import shared_data
from tests.linear_gaussian import REGRESSIONS, dense_evidence, moved
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.reduced import ReducedTasks
from varmeta.priors.check import LearnPrecision


def objective(model: vm.TaskModel, tasks: vm.TaskSet, eta: dict[str, Tensor]) -> ProfiledEvidence:
    linear = (*model.shared, *model.coefficients)
    reduced = ReducedTasks.of(model, tasks, linear)
    assert reduced is not None
    return ProfiledEvidence(model, reduced, eta, linear)


def loss(model: vm.TaskModel, eta: dict[str, Tensor], tasks: vm.TaskSet) -> float:
    return float(model.penalty(eta)) - float(dense_evidence(model, eta, tasks).sum())


@pytest.mark.parametrize("case", REGRESSIONS)
def test_it_is_the_evidence_at_the_best_places(case: str) -> None:
    model, tasks = REGRESSIONS[case]()
    eta = moved(model)
    found = objective(model, tasks, eta)
    point = found.enter(eta)
    best = found.leave(point)
    assert float(found(point)) == pytest.approx(loss(model, best, tasks), abs=1e-9)
    # what is not profiled comes back as it went in
    free = set(found.places) if found.profiles_places else set()
    for name in eta.keys() - free:
        torch.testing.assert_close(best[name], eta[name], rtol=1e-9, atol=1e-9)
    # and the places are the best ones
    generator = torch.Generator().manual_seed(0)
    for name in free:
        way = torch.randn(eta[name].shape, generator=generator, dtype=torch.float64)
        for step in (-0.01, 0.01):
            away = {**best, name: best[name] + step * way}
            assert loss(model, away, tasks) > loss(model, best, tasks)


@pytest.mark.parametrize("case", REGRESSIONS)
def test_the_fit_is_that_of_joint_newton_steps(case: str) -> None:
    model, tasks = REGRESSIONS[case]()
    exact = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    iterated = vm.fit(model, tasks, vm.Joint("multivariate_normal", minimizer=vm.Adam(1e-2)))
    assert exact.converged and "in closed form" in exact.stop
    assert "in closed form" not in iterated.stop
    assert exact.loss == pytest.approx(iterated.loss, abs=1e-8)
    assert exact.loss == pytest.approx(loss(model, exact.eta, tasks), abs=1e-8)
    for name, value in iterated.eta.items():
        torch.testing.assert_close(exact.eta[name], value, rtol=1e-4, atol=1e-4)
    if iterated.standard_errors is not None and model.prior.loc_hyperprior is None:
        assert exact.standard_errors is not None
        for name, value in iterated.standard_errors.items():
            torch.testing.assert_close(exact.standard_errors[name], value, rtol=1e-4, atol=1e-6)


def lines(shift: float, scale: float, seed: int = 0) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for size in range(5, 25):
        x = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        own = torch.randn(2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.5])
        y = 1.0 + own[0] + (2.0 + own[1]) * x[:, 0]
        y = y + 0.5 * torch.randn(size, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((shift + scale * x, y)))
    return vm.TaskSet(tasks)


def regression(learned: LearnPrecision = "full") -> vm.TaskModel:
    net = torch.nn.Linear(1, 1).double()
    with torch.no_grad():
        net.weight.zero_(), net.bias.zero_()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision=learned))


@pytest.mark.parametrize("shift", [0.0, 100.0, 2e3, 1e4, 1e6])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_origin_and_units_are_no_matter(shift: float, scale: float) -> None:
    plain = vm.fit(regression(), lines(0.0, 1.0))
    found = vm.fit(regression(), lines(shift * scale, scale))
    assert found.converged and found.run.step <= 15
    assert found.loss == pytest.approx(plain.loss, abs=1e-6)
    slope = float(found.prior.loc["weight"]) * scale
    assert slope == pytest.approx(float(plain.prior.loc["weight"]), rel=1e-5)


@pytest.mark.parametrize("learned", ["shared", "per_module", "per_parameter", "full"])
@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_an_sd_of_any_units_is_told_as_it_was_found(learned: LearnPrecision, scale: float) -> None:
    """What no sd may fall below is so many noise scales of a row, not of a weight."""
    model = regression(learned)
    tasks = lines(0.0, scale)
    found = vm.fit(model, tasks)
    assert found.converged
    assert found.loss == pytest.approx(loss(model, found.eta, tasks), abs=1e-6)
    if learned != "shared":  # which weighs the weights' units
        plain = vm.fit(regression(learned), lines(0.0, 1.0))
        assert found.loss == pytest.approx(plain.loss, abs=1e-6)


REAL = {
    "sleepstudy": ("Subject", "Days", "Reaction"),
    "hsb82": ("school", "cses", "mAch"),
    "dietox": ("Pig", "Time", "Weight"),
    "oxboys": ("Subject", "age", "height"),
}


def real(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = pd.read_csv(shared_data(name) / "data.csv")[list(REAL[name])].dropna()
    task, x, y = (table[column].to_numpy() for column in REAL[name])
    return task.astype(str), x.astype(float), y.astype(float)


def fit_columns(task: np.ndarray, y: np.ndarray, **columns: np.ndarray) -> vm.Fit:
    frame = pd.DataFrame({"task": task, "y": y, **columns})
    tasks = vm.TaskSet.from_frame(frame, task="task", x=list(columns), y="y")
    prior = vm.GaussianPrior(learn_precision="full")
    net = vm.LinearPredictor(list(columns)).double()
    return vm.fit(vm.TaskModel(net, vm.likelihoods.Gaussian(), prior), tasks)


@pytest.mark.parametrize("name", REAL)
def test_origin_and_units_of_real_columns_are_no_matter(name: str) -> None:
    task, x, y = real(name)
    plain = fit_columns(task, y, x=x)
    for scale in (1e-6, 1.0, 1e6):
        for shift in (0.0, 100.0, 2e3, 1e4, 1e6):
            found = fit_columns(task, y, x=scale * (x + shift))
            assert found.converged and found.run.step <= 15
            assert found.loss == pytest.approx(plain.loss, abs=1e-6, rel=0)


@pytest.mark.filterwarnings("ignore:the fit is singular")
@pytest.mark.parametrize("name", REAL)
def test_nearly_equal_columns_beside_real_ones(name: str) -> None:
    """x2 = x + 1e-8 e: the same model as in x and in what float64 keeps of e."""
    task, x, y = real(name)
    noise = np.random.default_rng(0).normal(size=len(x))
    near = x + 1e-8 * noise
    one, other = fit_columns(task, y, x=x, near=near), fit_columns(task, y, x=x, e=(near - x) * 1e8)
    assert one.converged and one.run.step <= 30
    assert one.loss == pytest.approx(other.loss, abs=1e-6, rel=0)


def test_nearly_equal_columns() -> None:
    """x2 = x1 + 1e-8 e: the same model as in x1 and e."""
    generator = torch.Generator().manual_seed(0)
    near, apart = [], []
    for size in range(6, 26):
        x, e = torch.randn(2, size, generator=generator, dtype=torch.float64)
        own = torch.randn(3, generator=generator, dtype=torch.float64)
        y = own[0] + (1.0 + own[1]) * x + (0.5 + own[2]) * e
        y = y + 0.3 * torch.randn(size, generator=generator, dtype=torch.float64)
        second = x + 1e-8 * e  # what float64 keeps of it is what both are fitted to
        near.append(vm.Task((torch.stack([x, second], -1), y)))
        apart.append(vm.Task((torch.stack([x, (second - x) * 1e8], -1), y)))

    def fit(tasks: list[vm.Task]) -> vm.Fit:
        net = vm.LinearPredictor(["a", "b"]).double()
        prior = vm.GaussianPrior(learn_precision="full")
        model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior)
        return vm.fit(model, vm.TaskSet(tasks))

    one, other = fit(near), fit(apart)
    assert one.converged and one.run.step <= 30
    assert one.loss == pytest.approx(other.loss, abs=1e-6)


def test_a_covariance_without_rank_is_reached_in_any_units() -> None:
    """Intercepts and slopes that are one number: a boundary point, from which steps lead nowhere
    lower; four units agree.
    """
    generator = torch.Generator().manual_seed(3)
    raw = []
    for size in range(5, 20):
        x = torch.rand(size, 1, generator=generator, dtype=torch.float64)
        own = torch.randn((), generator=generator, dtype=torch.float64)
        y = own * (1.0 + x[:, 0]) + 0.4 * torch.randn(
            size, generator=generator, dtype=torch.float64
        )
        raw.append((x, y))
    found = []
    for by_x, by_y in ((1.0, 1.0), (1e3, 1.0), (1e-3, 1e3), (1e5, 1e-4)):
        tasks = vm.TaskSet([vm.Task((x * by_x, y * by_y)) for x, y in raw])
        with pytest.warns(RuntimeWarning, match="singular"):
            fit = vm.fit(regression(), tasks)
        assert fit.converged and fit.run.step <= 30
        rows = sum(len(y) for _, y in raw)
        found.append(fit.loss - rows * math.log(by_y))
    assert max(found) - min(found) < 1e-8


def test_no_variance_between_tasks_is_reached() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = vm.TaskSet(
        [
            vm.Task((torch.zeros(8, 0), torch.randn(8, generator=generator, dtype=torch.float64)))
            for _ in range(12)
        ],
        dtype=torch.float64,
    )
    model = vm.TaskModel(
        vm.LinearPredictor([]).double(),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="shared"),
    )
    with pytest.warns(RuntimeWarning, match="runs away"):
        fit = vm.fit(model, tasks)
    y = torch.cat([task.support[1] for task in tasks])  # type: ignore[index]
    pooled = torch.distributions.Normal(y.mean(), y.std(correction=0)).log_prob(y).sum()
    assert fit.converged and fit.run.step <= 30
    assert fit.loss == pytest.approx(-float(pooled), abs=1e-6)


def test_float32_data_give_the_fit_of_float64() -> None:
    model, tasks = REGRESSIONS["full"]()
    wide = vm.fit(model, tasks.to(torch.float32).to(torch.float64))
    narrow = vm.fit(model, tasks.to(torch.float32))
    assert narrow.eta["log_scale"].dtype == torch.float32
    assert narrow.loss == pytest.approx(wide.loss, abs=1e-6)


def test_collinear_columns_go_another_way() -> None:
    tasks = vm.TaskSet(
        [
            vm.Task((torch.cat([task.support[0]] * 2, -1), task.support[1]))  # type: ignore[index]
            for task in ragged_tasks(8)
        ]
    )
    model = vm.TaskModel(
        vm.LinearPredictor(["a", "b"]).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )
    with pytest.warns(RuntimeWarning, match="hardly tell a and b apart"):
        fit = vm.fit(model, tasks)
    assert "in closed form" not in fit.stop
    assert fit.loss == pytest.approx(loss(model, fit.eta, tasks), abs=1e-6)


def test_a_run_that_is_cut_short_goes_on() -> None:
    model, tasks = REGRESSIONS["full"]()
    short = vm.fit(model, tasks, num_steps=2)
    whole, resumed = vm.fit(model, tasks), vm.fit(model, tasks, resume=short, num_steps=200)
    assert not short.converged and resumed.converged
    assert resumed.run.step > 2
    assert resumed.loss == pytest.approx(whole.loss, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "group", "x", "y", "want"),
    [
        ("sleepstudy", "Subject", ["Days"], "Reaction", -875.9696722316),
        ("hsb82", "school", ["cses"], "mAch", None),
    ],
)
def test_lme4(name: str, group: str, x: list[str], y: str, want: float | None) -> None:
    import json

    import pandas as pd

    folder = shared_data(name)
    frame = pd.read_csv(folder / "data.csv")
    if want is None:
        fits = json.loads((folder / "reference.json").read_text())["fits"]
        (want,) = (fit["logLik"] for fit in fits.values() if fit["method"] == "ML (lmer)")
    model = vm.TaskModel(
        vm.LinearPredictor(x), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
    )
    fit = vm.fit(model, vm.TaskSet.from_frame(frame, task=group, x=x, y=y))
    assert fit.log_likelihood == pytest.approx(want, abs=1e-5)
    assert fit.run.step <= 15


@pytest.mark.parametrize("scale", [1e-8, 1e-12])
def test_a_total_in_whose_rounding_the_prior_drowns_is_not_converged(scale: float) -> None:
    """A known noise 1e7 times too small: sds 3 to 1e4 times too small were told as converged,
    "it can rise by 19 nats more"."""
    noise = vm.likelihoods.Gaussian(scale, learn_scale=False)
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel(vm.LinearPredictor(["x"]).double(), noise, prior)
    with pytest.warns(RuntimeWarning, match="the fit has not converged"):
        fit = vm.fit(model, lines(0.0, 1.0))
    assert not fit.converged
