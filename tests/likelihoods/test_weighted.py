"""A likelihood around another one: it forwards everything, and its weights mean what they are said
to mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import optimize, stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, randn, start
from varmeta import likelihoods as L
from varmeta.likelihoods.weighted import forwarding
from varmeta.models.check import check_model

WRAPPERS = [L.Weighted]


def public(cls: type) -> list[str]:
    return [name for name in vars(cls) if not name.startswith("_")]


class Strange(L.Likelihood):
    """Every public member of the base class has an answer that the base class does not give."""

    def distribution(self, out: Tensor, eta: Any, y: Tensor | None = None) -> Any:
        return dist.Normal(out, 1.0)


for _name in public(L.Likelihood):
    if _name != "distribution":
        _attribute = not callable(getattr(L.Likelihood, _name)) or isinstance(
            vars(L.Likelihood)[_name], property
        )
        _answer: Any = f"strange {_name}"
        setattr(
            Strange,
            _name,
            _answer if _attribute else (lambda self, *args, _answer=_answer: _answer),
        )


# These a wrapper has to answer by itself, since y has a column more; their answers are tested
# below.
OWN = {"distribution", "observed", "weights", "invalid", "predictive", "without_query"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", sorted(set(public(L.Likelihood)) - OWN))
def test_a_wrapper_forwards_every_public_member(wrapper: Any, name: str) -> None:
    member = getattr(wrapper(Strange()), name)
    assert (member("any") if callable(member) else member) == f"strange {name}"


def test_weights_are_told_of_what_is_predicted_too() -> None:
    weighted = L.Weighted(L.Gaussian())
    assert weighted.predictive is weighted and weighted.without_query() is weighted


def test_a_member_that_is_new_is_forwarded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L.Likelihood, "brand_new", lambda self, eta: "base", raising=False)

    @forwarding
    class Around(L.Likelihood):
        def __init__(self, likelihood: L.Likelihood) -> None:
            self.likelihood = likelihood

    class Inside(L.Gaussian):
        def brand_new(self, eta: Any) -> str:
            return f"inside {eta}"

    assert Around(Inside()).brand_new(3) == "inside 3"  # type: ignore[attr-defined]
    assert Around(L.Poisson()).kind == "count"


def test_a_hyperprior_of_the_scale_counts_under_weights() -> None:
    """HalfNormal(0.01) at a scale of 1: 1 / (2 * 0.01^2) = 5000, less the constants."""
    gaussian = L.Gaussian(scale_hyperprior=dist.HalfNormal(torch.tensor(0.01, dtype=F64)))
    plain, weighted = (
        vm.TaskModel(nn.Linear(1, 1), one) for one in (gaussian, L.Weighted(gaussian))
    )
    expected = -stats.halfnorm(scale=0.01).logpdf(1.0)
    assert float(plain.penalty(start(plain))) == pytest.approx(expected, rel=1e-12)
    assert float(weighted.penalty(start(weighted))) == pytest.approx(expected, rel=1e-12)
    assert weighted.has_hyperprior


# -- a density has no weight -----------------------------------------------------------------------


def weighted_lines(
    seed: int = 0, tasks: int = 25, rows: int = 12
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, y and weights of 1 and 4, y's variance being 1 / w: what lmer's weights say."""
    found = []
    for i in range(tasks):
        x, noise, u = (
            randn(rows, seed=seed + 3 * i),
            randn(rows, seed=seed + 3 * i + 1),
            randn(2, seed=seed + 3 * i + 2),
        )
        w = torch.tensor([1.0, 4.0], dtype=F64).repeat(rows // 2)
        found.append((x, 2.0 + 0.8 * u[0] + (1.0 + 0.5 * u[1]) * x + noise / w.sqrt(), w))
    return found


def task_set(lines: list[tuple[Tensor, Tensor, Tensor]], part: int = 6) -> vm.TaskSet:
    made = []
    for x, y, w in lines:
        both = torch.stack([y, w], -1)
        made.append(vm.Task((x[:part, None], both[:part]), (x[part:, None], both[part:])))
    return vm.TaskSet(made)


@pytest.mark.parametrize("precision", [False, True])
def test_scores_and_exports_are_densities(precision: bool) -> None:
    """Of a delta guide the predictive density of a row is Normal(mean, sigma or sigma / sqrt(w))
    itself, whatever its weight.
    """
    lines = weighted_lines(tasks=4)
    tasks = task_set(lines)
    likelihood = L.Weighted(L.Gaussian(0.7, learn_scale=False), precision=precision)
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(2.0))
    posterior = vm.fit(model, tasks, vm.Joint("delta"), num_steps=2).posterior()
    a, b = (posterior.mean[name].reshape(4, 1).numpy() for name in ("weight", "bias"))
    x, y, w = (np.stack([line[k].numpy()[6:] for line in lines]) for k in range(3))
    expected = stats.norm(a * x + b, 0.7 / np.sqrt(w) if precision else 0.7).logpdf(y)
    table = posterior.score(num_samples=3)
    assert float(table.loc["all", "log_density"]) == pytest.approx(expected.mean(), rel=1e-10)
    assert np.allclose(posterior.log_prob(num_samples=1)[0][0].numpy(), expected, rtol=1e-10)


