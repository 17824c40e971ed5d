"""A task's predictions and scores are its own: the same alone, beside other tasks, in any order, in
any slices of draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from varmeta.fitting.run import Run
from varmeta.posteriors import slices as module
from varmeta.posteriors.observation_noise import TaskNoise
from varmeta.strategies.strategy import State

F64 = torch.float64
SIZES = {"a": 2, "b": 5, "c": 1, "d": 9}


def mixture(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Any:
    """Draws of its own besides y's, when y is not known."""
    fn = dist.MixtureSameFamily(
        dist.Categorical(
            torch.tensor([0.3, 0.7], dtype=F64).expand(
                *torch.broadcast_shapes(params["w"].shape, x.shape[:2]), 2
            )
        ),
        dist.Normal(torch.stack([params["w"] + x[..., 0], params["w"] - x[..., 0]], -1), 0.3),
    )
    return pyro.sample("y", fn, obs=y)


NUMBERS = lambda x: x.sum(-1) + 1.0  # noqa: E731
COUNTS = lambda x: torch.arange(len(x), dtype=F64)  # noqa: E731
LIKELIHOODS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "gaussian": (vm.likelihoods.Gaussian(0.5), NUMBERS),
    "two responses": (
        vm.likelihoods.Gaussian(0.5),
        lambda x: torch.stack([x[:, 0], x[:, 0] ** 2], -1),
    ),
    "student": (vm.likelihoods.StudentT(3.0), NUMBERS),
    "lognormal": (vm.likelihoods.LogNormal(0.5), lambda x: x[:, 0].exp()),
    "bernoulli": (vm.likelihoods.Bernoulli(), lambda x: (x[:, 0] > 0).to(F64)),
    "categorical": (vm.likelihoods.Categorical(3), lambda x: torch.arange(len(x)) % 3),
    "poisson": (vm.likelihoods.Poisson(), COUNTS),
    "negative binomial": (vm.likelihoods.NegativeBinomial(), COUNTS),
    "binomial": (vm.likelihoods.Binomial(9), COUNTS),
    "mixture": (mixture, NUMBERS),
}
WIDTH = {"two responses": 2, "categorical": 3}


def tasks_of(kind: str) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)
    y = LIKELIHOODS[kind][1]
    parts = {
        name: torch.randn(2 * n, 1, generator=generator, dtype=F64) for name, n in SIZES.items()
    }
    return vm.TaskSet(
        [
            vm.Task((x[: SIZES[n]], y(x[: SIZES[n]])), (x[SIZES[n] :], y(x[SIZES[n] :])), name=n)
            for n, x in parts.items()
        ]
    )


def fitted(kind: str, guide: str) -> tuple[vm.Fit, vm.TaskSet]:
    """A fit that has not moved: what is tested is what comes after it."""
    likelihood, tasks = LIKELIHOODS[kind][0], tasks_of(kind)
    prior = vm.GaussianPrior(2.0)
    if callable(likelihood):
        model = vm.TaskModel.from_pyro(likelihood, {"w": torch.zeros((), dtype=F64)}, prior)
    else:
        net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, WIDTH.get(kind, 1)))
        model = vm.TaskModel(seeded(lambda: net), likelihood, prior)
    eta = model.init(torch.zeros((), dtype=F64))
    strategy = vm.Implicit(guide)
    return vm.Fit(model, tasks, strategy, 0, Run(eta, State())), tasks


