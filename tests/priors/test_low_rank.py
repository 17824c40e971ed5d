"""The low-rank prior, diag(s)^2 + F F': against dense matrices, scipy and differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import kl_divergence

import varmeta as vm
from tests.common import F64, Largest, moved, randn
from varmeta.guides.kl import kl
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.weights import Weights

SIZE = 6
WEIGHTS = Weights({"0.weight": torch.Size([4, 1]), "head": torch.Size([2])})
LOC = {"0.weight": randn(4, 1), "head": randn(2, seed=1)}
LIKE = torch.zeros((), dtype=F64)


def prior_of(rank: int | None = 2, **options: Any) -> vm.GaussianPrior:
    return vm.GaussianPrior(learn_precision="low_rank", rank=rank, **options)


def covariance_of(eta: dict[str, Tensor], rank: int) -> Tensor:
    """By the definition, entry by entry."""
    entries, w = iter(eta["prior_factor"]), torch.zeros(SIZE, rank, dtype=F64)
    for i in range(SIZE):
        for j in range(min(i + 1, rank)):
            w[i, j] = next(entries)
    sd = torch.exp(-0.5 * eta["log_precision"])
    s = sd / (1.0 + w.square().sum(1)).sqrt()
    f = s[:, None] * w
    return torch.diag(s.square()) + f @ f.T


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_density_and_gradient_are_those_of_the_dense_matrix(rank: int) -> None:
    prior = prior_of(rank)
    eta = moved(prior.init(WEIGHTS, LIKE))
    p = prior.distribution(WEIGHTS, eta | LOC)
    assert isinstance(p, FactorNormal)
    covariance, mean = covariance_of(eta, rank), WEIGHTS.flatten(LOC)
    theta = randn(3, SIZE, seed=5)
    known = stats.multivariate_normal(mean.numpy(), covariance.numpy())
    torch.testing.assert_close(p.log_prob(theta), torch.as_tensor(known.logpdf(theta.numpy())))
    torch.testing.assert_close(p.covariance_matrix, covariance)
    torch.testing.assert_close(p.stddev, torch.exp(-0.5 * eta["log_precision"]))

    def density(eta: dict[str, Tensor], by: bool) -> Tensor:
        if by:
            return prior.distribution(WEIGHTS, eta | LOC).log_prob(theta).sum()
        return (
            dist.MultivariateNormal(mean, covariance_matrix=covariance_of(eta, rank))
            .log_prob(theta)
            .sum()
        )

    for name in eta:
        leaf = {n: v.clone().requires_grad_() for n, v in eta.items()}
        ours = torch.autograd.grad(density(leaf, True), leaf[name])[0]
        dense = torch.autograd.grad(density(leaf, False), leaf[name])[0]
        torch.testing.assert_close(ours, dense)


def test_it_maps_captures_and_serves_float32() -> None:
    prior = prior_of()
    etas = [moved(prior.init(WEIGHTS, LIKE), seed=seed) for seed in (1, 2)]
    theta = randn(SIZE, seed=5)

    def density(eta: dict[str, Tensor]) -> Tensor:
        found: Tensor = prior.distribution(WEIGHTS, eta | LOC).log_prob(theta)
        return found

    stacked = {name: torch.stack([eta[name] for eta in etas]) for name in etas[0]}
    each = torch.stack([density(eta) for eta in etas])
    torch.testing.assert_close(torch.func.vmap(density)(stacked), each)
    with dist.util.validation_enabled(False) if hasattr(dist, "util") else torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(density)(etas[0])
    torch.testing.assert_close(graph(etas[1]), each[1])
    single = {name: value.float() for name, value in etas[0].items()}
    p = prior.distribution(WEIGHTS, single | {n: v.float() for n, v in LOC.items()})
    assert p.log_prob(theta.float()).dtype == torch.float32
    torch.testing.assert_close(p.log_prob(theta.float()).double(), each[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["normal", "multivariate_normal"])
def test_the_divergence_is_that_of_the_dense_matrix(kind: str) -> None:
    prior = prior_of()
    p = prior.distribution(WEIGHTS, moved(prior.init(WEIGHTS, LIKE)) | LOC)
    loc, sd = randn(3, 1, SIZE, seed=3), randn(3, 1, SIZE, seed=4).exp()
    q: Any = dist.Normal(loc, sd).to_event(1)
    dense = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(sd))
    if kind == "multivariate_normal":
        tril = torch.diag_embed(sd) + randn(3, 1, SIZE, SIZE, seed=6).tril(-1)
        q = dense = dist.MultivariateNormal(loc, scale_tril=tril)
    known = kl_divergence(
        dense, dist.MultivariateNormal(p.mean, p.covariance_matrix).expand((3, 1))
    )
    torch.testing.assert_close(kl(q, p.expand((3, 1))), known)


def test_draws_have_the_covariance() -> None:
    prior = prior_of()
    p = prior.distribution(WEIGHTS, moved(prior.init(WEIGHTS, LIKE)) | LOC)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = p.expand((100, 1)).rsample((2_000,)).reshape(-1, SIZE)
    sd = p.stddev
    error = (torch.cov(draws.T) - p.covariance_matrix) / torch.outer(sd, sd)
    assert float(error.abs().max()) < 5 / 200_000**0.5


def test_where_it_starts() -> None:
    """The sds that are given; a fifth of each variance shared, on average; the same every time."""
    eta = prior_of(precision=4.0).init(WEIGHTS, LIKE)
    assert list(eta) == ["log_precision", "prior_factor"]
    assert len(eta["prior_factor"]) == SIZE + SIZE - 1  # a number less for the rotation
    torch.testing.assert_close(
        prior_of(precision=4.0).init(WEIGHTS, LIKE)["prior_factor"], eta["prior_factor"]
    )
    p = prior_of(precision=4.0).distribution(WEIGHTS, eta | LOC)
    torch.testing.assert_close(p.stddev, torch.full((SIZE,), 0.5, dtype=F64))
    many = Weights({"w": torch.Size([2000])})
    wide = prior_of(5).init(many, LIKE) | {"w": torch.zeros(2000, dtype=F64)}
    root = prior_of(5).distribution(many, wide).root
    share = 1.0 - root.spread.square() / root.variances
    assert 0.1 < float(share.mean()) < 0.25
    few = Weights({"w": torch.Size([3])})
    assert len(prior_of(None).init(few, LIKE)["prior_factor"]) == 5  # rank 2
    assert len(prior_of(None).init(many, LIKE)["prior_factor"]) == 5 * 2000 - 10


def test_its_hyperpriors_are_densities_of_each_weights_own_sd() -> None:
    prior = prior_of(scale_hyperprior=dist.HalfNormal(torch.tensor(1.5, dtype=F64)))
    eta = moved(prior.init(WEIGHTS, LIKE))
    sd = covariance_of(eta, 2).diagonal().sqrt()
    expected = -stats.halfnorm(scale=1.5).logpdf(sd.numpy()).sum()
    assert float(prior.penalty(WEIGHTS, eta | LOC)) == pytest.approx(expected)
    prior = prior_of(hyperprior=dist.Gamma(torch.tensor(2.0, dtype=F64), 0.5))
    expected = -stats.gamma(2.0, scale=2.0).logpdf(sd.numpy() ** -2.0).sum()
    assert float(prior.penalty(WEIGHTS, eta | LOC)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: prior_of(0), ValueError, "rank must be a whole number of at least 1, not 0"),
        (lambda: prior_of(1.5), ValueError, "whole number"),
        (lambda: prior_of("2"), TypeError, "whole number"),
        (lambda: prior_of(6).init(WEIGHTS, LIKE), ValueError, "rank=6 must be less than the 6"),
        (
            lambda: vm.TaskModel(
                nn.Linear(1, 1, bias=False), vm.likelihoods.Gaussian(), prior_of()
            ),
            ValueError,
            "a task has 1 weight",
        ),
        (
            lambda: vm.GaussianPrior(learn_precision="full", rank=2),
            ValueError,
            "rank=2 is that of learn_precision='low_rank', not of 'full'",
        ),
        (lambda: prior_of(lkj=2.0), ValueError, "set learn_precision='full'"),
        (lambda: prior_of(covariance=torch.eye(6)), ValueError, "None or 'full'"),
        (
            lambda: vm.TaskModel.from_pyro(
                lambda params, x, y: None, {"a": (), "prior_factor": ()}, prior_of(1)
            ),
            ValueError,
            "varmeta uses itself",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def network(prior: vm.GaussianPrior, width: int = 70) -> vm.TaskModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )
    return vm.TaskModel(net, vm.likelihoods.Gaussian(0.2), prior)


def test_the_structured_guide_starts_with_its_block() -> None:
    tasks = vm.datasets.sinusoids(3, num_support=4, dtype=F64)
    model = network(prior_of(), 4)
    eta = moved(model.init(LIKE))
    problem = vm.Joint(vm.guides.Structured(dense=("4.*",))).problem(model, tasks, 0)
    q = problem.guide.distribution(problem.start(tasks.batch(), eta), eta, tasks.batch().support)
    p, block = model.prior_distribution(eta), slice(-5, None)
    found = q.covariance_matrix[0, 0]
    torch.testing.assert_close(found[block, block], p.covariance_matrix[block, block])
    torch.testing.assert_close(q.variance[0, 0], p.variance)


@pytest.mark.filterwarnings("ignore:the prior precision of:RuntimeWarning")  # after two steps
@pytest.mark.parametrize(
    "strategy",
    [
        vm.Joint("normal"),
        vm.Joint("low_rank"),
        vm.Unrolled("delta", "query", inner_steps=2, minimizer=vm.GradientDescent(1e-5)),
    ],
    ids=["normal", "low_rank", "delta"],
)
def test_thousands_of_weights_take_no_matrix_of_them(strategy: vm.Strategy, tmp_path: Path) -> None:
    """5,181 weights: a D x D matrix has 107 MB in float32, and each of its roots again."""
    tasks = vm.datasets.sinusoids(3, num_support=5, num_query=5)
    model = network(prior_of(5))
    assert model.weights.size == 5181
    with Largest() as seen:
        fit = vm.fit(
            model, tasks, strategy, num_steps=2, compile=False, progress=False,
            optimizer=lambda params: torch.optim.Adam(params, 1e-3),
        )  # fmt: skip
        text = str(fit)
        fit.save(tmp_path / "fit.pt")
        again = vm.load(tmp_path / "fit.pt", network(prior_of(5)))
        fit.posterior().predict([[0.0], [1.0]], num_samples=3)
    assert math.isfinite(fit.loss) and again.loss == fit.loss and "5 directions" in text
    assert seen.bytes < 0.1 * 4 * 5181**2
