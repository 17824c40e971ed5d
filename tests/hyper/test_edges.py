"""Hyperpriors whose support has an edge: the mode may lie on it, the posterior never does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.hyper.test_integrate import one_way_data, one_way_tasks
from varmeta.fitting.pooled_start import pooled_start
from varmeta.hyper.bounds import Bounds
from varmeta.hyper.coordinates import Coordinates
from varmeta.models.hyper_posterior import natural
from varmeta.models.model import TaskModel

F64 = torch.float64


def log_sd(high: float) -> Any:
    """Of log sd, where sd is uniform below `high`: it rises all the way to its edge."""
    return dist.TransformedDistribution(
        dist.Uniform(0.0, high), [dist.transforms.ExpTransform().inv]
    )


def crossed(groups: int, high: float) -> TaskModel:
    """y_ig = b_i + sd_a z_g + noise: the second grouping's effects are shared, standardised."""

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        mean = params["b"] + params["log_sd_a"].exp() * (x * params["z"]).sum(-1)
        return pyro.sample("y", dist.Normal(mean, params["log_noise"].exp()), obs=y)

    densities = {
        "b": dist.Normal(0.0, 3.0),
        "z": dist.Normal(0.0, 1.0),
        "log_sd_a": log_sd(high),
        "log_noise": log_sd(high),
    }
    params: dict[str, Any] = {"b": (), "z": (groups,)} | dict.fromkeys(
        ["log_sd_a", "log_noise"], torch.tensor(-1.0)
    )
    prior = vm.GaussianPrior(
        learn_precision="shared", scale_hyperprior=dist.Uniform(0.0, high), loc_hyperprior=densities
    )
    return TaskModel.from_pyro(program, params, prior, shared=["z", "log_sd_a", "log_noise"])


def crossed_tasks(y: np.ndarray) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((np.eye(y.shape[1]), row)) for row in y]).to(dtype=F64)


def crossed_data() -> np.ndarray:
    rng = np.random.default_rng(2)
    between = 0.5 + 0.6 * rng.normal(size=(5, 1)) + 0.1 * rng.normal(size=2)
    return between + 0.3 * rng.normal(size=(5, 2))


def crossed_by_hand(y: np.ndarray, high: float) -> dict[str, tuple[float, float]]:
    """Mean and sd of the three sds: effects integrated out in closed form, the sds on a grid."""
    number, groups = y.shape
    # midpoints, to the edge
    a, b, e = (((torch.arange(n) + 0.5) / n * high).to(F64) for n in (60, 60, 60))
    of_group = torch.kron(torch.ones(number, number), torch.eye(groups)).to(F64)
    of_task = torch.kron(torch.eye(number), torch.ones(groups, groups)).to(F64)
    flat, log_p = torch.tensor(y.reshape(-1), dtype=F64), []
    for one in a:
        two, noise = (part.reshape(-1, 1, 1) for part in torch.meshgrid(b, e, indexing="ij"))
        covariance = 9.0 + one**2 * of_group + two**2 * of_task
        covariance = covariance + noise**2 * torch.eye(len(flat), dtype=F64)
        log_p.append(dist.MultivariateNormal(torch.zeros_like(flat), covariance).log_prob(flat))
    p = torch.stack(log_p).reshape(60, 60, 60)
    p = (p - p.max()).exp() / (p - p.max()).exp().sum()
    found = {}
    for name, value, others in (("sd_a", a, (1, 2)), ("sd(b)", b, (0, 2)), ("noise", e, (0, 1))):
        share = p.sum(others)
        mean = float((share * value).sum())
        found[name] = (mean, math.sqrt(float((share * (value - mean) ** 2).sum())))
    return found


