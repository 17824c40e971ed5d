"""theta0 that is held fixed: a random effect without a fixed effect, under every strategy; and a
start that stays.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import Tensor

import varmeta as vm
from varmeta.fitting.baselines import baseline
from varmeta.fitting.pooled_start import pooled_start


def tasks(query: bool = False) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for i in range(15):
        x = draw(7, 1)
        y = 1.5 + 0.4 * draw(1) + (0.7 + 0.8 * draw(1)) * x[:, 0] + 0.3 * draw(7)
        found.append(vm.Task((x[:5], y[:5]), (x[5:], y[5:]) if query else None, name=f"task {i}"))
    return vm.TaskSet(found, x_names=("x",))


def model(
    learn_loc: Any = ("intercept",), learn: str | None = "per_parameter", loc: Any = None
) -> vm.TaskModel:
    prior = vm.GaussianPrior(1.0 if learn is None else None, learn, learn_loc=learn_loc, loc=loc)
    return vm.TaskModel(vm.LinearPredictor(["x"]).double(), vm.likelihoods.Gaussian(), prior)


def marginal(
    intercept: float, slope: float, sds: np.ndarray, noise: float, given: vm.TaskSet | None = None
) -> float:
    """-log p(y) with the weights integrated out, by scipy."""
    total = 0.0
    for task in given or tasks():
        x, y = (value.numpy() for value in task.support)
        design = np.stack([np.ones(len(x)), x[:, 0]], -1)
        covariance = design @ np.diag(sds**2) @ design.T + noise**2 * np.eye(len(x))
        total -= multivariate_normal(design @ np.array([intercept, slope]), covariance).logpdf(y)
    return total


@pytest.mark.parametrize("learn_loc", [("intercept",), False])
def test_tasks_of_unequal_sizes(learn_loc: Any) -> None:
    """Padded tasks are checked at theta0, also where it is held; the evidence is scipy's."""
    ragged = vm.TaskSet(
        [
            vm.Task((t.support[0][: 2 + i % 4], t.support[1][: 2 + i % 4]), name=t.name)
            for i, t in enumerate(tasks())
        ],
        x_names=("x",),
    )
    found = vm.fit(model(learn_loc), ragged, vm.Joint("multivariate_normal"))
    loc, sds = (
        [float(values[name]) for name in ("intercept", "x")]
        for values in (found.prior.loc, found.prior.sd)
    )
    exact = marginal(*loc, np.array(sds), float(found.prior.scale), ragged)
    assert abs(found.loss - exact) <= 1e-6


@pytest.mark.parametrize(
    ("learn_loc", "at"), [(("intercept",), 0.0), (("intercept",), 0.25), (False, 0.0)]
)
def test_the_exact_marginal_likelihood_with_theta0_given(learn_loc: Any, at: float) -> None:
    found = vm.fit(model(learn_loc, loc={"x": at}), tasks(), vm.Joint("multivariate_normal"))
    assert found.converged
    free = learn_loc is not False

    def loss(v: np.ndarray) -> float:
        return marginal(v[3] if free else 0.0, at, np.exp(v[:2]), float(np.exp(v[2])))

    best = minimize(loss, np.zeros(4 if free else 3), method="BFGS", options={"gtol": 1e-6})
    assert abs(found.loss - best.fun) <= 1e-6
    sds = torch.cat([found.prior.sd[name].reshape(-1) for name in ("intercept", "x")])
    assert torch.allclose(sds, torch.from_numpy(np.exp(best.x[:2])), rtol=1e-4)
    assert float(found.prior.loc["x"]) == at
    assert free == ("intercept" in found.eta)
    # and it is another fit than that with theta0 learned
    assert vm.fit(model(True), tasks(), vm.Joint("multivariate_normal")).loss < found.loss - 0.01


STRATEGIES = {
    "joint": vm.Joint("normal"),
    "joint, points": vm.Joint("delta"),
    "reinit": vm.Reinit("normal", every=5),
    "implicit": vm.Implicit("multivariate_normal"),
    "laplace": vm.Implicit("laplace"),
    "imaml": vm.Implicit(outer="query"),
    "unrolled": vm.Unrolled(inner_steps=2),
    "fomaml": vm.FirstOrder(inner_steps=2),
    "reptile": vm.Reptile(inner_steps=2),
}


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_leaves_it_where_it_is(name: str, optimizer: Any) -> None:
    data = tasks(query=True)
    found = vm.fit(
        model(learn=None, loc={"x": 0.25}),
        data,
        STRATEGIES[name],
        num_steps=3,
        optimizer=optimizer,
        compile=False,
    )
    assert float(found.prior.loc["x"]) == 0.25
    assert "x" not in found.eta
    assert float(found.prior.loc["intercept"]) != 0.0
    nothing = vm.TaskSet(
        [vm.Task((torch.zeros(0, 1), torch.zeros(0)), name="new")],
        dtype=torch.float64,
        x_names=("x",),
    )
    assert float(found.adapt(nothing).mean["x"]) == 0.25


@pytest.mark.parametrize("hyperguide", ["normal", "multivariate_normal", "reml"])
def test_hyperguides_leave_it_where_it_is(hyperguide: str) -> None:
    found = vm.fit(model(), tasks(), hyperguide=hyperguide)
    assert float(found.prior.loc["x"]) == 0.0
    assert float(found.standard_errors["intercept"]) > 0.0
    assert "x" not in found.standard_errors
    assert float(found.posterior().predict(torch.zeros(1, 1)).samples.std()) > 0.0
    if hyperguide != "reml":
        assert float(found.hyperparameters().loc["x", "sd"]) == 0.0