def test_the_export_holds_densities_and_its_log_joint_the_weights() -> None:
    lines = weighted_lines(tasks=4)
    likelihood = L.Weighted(L.Gaussian(0.7, learn_scale=False))
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(2.0))
    posterior = vm.fit(
        model, task_set(lines), vm.Joint("multivariate_normal"), num_steps=2
    ).posterior()
    data = posterior.to_arviz(num_samples=200, seed=1)
    theta = data["posterior"]["theta"].values  # (chains, draws, tasks, weight and bias)
    x, y, w = (np.stack([line[k].numpy()[:6] for line in lines]) for k in range(3))
    density = stats.norm(theta[..., :1] * x + theta[..., 1:], 0.7).logpdf(y)
    assert np.allclose(data["log_likelihood"]["y"], density.reshape(4, 50, -1), rtol=1e-8)
    loc = model.weights.flatten(posterior.q.eta).numpy()
    joint = (w * density).sum(-1) + stats.norm(loc, 2.0**-0.5).logpdf(theta).sum(-1)
    assert np.allclose(data["sample_stats"]["log_joint"], joint, rtol=1e-8)


def test_a_program_that_scales_its_site_is_scored_by_the_density_too() -> None:
    def heavy(params: Any, x: Tensor, y: Tensor | None) -> Any:
        with poutine.scale(scale=3.0):
            return pyro.sample("y", dist.Normal(params["level"] + 0 * x, 1.0), obs=y)

    tasks = vm.TaskSet(
        [
            vm.Task((randn(4, seed=i), randn(4, seed=9 + i)), (randn(3), randn(3, seed=5)))
            for i in range(3)
        ]
    )
    model = vm.TaskModel.from_pyro(heavy, {"level": ()}, vm.GaussianPrior(1.0))
    posterior = vm.fit(model, tasks, vm.Joint("delta"), num_steps=2).posterior()
    mean = posterior.mean["level"].reshape(3, 1).numpy()
    expected = stats.norm(mean, 1.0).logpdf(np.stack([task.query[1].numpy() for task in tasks]))
    assert float(posterior.score(num_samples=2).loc["all", "log_density"]) == pytest.approx(
        expected.mean(), rel=1e-10
    )


# -- two meanings of a weight ----------------------------------------------------------------------


def lmer(lines: list[tuple[Tensor, Tensor, Tensor]]) -> Any:
    """ML of (1 + x | g) with variance sigma^2 / w by scipy: a task's y is Gaussian with covariance
    Z S Z' + sigma^2 / w.
    """

    def loss(p: np.ndarray) -> float:
        factor = np.array([[np.exp(p[2]), 0.0], [p[3], np.exp(p[4])]])
        total = 0.0
        for x, y, w in lines:
            z = np.stack([x.numpy(), np.ones(len(x))], -1)
            covariance = z @ factor @ factor.T @ z.T + np.diag(np.exp(2 * p[5]) / w.numpy())
            total -= stats.multivariate_normal(z @ p[:2], covariance).logpdf(y.numpy())
        return total

    return optimize.minimize(
        loss, [1.0, 2.0, -0.5, 0.0, -0.5, 0.0], method="BFGS", options={"gtol": 1e-5}
    )