def test_crossed_effects_meet_their_grid() -> None:
    """The mode has log_sd_a at the edge of its support and z at 0.  From there the Gaussian had no
    finite bound, "converged" at infinity, and 2 draws carried weight.
    """
    y, high = crossed_data(), 1.5
    fit = vm.fit(
        crossed(2, high), crossed_tasks(y), hyperguide="multivariate_normal", progress=False
    )
    assert fit.hyper is not None and fit.converged and math.isfinite(fit.loss)
    draws, weight = natural(fit.model, fit.hyper.points), fit.hyper.log_weights.exp()
    values = {"sd(b)": draws["sd(b)"]} | {
        name: draws[f"log_{name}"].exp() for name in ("sd_a", "noise")
    }
    for name, (mean, sd) in crossed_by_hand(y, high).items():
        own = float((weight * values[name]).sum())
        own_sd = math.sqrt(float((weight * (values[name] - own) ** 2).sum()))
        # some 2,000 effective draws: three to four standard errors
        assert own == pytest.approx(mean, abs=0.1 * sd), (name, own, mean, sd)
        assert own_sd == pytest.approx(sd, rel=0.1), (name, own_sd, sd)


def test_the_pooled_start_leaves_an_edge() -> None:
    """log_sd_a was within 5e-6 of it, where nothing is learned from its surroundings."""
    model, tasks = crossed(2, 1.5), crossed_tasks(crossed_data())
    problem, batch = vm.Joint("multivariate_normal").problem(model, tasks, 0), tasks.batch()
    eta = pooled_start(problem, batch, model.init(batch.support.x.new_zeros(())))
    assert float(eta["log_sd_a"]) == -1.0  # where the model starts
    assert float(eta["b"]) == pytest.approx(crossed_data().mean(), abs=0.1)


ONE_WAY = {
    "uniform, above the data's mean": dist.Uniform(3.0, 10.0),
    "uniform, below it": dist.Uniform(-6.0, 1.0),
    "exponential": dist.Exponential(2.0),
}


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_mean_with_an_edge_meets_its_grid(name: str) -> None:
    """Uniform ones ended at an infinite loss, an exponential one had draws below 0."""
    y, density = one_way_data(), ONE_WAY[name]
    model = vm.TaskModel(
        vm.LinearPredictor([]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="shared", loc_hyperprior=density),
    )
    fit = vm.fit(model, one_way_tasks(y), hyperguide="multivariate_normal", progress=False)
    assert fit.hyper is not None and fit.converged and math.isfinite(fit.loss)
    mu, log_tau, log_sigma = (
        torch.linspace(low, high, n, dtype=F64)
        for low, high, n in ((-3.0, 9.0, 1201), (-2.0, 4.0, 200), (-1.0, 1.0, 80))
    )
    tau, sigma = log_tau.exp()[:, None], log_sigma.exp()
    mean, within = torch.tensor(y.mean(1)), float(((y - y.mean(1, keepdims=True)) ** 2).sum())
    number, rows = y.shape
    total = tau**2 + sigma**2 / rows  # (tau, sigma)
    log_p = -0.5 * (mean - mu[:, None]).square().sum(1)[:, None, None] / total
    log_p = log_p - 0.5 * number * total.log() - number * (rows - 1) * log_sigma
    log_p = log_p - 0.5 * within / sigma**2 + log_tau[:, None] + log_sigma
    low, high = (-6.0, 1.0) if name.endswith("it") else (3.0, 10.0) if name[0] == "u" else (0.0, 99)
    inside = (mu > low) & (mu < high)
    log_h = torch.where(inside, -2.0 * mu if name[0] == "e" else 0.0, -torch.inf)
    share = (log_p + log_h[:, None, None]).flatten().softmax(0).reshape(log_p.shape).sum((1, 2))
    expected = float((share * mu).sum())
    sd = math.sqrt(float((share * (mu - expected) ** 2).sum()))
    draws = fit.hyper.points["intercept"]
    assert float(draws.min()) >= low and float(draws.max()) <= high
    row = fit.hyperparameters().loc["intercept"]
    assert row["mean"] == pytest.approx(expected, abs=0.05 * sd)
    assert row["sd"] == pytest.approx(sd, rel=0.05)
    assert fit.standard_errors is not None  # of theta0, not of the Gaussian's coordinates
    assert float(fit.standard_errors["intercept"]) == pytest.approx(row["sd"], rel=1e-6)