def test_all_of_theta0_held_under_a_hyperguide() -> None:
    found = vm.fit(model(False), tasks(), hyperguide="multivariate_normal")
    assert found.posterior().sample(10)["x"].shape[0] == 10
    assert float(found.hyperparameters().loc["intercept", "sd"]) == 0.0
    found.to_arviz(50)
    with pytest.raises(ValueError, match="nothing to integrate over"):
        vm.fit(model(False), tasks(), hyperguide="reml")


def test_it_is_said_in_the_table_and_kept_in_files(tmp_path: Path) -> None:
    found = vm.fit(model(), tasks(), vm.Joint("multivariate_normal"))
    (line,) = [line for line in str(found).splitlines() if line.startswith("x ")]
    assert line.endswith("(theta0 fixed)")
    assert len(line.replace("(theta0 fixed)", "").split()) == 3  # no standard error
    found.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", model())
    assert float(again.prior.loc["x"]) == 0.0
    for other in (model(True), model(loc={"x": 1.0})):
        with pytest.raises(ValueError, match="learn_loc|loc|eta|weights"):
            vm.load(tmp_path / "fit", other)
        with pytest.raises(ValueError, match="resume is a fit"):
            vm.fit(other, tasks(), vm.Joint("multivariate_normal"), num_steps=500, resume=found)
    scaled, scaling = tasks().standardized()
    raw = scaling.raw_prior(vm.fit(model(), scaled, vm.Joint("multivariate_normal")))
    assert float(raw.loc["x"]) == 0.0
    assert set(vm.meta_gradient(model(), tasks(), vm.Joint("normal")).grads) == {
        "intercept", "log_precision.intercept", "log_precision.x", "log_scale"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: model(("intercept", "age")), ValueError, "learn_loc names 'age'.*intercept"),
        (lambda: vm.GaussianPrior(learn_loc="x"), TypeError, "list of parameter names"),
        (lambda: vm.GaussianPrior(learn_loc=0), TypeError, "list of parameter names"),
        (
            lambda: vm.TaskModel(
                vm.LinearPredictor(["x"]),
                vm.likelihoods.Gaussian(1.0, learn_scale=False),
                vm.GaussianPrior(1.0, learn_loc=False),
            ),
            ValueError,
            "nothing to learn",
        ),
        (
            lambda: vm.TaskModel(
                vm.LinearPredictor(["x"]),
                vm.likelihoods.Gaussian(),
                vm.GaussianPrior(
                    1.0, learn_loc=False, loc_hyperprior={"x": torch.distributions.Normal(0.0, 1.0)}
                ),
            ),
            ValueError,
            "learn_loc holds fixed",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_loc_that_is_learned_starts_where_it_was_given() -> None:
    """The pooled start moves what the user said nothing about: the intercept and the noise, given
    the slope.
    """
    one, data = model(True, loc={"x": 7.0}), tasks()
    batch = data.batch()
    start = pooled_start(
        vm.Joint("normal").problem(one, data, 0), batch, one.init(batch.support.x.new_zeros(()))
    )
    assert float(start["x"]) == 7.0
    left = batch.support.y - 7.0 * batch.support.x[..., 0]
    assert abs(float(start["intercept"]) - float(left.mean())) <= 1e-6
    assert abs(float(start["log_scale"].exp()) - float(left.std(correction=0))) <= 1e-6
    found = vm.fit(one, data, vm.Joint("multivariate_normal"))
    assert abs(found.loss - vm.fit(model(True), data, vm.Joint("multivariate_normal")).loss) <= 1e-6


@pytest.mark.parametrize("learn_loc", [("intercept",), False])
def test_a_dense_prior_with_theta0_given(learn_loc: Any) -> None:
    """`(1 + x | g)` without one fixed effect, or both: the maximum of scipy's marginal
    likelihood.
    """
    found = vm.fit(model(learn_loc, "full"), tasks(), vm.Joint("multivariate_normal"))
    assert found.converged
    assert float(found.prior.loc["x"]) == 0.0
    free = learn_loc is not False
    pairs = [tuple(value.numpy() for value in task.support) for task in tasks()]

    def loss(v: np.ndarray) -> float:
        factor = np.array([[np.exp(v[0]), 0.0], [v[1], np.exp(v[2])]])
        mean, total = np.array([v[4] if free else 0.0, 0.0]), 0.0
        for x, y in pairs:
            design = np.stack([np.ones(len(x)), x[:, 0]], -1)
            covariance = design @ factor @ factor.T @ design.T + np.exp(2 * v[3]) * np.eye(len(x))
            total -= multivariate_normal(design @ mean, covariance).logpdf(y)
        return total

    best = minimize(loss, np.zeros(5 if free else 4), method="BFGS", options={"gtol": 1e-6})
    assert abs(found.loss - best.fun) <= 1e-6
    assert found.log_likelihood == pytest.approx(-best.fun, abs=1e-6)


@pytest.mark.parametrize("learn_loc", [False, ("intercept",), True])
def test_the_pooled_baseline_fits_all_weights(learn_loc: Any) -> None:
    """One set of weights for all tasks is least squares, whatever of theta0 the model holds; held
    at 0 it predicted 0.
    """
    x, y = (torch.cat([task.support[part] for task in tasks()]) for part in (0, 1))
    design = torch.cat([torch.ones_like(x), x], 1)
    exact = torch.linalg.lstsq(design, y.unsqueeze(-1)).solution.flatten()
    alone, pooled = baseline("pooled", model(learn_loc), tasks(), [])
    loc = vm.fit(alone, tasks(), pooled).prior.loc
    assert torch.allclose(
        torch.stack([loc["intercept"].reshape(()), loc["x"].reshape(())]), exact, atol=1e-5
    )