def test_precision_weights_are_lmers() -> None:
    """Joint Newton under precision=True is GLS maximum likelihood, and its log likelihood is
    claimed.
    """
    lines = weighted_lines()
    best = lmer(lines)
    tasks = task_set(lines, part=12)
    prior = vm.GaussianPrior(learn_precision="full")
    fits = {
        precision: vm.fit(
            vm.TaskModel(
                vm.LinearPredictor(["x"]), L.Weighted(L.Gaussian(), precision=precision), prior
            ),
            tasks,
            vm.Joint("multivariate_normal"),
        )
        for precision in (True, False)
    }
    exact = fits[True]
    assert exact.converged
    assert exact.log_likelihood == pytest.approx(-best.fun, abs=1e-5)
    assert float(exact.prior.scale) == pytest.approx(np.exp(best.x[5]), rel=1e-4)
    assert [float(exact.prior.loc[name]) for name in ("x", "intercept")] == pytest.approx(
        best.x[:2].tolist(), abs=1e-4
    )
    # sigma is 1; under p^w sigma^2 is sum w (y - mean)^2 / sum w, of expectation 1 / mean(w) = 0.4
    assert float(exact.prior.scale) == pytest.approx(1.0, abs=0.1)
    assert float(fits[False].prior.scale) == pytest.approx(0.4**0.5, abs=0.07)
    # p^w of weights that are no counts is no density of y
    assert fits[False].log_likelihood is None


def test_precision_weights_of_several_responses_and_of_each_tasks_scale() -> None:
    y, w = randn(7, 2, seed=4), torch.tensor([1.0, 4.0, 0.5, 2.0, 1.0, 9.0, 3.0], dtype=F64)
    x = randn(7, 2)
    rows = torch.cat([y, w[:, None]], -1)
    net = seeded(lambda: nn.Linear(2, 2))
    for per_task in (False, True):
        gaussian = L.Gaussian(0.7, per_task=per_task)
        model = vm.TaskModel(net, L.Weighted(gaussian, precision=True), vm.GaussianPrior(2.0))
        tasks = vm.TaskSet([vm.Task((x, rows)), vm.Task((x[:3], rows[:3]))])
        check_model(model, tasks)
        posterior = vm.fit(
            model, tasks, vm.Joint("delta"), 1, lambda p: torch.optim.SGD(p, lr=0.0), compile=False
        ).posterior()
        eta = start(model)
        theta = model.weights.flatten(eta).expand(1, 2, 1, -1)
        out = net(x).detach().numpy()
        expected = stats.norm(out, 0.7 / np.sqrt(w.numpy())[:, None]).logpdf(y.numpy()).sum(-1)
        found = posterior.log_likelihood(theta, eta)[0].tolist()
        assert found == pytest.approx([expected.sum(), expected[:3].sum()], rel=1e-10)


@pytest.mark.parametrize("likelihood", [L.StudentT(3.0, 0.7), L.LogNormal(0.7)])
def test_precision_weights_divide_the_squared_scale(likelihood: Any) -> None:
    y = torch.tensor([[0.5, 4.0], [2.0, 1.0]], dtype=F64)
    found = L.Weighted(likelihood, precision=True).distribution(
        torch.zeros(2, dtype=F64), start(vm.TaskModel(nn.Linear(1, 1), likelihood)), y
    )
    scale = np.array([0.35, 0.7])
    rule = stats.t(3.0, 0.0, scale) if isinstance(likelihood, L.StudentT) else stats.lognorm(scale)
    assert found.log_prob(y[:, 0]).tolist() == pytest.approx(
        rule.logpdf(y[:, 0].numpy()).tolist(), rel=1e-12
    )


def test_precision_weights_need_a_scale() -> None:
    with pytest.raises(
        ValueError,
        match=r"precision=True divides a squared scale by the weight, and Poisson\(\) has none",
    ):
        L.Weighted(L.Poisson(), precision=True)
    assert repr(L.Weighted(L.Gaussian(), precision=True)).endswith(", precision=True)")
