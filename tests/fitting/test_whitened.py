"""A dense prior over weights that enter linearly: columns' units, origins and angles do not matter
to the fit.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.fitting.whitened import Whitened
from varmeta.hyper.conditional import conditionals
from varmeta.numerics.tree import map_tree

F64 = torch.float64


def lines(
    shift: float = 0.0, twin: float | None = None, dtype: torch.dtype = F64, names: bool = False
) -> vm.TaskSet:
    """20 tasks of 6 rows with correlated intercepts and slopes; x + shift, and x + twin * noise as
    a second column.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, 1, generator=generator, dtype=F64)
    root = torch.tensor([[0.6, 0.2], [0.0, 0.5]], dtype=F64)
    w = torch.randn(20, 2, generator=generator, dtype=F64) @ root + 1
    y = w[:, :1] + w[:, 1:] * x[..., 0] + 0.33 * torch.randn(20, 6, generator=generator, dtype=F64)
    if twin is not None:
        x = torch.cat([x, x + twin * torch.randn(20, 6, 1, generator=generator, dtype=F64)], -1)
    tasks = [
        vm.Task(((x[i] + shift).to(dtype), y[i].to(dtype)), features={"z": float(w[i, 0] > 1)})
        for i in range(20)
    ]
    return vm.TaskSet(tasks)


def fitted(tasks: vm.TaskSet, **options) -> vm.Fit:
    torch.manual_seed(0)
    net = nn.Linear(tasks[0].support[0].shape[-1], 1).to(tasks[0].support[0])
    prior = vm.GaussianPrior(learn_precision="full", **options)
    return vm.fit(vm.TaskModel(net, vm.likelihoods.Gaussian(), prior), tasks)


def evidence(fit: vm.Fit) -> float:
    eta = {name: value.unsqueeze(0) for name, value in fit.eta.items()}
    return float(conditionals(fit.model, fit.tasks.batch(), eta, gaussian=True).log_evidence.sum())