def test_a_start_outside_the_support_is_refused() -> None:
    """Its loss was infinite, "converged after 1 Newton step"."""
    prior = vm.GaussianPrior(learn_precision="shared", loc_hyperprior=dist.Uniform(5.0, 6.0))
    model = vm.TaskModel(vm.LinearPredictor([]), vm.likelihoods.Gaussian(), prior)
    with pytest.raises(ValueError, match="density is 0 where the fit starts, for intercept"):
        vm.fit(model, one_way_tasks(one_way_data()), progress=False)


def test_coordinates_have_no_edges() -> None:
    inf = math.inf
    low = torch.tensor([-inf, 0.0, -2.0, -inf, -1e6], dtype=F64)
    high = torch.tensor([inf, inf, 3.0, 1.0, 1e6], dtype=F64)
    both, generator = Bounds(low, high), torch.Generator().manual_seed(0)
    for _ in range(20):
        u = 3.0 * torch.randn(5, generator=generator, dtype=F64)
        value = both.value(u)
        assert bool(((value > low) & (value < high)).all())
        torch.testing.assert_close(both.coordinate(value), u, rtol=1e-6, atol=1e-9)
        slopes = torch.autograd.functional.jacobian(both.value, u)
        torch.testing.assert_close(both.log_slope(u), slopes.diagonal().log().sum())
    # at an edge or beyond it: a little inside; far from one: the number itself
    at = both.value(both.coordinate(torch.tensor([7.0, -1.0, 3.0, 9.0, 3.5], dtype=F64)))
    assert bool(((at > low) & (at < high)).all())
    assert at[[0, 4]].tolist() == pytest.approx([7.0, 3.5])


BOUNDED = {
    "sds by name, noise": (
        vm.GaussianPrior(
            learn_precision="per_parameter", scale_hyperprior={"day": dist.Uniform(0.0, 2.0)}
        ),
        dist.Uniform(0.1, 3.0),
    ),
    "sds of a dense covariance": (
        vm.GaussianPrior(
            learn_precision="full",
            scale_hyperprior={"intercept": dist.Uniform(0.0, 2.0), "day": dist.Uniform(0.5, 4.0)},
        ),
        None,
    ),
    "precisions, theta0": (
        vm.GaussianPrior(
            learn_precision="shared",
            hyperprior=dist.Uniform(0.1, 50.0),
            loc_hyperprior={"day": dist.HalfNormal(2.0)},
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_every_entry_stays_inside(name: str) -> None:
    """And the density of the coordinates has the slope of the way to what has edges."""
    prior, noise = BOUNDED[name]
    likelihood = vm.likelihoods.Gaussian(scale_hyperprior=noise)
    model = vm.TaskModel(vm.LinearPredictor(["day"]), likelihood, prior)
    eta = model.init(torch.zeros((), dtype=F64))
    inner, plain = Coordinates(model, eta, bounded=True), Coordinates(model, eta)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        u = 3.0 * torch.randn(inner.size, generator=generator, dtype=F64)

        def across(vector: Tensor) -> Tensor:
            return plain.vector(plain.of(inner.eta(inner.named(vector))))

        slopes = torch.autograd.functional.jacobian(across, u)
        there = plain.named(across(u))
        density = plain.log_density(there)
        assert math.isfinite(float(density))
        torch.testing.assert_close(
            inner.log_density(inner.named(u)), density + torch.linalg.slogdet(slopes).logabsdet
        )
        # without the Jacobian it is of the sds themselves, in any coordinates
        without = inner.log_density(inner.named(u), jacobian=False)
        torch.testing.assert_close(without, plain.log_density(there, jacobian=False))
