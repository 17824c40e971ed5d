"""A noise scale of each task's own, drawn from the prior: the network with `per_task=True` is the
program that says the same.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from experiments.nonlinear import quadrature
from tests.cases import seeded

Params = dict[str, Tensor]
STRATEGIES = {
    "dense": vm.Implicit("multivariate_normal"),
    "laplace": vm.Implicit("laplace"),
    "mean-field": vm.Joint("normal"),
}


def noisy_lines(number: int, rows: int, seed: int = 0) -> vm.TaskSet:
    """intercept ~ N(0, 1), slope 2, log noise ~ N(-1, 0.6^2); every other task two rows shorter."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for i in range(number):
        n = rows - 2 * (i % 2)
        x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        z = torch.randn(2 + n, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((x, z[0] + 2.0 * x[:, 0] + (-1.0 + 0.6 * z[1]).exp() * z[2:])))
    return vm.TaskSet(tasks)


def line(
    per_task: bool = True,
    shared: tuple[str, ...] = (),
    learn: str = "per_parameter",
    **options: Any,
) -> vm.TaskModel:
    likelihood = options.pop("likelihood", None) or vm.likelihoods.Gaussian(0.5, per_task=per_task)
    return vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(learn_precision=learn), shared
    )


def said_by_hand(params: Params, x: Tensor, y: Tensor | None) -> Any:
    mean = params["weight"][..., 0, 0] * x[..., 0] + params["bias"][..., 0]
    return pyro.sample("y", dist.Normal(mean, params["log_noise"].exp()), obs=y)


def by_hand(
    model: vm.TaskModel, shared: tuple[str, ...] = (), learn: str = "per_parameter"
) -> vm.TaskModel:
    return vm.TaskModel.from_pyro(
        said_by_hand, model.start, vm.GaussianPrior(learn_precision=learn), shared
    )


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
@pytest.mark.parametrize("shared", [(), ("weight",), ("weight", "bias"), ("log_noise",)], ids=repr)
def test_it_is_the_program_that_says_the_same(strategy: Any, shared: tuple[str, ...]) -> None:
    tasks, own = noisy_lines(5, 6), line(shared=shared)
    one, other = (vm.meta_gradient(model, tasks, strategy) for model in (own, by_hand(own, shared)))
    assert float(one.value) == pytest.approx(float(other.value), rel=1e-10)
    assert one.grads.keys() == other.grads.keys()
    for name, gradient in one.grads.items():
        assert torch.allclose(gradient, other.grads[name], rtol=1e-7, atol=1e-9), name


def test_truth_is_recovered_and_the_fit_is_that_of_the_program() -> None:
    tasks, own = noisy_lines(80, 12), line(shared=("weight",))
    assert own.weights.labels == ("bias", "log_noise")
    fit = vm.fit(own, tasks, vm.Joint("multivariate_normal"), compile=False)
    twin = vm.fit(by_hand(own, ("weight",)), tasks, vm.Joint("multivariate_normal"), compile=False)
    assert fit.converged and fit.loss == pytest.approx(twin.loss, rel=1e-9)
    assert fit.standard_errors is not None
    assert abs(float(fit.prior.loc["log_noise"]) + 1.0) <= 3 * float(
        fit.standard_errors["log_noise"]
    )
    # n rows know log noise to 1 / sqrt(2 n), which adds to what the tasks differ by
    spread = math.sqrt(0.6**2 + 1 / 20) / 0.6 / math.sqrt(2 * 80)
    assert float(fit.prior.sd["log_noise"]) == pytest.approx(0.6, rel=4 * spread)
    assert (
        fit.prior.scale is None and fit.log_likelihood is None
    )  # no noise scale of all, and no longer Gaussian given eta
    assert "log_noise" in str(fit)
    # the bound lies below the log likelihood, and near
    assert 0.0 < float(quadrature(fit.posterior()).sum()) + fit.loss < 0.05 * len(tasks)
    # a task's draws scatter by the task's own noise
    posterior = fit.posterior()
    drawn = posterior.predict([[0.0]], num_samples=4000)
    expected = (
        posterior.draws(4000)[..., 1].mul(2).exp().mean(0) + posterior.sd["bias"].square().flatten()
    ).sqrt()
    assert torch.allclose(drawn.sd.flatten(), expected, rtol=0.1)