@pytest.mark.parametrize("guide", ["delta", "normal"])
@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_a_task_alone_permuted_and_in_slices(
    kind: str, guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, tasks = fitted(kind, guide)
    posterior = fit.adapt(tasks)
    x = [task.query[0] for task in tasks]  # type: ignore[index]
    names = list(tasks.names)
    table, drawn, mean = (
        posterior.score(num_samples=40),
        posterior.predict(x, 40),
        posterior.expected(x, 40),
    )
    others: list[list[str]] = [["b"], ["d", "a", "c", "b"], ["c", "b"]]
    for some in others:
        if some == others[-1]:
            monkeypatch.setattr(module, "CHUNK", 2000)  # a few draws at a time
        part = posterior.take(some)
        at = [x[names.index(name)] for name in some]
        np.testing.assert_allclose(
            part.score(num_samples=40).loc["b"].to_numpy(float),
            table.loc["b"].to_numpy(float),
            rtol=1e-12,
            atol=1e-12,
        )
        torch.testing.assert_close(
            part.predict(at, 40).task("b"), drawn.task("b"), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(
            part.expected(at, 40).task("b"), mean.task("b"), rtol=1e-12, atol=1e-12
        )
    # more rows behind leave those in front alone
    if kind not in ("student", "poisson", "negative binomial", "binomial"):
        more = posterior.take(["b"]).predict([torch.cat([x[1], x[3]])], 40).task("b")[:, :5]
        torch.testing.assert_close(more, drawn.task("b"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("fn", "cdf"),
    [
        (dist.Normal(1.0, 2.0), stats.norm(1.0, 2.0).cdf),
        (dist.StudentT(4.0, 1.0, 2.0), stats.t(4.0, 1.0, 2.0).cdf),
        (dist.LogNormal(0.2, 0.5), stats.lognorm(0.5, scale=math.exp(0.2)).cdf),
        (dist.Gamma(2.5, 2.0), stats.gamma(2.5, scale=0.5).cdf),
        (dist.Beta(2.0, 3.0), stats.beta(2.0, 3.0).cdf),
        (dist.Exponential(2.0), stats.expon(scale=0.5).cdf),
        (dist.Laplace(0.5, 2.0), stats.laplace(0.5, 2.0).cdf),
        (dist.Cauchy(0.5, 2.0), stats.cauchy(0.5, 2.0).cdf),
        (dist.Uniform(-1.0, 3.0), stats.uniform(-1.0, 4.0).cdf),
        (dist.Gumbel(0.5, 2.0), stats.gumbel_r(0.5, 2.0).cdf),
        (dist.HalfNormal(2.0), stats.halfnorm(scale=2.0).cdf),
    ],
)
def test_the_noise_has_the_distribution(fn: Any, cdf: Callable[[Any], Any]) -> None:
    mask = torch.ones(2, 50, dtype=torch.bool)
    with TaskNoise(3, torch.tensor([11, 12]), mask) as stream:
        stream.at(0, 200)
        drawn = fn.expand((200, 2, 50)).sample().double()
    assert stats.kstest(drawn.flatten().numpy(), cdf).pvalue > 1e-3
    assert (
        abs(
            np.corrcoef(drawn[:, 0].flatten().clamp(-9, 9), drawn[:, 1].flatten().clamp(-9, 9))[
                0, 1
            ]
        )
        < 0.05
    )


@pytest.mark.parametrize(
    ("fn", "mass"),
    [
        (dist.Bernoulli(0.3), stats.bernoulli(0.3).pmf),
        (
            dist.Categorical(torch.tensor([0.5, 0.0, 0.2, 0.3])),
            lambda k: np.array([0.5, 0.0, 0.2, 0.3])[k],
        ),
        (dist.Poisson(2.5), stats.poisson(2.5).pmf),
        (dist.Binomial(3, 0.4), stats.binom(3, 0.4).pmf),
        (dist.Geometric(0.4), lambda k: 0.4 * 0.6**k),
        (dist.GammaPoisson(2.0, 1.0), stats.nbinom(2.0, 0.5).pmf),
        (
            dist.ZeroInflatedPoisson(rate=torch.tensor(2.0), gate=torch.tensor(0.5)),
            lambda k: 0.5 * (k == 0) + 0.5 * stats.poisson(2.0).pmf(k),
        ),
    ],
)  # fmt: skip
def test_discrete_noise_has_the_distribution(fn: Any, mass: Callable[[Any], Any]) -> None:
    mask = torch.ones(2, 50, dtype=torch.bool)
    with TaskNoise(3, torch.tensor([11, 12]), mask) as stream:
        stream.at(0, 200)
        drawn = fn.expand((200, 2, 50)).sample().long().flatten().numpy()
    values = np.arange(4)
    share, exact = (drawn[:, None] == values).mean(0), mass(values)
    assert np.all(np.abs(share - exact) <= 4.5 * np.sqrt(exact * (1 - exact) / len(drawn)))


# -- a point is one draw ---------------------------------------------------------------------------


def test_a_point_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, tasks = fitted("gaussian", "delta")
    posterior, seen = fit.adapt(tasks), []
    real = vm.TaskModel.observe

    def spy(self: vm.TaskModel, theta: Tensor, *rest: Any) -> Any:
        seen.append(len(theta))
        return real(self, theta, *rest)

    monkeypatch.setattr(vm.TaskModel, "observe", spy)
    x = [[0.5]]
    expected = posterior.expected(x)
    drawn = posterior.predict(x, 4000)
    table = posterior.score()
    assert seen and max(seen) == 1
    assert drawn.samples.shape == (4000, 4, 1)
    torch.testing.assert_close(drawn.mean, expected.mean, rtol=0, atol=5 * 0.5 / math.sqrt(4000))
    torch.testing.assert_close(drawn.sd, torch.full_like(drawn.sd, 0.5), rtol=0.1, atol=0)
    assert set(table.attrs["log_density_se"].values()) == {0.0}


def test_rmse_of_a_point_has_no_noise_of_draws() -> None:
    """With one draw it was that of an observation's draw: sqrt(error^2 + 0.5^2) on the average."""
    fit, tasks = fitted("gaussian", "delta")
    posterior = fit.adapt(tasks)
    x, y = tasks["d"].query  # type: ignore[misc]
    mean = posterior.take(["d"]).expected(x).mean[0]
    exact = float((mean - y).square().mean().sqrt())
    for draws in (1, 7):
        assert posterior.score(num_samples=draws).loc["d", "rmse"] == pytest.approx(
            exact, abs=1e-12
        )


# -- exact where it is known -----------------------------------------------------------------------


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_a_linear_gaussian_score_is_exact(guide: str) -> None:
    tasks = tasks_of("gaussian")
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian(0.5), vm.GaussianPrior(2.0)
    )
    eta = model.init(torch.zeros((), dtype=F64))
    posterior = vm.Fit(model, tasks, vm.Joint(guide), 0, Run(eta, State())).adapt(tasks)
    table = posterior.score(num_samples=1)
    assert table.equals(posterior.score(num_samples=9, seed=4))
    q = posterior.distribution
    covariance = torch.diag_embed(q.variance) if guide == "normal" else q.covariance_matrix
    for i, task in enumerate(tasks):
        x, y = task.query  # type: ignore[misc]
        design = torch.cat([x, torch.ones_like(x)], -1)
        mean = (design @ q.mean[i, 0]).numpy()
        sd = ((design @ covariance[i, 0] * design).sum(-1) + 0.25).sqrt().numpy()
        assert table.loc[task.name, "log_density"] == pytest.approx(
            stats.norm(mean, sd).logpdf(y.numpy()).mean(), abs=1e-10
        )
        assert table.loc[task.name, "rmse"] == pytest.approx(
            np.sqrt(np.mean((mean - y.numpy()) ** 2)), abs=1e-10
        )
        inside = np.abs(stats.norm(mean, sd).cdf(y.numpy()) - 0.5) <= 0.45
        assert table.loc[task.name, "coverage"] == pytest.approx(inside.mean())


def test_the_monte_carlo_error_is_told() -> None:
    fit, tasks = fitted("student", "normal")
    posterior = fit.adapt(tasks)
    found = [posterior.score(num_samples=400, seed=seed) for seed in range(40)]
    spread = np.std([table.loc["all", "log_density"] for table in found])
    told = np.mean([table.attrs["log_density_se"]["all"] for table in found])
    assert 0.6 < told / spread < 1.6