@pytest.mark.parametrize("shift", [100.0, 1e4, 1e6])
def test_the_origin_of_a_predictor_is_no_matter(shift: float) -> None:
    """At 1e4 the fit ended 22.7 nats above this optimum, at 1e6 36.2, both "converged"."""
    plain, moved = fitted(lines()), fitted(lines(shift))
    assert plain.converged and moved.converged and moved.run.step <= 25
    assert plain.loss == pytest.approx(
        -evidence(plain), abs=1e-9
    )  # the objective is tight: an oracle of its own
    rounding = 1e-14 * shift * 120  # of x itself
    assert moved.loss == pytest.approx(plain.loss, abs=1e-8 + rounding)
    assert float(moved.prior.scale) == pytest.approx(float(plain.prior.scale), rel=1e-6)
    slope, plain_slope = float(moved.prior.sd["weight"]), float(plain.prior.sd["weight"])
    assert slope == pytest.approx(plain_slope, rel=1e-5)
    x = torch.tensor([[-1.0], [0.0], [2.0]], dtype=F64)
    means = [
        (x + by) * of.prior.loc["weight"] + of.prior.loc["bias"]
        for of, by in ((plain, 0.0), (moved, shift))
    ]
    torch.testing.assert_close(*means, rtol=0.0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the fit is singular")  # two weights made these data
def test_nearly_equal_columns_are_fitted_to_their_optimum() -> None:
    """x2 = x1 + 1e-8 e: 49.8 nats above it.  The same columns told apart, (x2 - x1) / 1e-8, have
    the same optimum.
    """
    near = fitted(lines(twin=1e-8))
    apart = lines(twin=1e-8)
    rows = [
        torch.stack([x[:, 0], (x[:, 1] - x[:, 0]) * 1e8], -1)
        for x, _ in (task.support for task in apart)
    ]
    told = fitted(
        vm.TaskSet([vm.Task((x, task.support[1])) for x, task in zip(rows, apart, strict=True)])
    )
    assert near.converged and told.converged
    assert near.loss == pytest.approx(told.loss, abs=1e-6)


def test_the_coordinates_give_the_same_objective_and_lead_back() -> None:
    """Shared parameters, covariates and hyperpriors included, at an eta and phi that are nothing
    special.
    """
    tasks = lines(3.0, twin=0.5)
    net = vm.LinearPredictor(["a", "b"])
    for prior in (
        vm.GaussianPrior(learn_precision="full", covariates={"intercept": ["z"]}, lkj=2.0),
        vm.GaussianPrior(learn_precision="full", loc_hyperprior=dist.Normal(0.0, 2.0)),
    ):
        model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, shared=["b"])
        strategy, batch = vm.Joint("multivariate_normal"), tasks.batch()
        problem = strategy.problem(model, tasks, 0)
        generator = torch.Generator().manual_seed(1)

        def shaken(x: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            return x + 0.3 * torch.randn(x.shape, generator=generator, dtype=F64)

        eta = {
            name: shaken(value) for name, value in model.init(batch.support.x.new_zeros(())).items()
        }
        phi = map_tree(shaken, problem.start(batch, eta))
        inside = Whitened.of(problem, batch, eta)
        assert inside is not None
        whitened = inside.enter(phi, eta)
        torch.testing.assert_close(
            inside.losses()(*whitened), problem.losses("elbo", batch, 0)(phi, eta)
        )
        torch.testing.assert_close(
            torch.as_tensor(inside.penalty(whitened[1])), torch.as_tensor(model.penalty(eta))
        )
        back_phi, back_eta = inside.leave(*whitened)
        torch.testing.assert_close(back_phi, phi)
        torch.testing.assert_close(back_eta, eta)
        # a column of L may have either sign
        flipped = whitened[1] | {
            "log_precision": whitened[1]["log_precision"] * torch.tensor([1.0, -1.0], dtype=F64)
        }
        losses = inside.losses()(whitened[0], flipped)
        torch.testing.assert_close(
            problem.losses("elbo", batch, 0)(*inside.leave(whitened[0], flipped)), losses
        )


def test_what_is_collinear_or_not_linear_by_construction_is_left_as_it_is() -> None:
    tasks, strategy = lines(), vm.Joint("multivariate_normal")
    for net, prior in (
        (nn.Sequential(nn.Linear(1, 1), nn.Tanh()), vm.GaussianPrior(learn_precision="full")),
        (nn.Linear(1, 1), vm.GaussianPrior(learn_precision="per_parameter")),
    ):
        model = vm.TaskModel(net.double(), vm.likelihoods.Gaussian(), prior)
        assert (
            Whitened.of(
                strategy.problem(model, tasks, 0),
                tasks.batch(),
                model.init(torch.zeros((), dtype=F64)),
            )
            is None
        )
    twins = lines(twin=0.0)
    model = vm.TaskModel(
        nn.Linear(2, 1).double(),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    assert (
        Whitened.of(
            strategy.problem(model, twins, 0), twins.batch(), model.init(torch.zeros((), dtype=F64))
        )
        is None
    )


@pytest.mark.parametrize("weight", ["weight", "bias"])
@pytest.mark.parametrize("learn", ["full", "per_parameter"])
@pytest.mark.parametrize("sd", [1e-3, 1e-4, 1e-6])
def test_a_strict_hyperprior_on_theta0_holds_it_there(sd: float, learn: str, weight: str) -> None:
    """Newton's steps were measured by the tasks' losses alone and stalled 5e11 nats up; the limit
    is theta0 = 0, fixed.
    """
    tasks = lines()
    torch.manual_seed(0)
    prior = vm.GaussianPrior(learn_precision=learn, loc_hyperprior={weight: dist.Normal(0.0, sd)})
    model = vm.TaskModel(nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(), prior)
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    assert fit.converged and fit.run.step <= 40
    assert abs(float(fit.prior.loc[weight])) <= 100 * sd**2
    # the evidence of the same data where that weight's mean is 0, up to the hyperprior's density at
    # 0
    there = float(dist.Normal(0.0, sd).log_prob(torch.zeros((), dtype=F64)))
    assert fit.loss + there == pytest.approx(-evidence(fit), abs=1e3 * sd**2 + 1e-6)
    looser = vm.GaussianPrior(
        learn_precision=learn, loc_hyperprior={weight: dist.Normal(0.0, 2 * sd)}
    )
    other = vm.fit(
        vm.TaskModel(nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(), looser),
        tasks,
        vm.Joint("multivariate_normal"),
    )
    assert evidence(other) == pytest.approx(evidence(fit), abs=1e4 * sd**2 + 1e-6)


@pytest.mark.filterwarnings("ignore:the fit is singular")
def test_a_covariance_that_loses_rank_is_reached() -> None:
    """It took 69 to 76 steps and ended where the log precisions flatten out; now L_jj = 0 is an
    ordinary point.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(15, 8, 1, generator=generator, dtype=F64)
    u = torch.randn(15, 1, generator=generator, dtype=F64)
    y = (
        1.0
        + u
        + (0.5 + 0.7 * u) * x[..., 0]
        + 0.5 * torch.randn(15, 8, generator=generator, dtype=F64)
    )
    fits = [
        fitted(vm.TaskSet([vm.Task((f * x[i] + shift, y[i])) for i in range(15)]))
        for f, shift in ((1, 0), (0.05, 7))
    ]
    for fit in fits:
        assert fit.converged and fit.run.step <= 20
        # the estimates that are handed out give the loss that is claimed
        assert -evidence(fit) == pytest.approx(fit.loss, abs=1e-7)
        assert math.isfinite(float(fit.posterior().distribution.mean.sum()))
    assert fits[0].loss == pytest.approx(fits[1].loss, abs=1e-9)


def test_float32() -> None:
    plain, moved = fitted(lines()), fitted(lines(100.0, dtype=torch.float32))
    assert moved.converged
    assert moved.loss == pytest.approx(plain.loss, abs=0.01)


def test_a_resumed_fit_goes_on_where_it_was() -> None:
    tasks = lines(50.0)
    torch.manual_seed(0)
    model = vm.TaskModel(
        nn.Linear(1, 1).double(),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    short = vm.fit(model, tasks, num_steps=2)
    whole, resumed = vm.fit(model, tasks), vm.fit(model, tasks, resume=short, num_steps=200)
    assert not short.converged and resumed.converged
    assert resumed.loss == pytest.approx(whole.loss, abs=1e-9)


def test_gauss_hermite_keeps_its_weights() -> None:
    """One weight a task, exact under any rule: the same maximum by two points of cubature and by 32
    weighted nodes.
    """
    tasks = vm.TaskSet.from_frame(
        vm.datasets.radon(as_frame=True), task="county", x=[], y="log_radon"
    )
    losses = []
    for rule in ("cubature", "quadrature"):
        prior = vm.GaussianPrior(learn_precision="full")
        model = vm.TaskModel(vm.LinearPredictor([]), vm.likelihoods.Gaussian(), prior)
        losses.append(vm.fit(model, tasks, vm.Joint("multivariate_normal", expectation=rule)).loss)
    assert abs(losses[0] - 1090.28685) < 1e-4
    assert abs(losses[1] - losses[0]) < 1e-6


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_the_loss_of_counts_is_the_objective_at_what_was_learned(shift: float) -> None:
    """Cubature in whitened columns looks along other axes: 0.02 nats lay between its minimum and
    the objective there.
    """
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(15):
        x = torch.randn(8, 1, generator=generator, dtype=torch.float64)
        rate = torch.randn((), generator=generator) + torch.randn((), generator=generator) * x[:, 0]
        tasks.append(
            vm.Task(
                support=(x + shift, torch.poisson(rate.clamp(max=2.0).exp(), generator=generator))
            )
        )
    prior = vm.GaussianPrior(learn_precision="full", loc_hyperprior=dist.Normal(0.0, 5.0))
    model = vm.TaskModel(nn.Linear(1, 1).double(), vm.likelihoods.Poisson(), prior)
    fit = vm.fit(model, vm.TaskSet(tasks), vm.Joint("multivariate_normal"))
    assert fit.converged and fit.run.state.phi is not None
    losses = fit.problem.losses("elbo", fit.tasks.batch(), 0)(fit.run.state.phi, fit.eta)
    assert fit.loss == pytest.approx(float(losses.sum() + model.penalty(fit.eta)), abs=1e-8)


def test_a_guide_that_has_lost_its_width_is_left_with_what_rounding_leaves_of_it() -> None:
    """exp(-800) is 0: the logarithm of its share of a row was -inf, and the row's entries inf."""
    tasks = lines(3.0, twin=0.5)
    model = vm.TaskModel(
        vm.LinearPredictor(["a", "b"]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full"),
    )
    batch = tasks.batch()
    problem = vm.Joint("multivariate_normal").problem(model, tasks, 0)
    eta = model.init(batch.support.x.new_zeros(()))
    inside = Whitened.of(problem, batch, eta)
    assert inside is not None
    phi, at = inside.enter(problem.start(batch, eta), eta)
    phi["log_scale"][0] = torch.tensor([1.0, -500.0, -800.0], dtype=F64)
    left, raw = inside.leave(phi, at)
    assert all(bool(value.isfinite().all()) for value in left.values())
    factor = problem.guide.distribution(left, raw, batch.support).scale_tril[0, 0]
    sd = factor.norm(dim=-1)
    # rows of the covariance in the data's coordinates: one direction is left, as wide as asked for
    direction = inside.leave(phi | {"log_scale": phi["log_scale"].clamp(min=-30.0)}, at)[0]
    expected = problem.guide.distribution(direction, raw, batch.support).scale_tril[0, 0]
    torch.testing.assert_close(sd, expected.norm(dim=-1), rtol=1e-9, atol=0.0)