def test_it_scores_better_where_tasks_differ_in_noise() -> None:
    train, test = noisy_lines(60, 12), noisy_lines(40, 16, seed=1).split(0.5)
    dense = vm.Joint("multivariate_normal")
    own, common = (
        vm.fit(line(per_task, ("weight",)), train, dense, compile=False).adapt(test, compile=False)
        for per_task in (True, False)
    )
    assert own.score()["log_density"]["all"] > common.score()["log_density"]["all"] + 0.05


def test_padding_counts_for_nothing() -> None:
    tasks, own = noisy_lines(2, 5), line()
    together = vm.meta_gradient(own, tasks, vm.Implicit("multivariate_normal"))
    alone = [
        float(vm.meta_gradient(own, tasks[i : i + 1], vm.Implicit("multivariate_normal")).value)
        for i in range(2)
    ]
    assert float(together.value) == pytest.approx(sum(alone), rel=1e-12)


def test_several_responses_and_other_likelihoods() -> None:
    """One scale for both columns of y; StudentT, LogNormal and Weighted the same way."""
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    two = vm.TaskSet([vm.Task((x, torch.cat([x, 2 * x + i], -1))) for i in range(3)])
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 2)), vm.likelihoods.Gaussian(per_task=True))
    eta = model.init(torch.zeros((), dtype=torch.float64))
    theta = torch.randn(
        7, 3, 1, model.weights.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    parts = model.weights.unflatten(theta.squeeze(-2))
    mean = (
        torch.einsum("stij,tnj->stni", parts["weight"], two.batch().support.x)
        + parts["bias"][..., None, :]
    )
    density = (
        dist.Normal(mean, parts["log_noise"].exp()[..., None, None])
        .log_prob(two.batch().support.y)
        .sum((-1, -2))
    )
    fit = vm.fit(
        model,
        two,
        vm.Implicit("multivariate_normal"),
        1,
        lambda p: torch.optim.SGD(p, lr=0.0),
        compile=False,
    )
    assert torch.allclose(fit.posterior().log_likelihood(theta, eta), density)
    for likelihood in (
        vm.likelihoods.StudentT(per_task=True),
        vm.likelihoods.LogNormal(per_task=True),
    ):
        assert line(likelihood=likelihood).weights.names == ("weight", "bias", "log_noise")
    heavy = line(likelihood=vm.likelihoods.Weighted(vm.likelihoods.Gaussian(0.5, per_task=True)))
    tasks = noisy_lines(4, 5)
    once = vm.TaskSet(
        [
            vm.Task((t.support[0], torch.stack([t.support[1], torch.ones(len(t.support[1]))], -1)))
            for t in tasks
            if t.support
        ]
    )
    found = [
        float(vm.meta_gradient(m, d, vm.Joint("normal")).value)
        for m, d in ((heavy, once), (line(), tasks))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_raw_units() -> None:
    tasks = noisy_lines(40, 10)
    scaled, scaling = tasks.standardized()
    dense = vm.Joint("multivariate_normal")
    raw = vm.fit(line(learn="full"), tasks, dense, compile=False).prior
    back = scaling.raw_prior(vm.fit(line(learn="full"), scaled, dense, compile=False))
    for name, value in raw.loc.items():
        assert torch.allclose(value, back.loc[name], rtol=1e-4, atol=1e-4), name
    assert torch.allclose(raw.covariance, back.covariance, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    for options in ({"learn_scale": False}, {"scale_hyperprior": dist.HalfNormal(1.0)}):
        with pytest.raises(
            ValueError,
            match="the scale of each task comes from the prior, as the weight 'log_noise'",
        ):
            vm.likelihoods.Gaussian(per_task=True, **options)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="noise of each task's own has no output of which to take a Jacobian"
    ):
        vm.fit(line(), noisy_lines(3, 5), vm.Implicit(vm.guides.Laplace("gauss_newton")))
    with pytest.raises(ValueError, match="says nothing about .'log_noise'"):
        vm.TaskModel(
            nn.Linear(1, 1),
            vm.likelihoods.Gaussian(per_task=True),
            vm.GaussianPrior({"weight": 1.0, "bias": 1.0}),
        )


def test_it_is_saved_and_read(tmp_path: Any) -> None:
    tasks = noisy_lines(6, 6)
    fit = vm.fit(line(), tasks, vm.Joint("multivariate_normal"), compile=False)
    fit.save(tmp_path / "fit")
    assert vm.load(tmp_path / "fit", line()).loss == fit.loss
    with pytest.raises(ValueError, match="is a fit"):
        vm.load(tmp_path / "fit", line(per_task=False))
