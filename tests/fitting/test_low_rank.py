"""Fits under a low-rank prior: against the dense one, scipy, and the iterated minimum."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.common import F64, Largest
from varmeta.guides import closed_form
from varmeta.results.doubts import doubts


def made(
    size: int, number: int = 40, rows: int = 8, rank: int = 1, seed: int = 0, own: float = 0.5
) -> tuple[vm.TaskSet, Tensor]:
    """Linear tasks whose weights are 1 + own e + F z, and F F' + own^2 I."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    columns, found = draw(size, rank), []
    for i in range(number):
        theta = 1.0 + own * draw(size) + columns @ draw(rank)
        x = draw(rows, size)
        found.append(vm.Task((x, x @ theta + 0.3 * draw(rows)), name=str(i)))
    return vm.TaskSet(found), columns @ columns.T + own**2 * torch.eye(size, dtype=F64)


def model(size: int, prior: vm.GaussianPrior) -> vm.TaskModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(size, 1, bias=False).double()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(), prior)


def low_rank(rank: int | None = None, **options: object) -> vm.GaussianPrior:
    return vm.GaussianPrior(learn_precision="low_rank", rank=rank, **options)  # type: ignore[arg-type]


FULL = vm.GaussianPrior(learn_precision="full")


@pytest.mark.parametrize(("size", "rank"), [(3, 1), (3, 2), (4, 3)])
def test_where_it_can_be_any_covariance_it_finds_the_dense_one(size: int, rank: int) -> None:
    """Of three weights one direction and three variances are a covariance already."""
    tasks, _ = made(size)
    fit, dense = (vm.fit(model(size, prior), tasks) for prior in (low_rank(rank), FULL))
    assert fit.converged and abs(fit.loss - dense.loss) < 1e-6
    torch.testing.assert_close(fit.prior.covariance, dense.prior.covariance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fit.prior.correlation.diagonal(), torch.ones(size, dtype=F64))


def test_one_direction_is_found_and_said() -> None:
    tasks, covariance = made(6, number=150)
    fit = vm.fit(model(6, low_rank(1)), tasks)
    sd = covariance.diagonal().sqrt()
    error = fit.prior.correlation - covariance / torch.outer(sd, sd)
    assert fit.converged and float(error.abs().max()) < 0.15  # the sampling error of 150 tasks
    assert fit.prior.factor is not None and fit.prior.factor.shape == (6, 1)
    text = str(fit)
    assert "correlations of the prior" in text and "shared by all weights: one direction" in text
    # as little as the dense prior loses by its fewer numbers: twice the difference is a chi square
    # of 21 - 12 degrees of freedom
    dense = vm.fit(model(6, FULL), tasks)
    assert 0.0 < 2.0 * (fit.loss - dense.loss) < stats.chi2(9).isf(1e-3)


def test_the_evidence_is_scipys_and_the_iteration_ends_there() -> None:
    tasks, _ = made(4, number=60, seed=1)
    fit = vm.fit(model(4, low_rank(1)), tasks)
    total = 0.0
    for task in tasks:
        x, y = task.support  # type: ignore[misc]
        theta0 = fit.prior.loc["weight"].reshape(-1)
        covariance = x @ fit.prior.covariance @ x.T + fit.prior.scale**2 * torch.eye(len(x))  # type: ignore[operator]
        total += stats.multivariate_normal(x @ theta0, covariance).logpdf(y)
    assert fit.loss == pytest.approx(-total, abs=1e-8)
    off = vm.Implicit("multivariate_normal", minimizer=vm.NewtonCG())
    iterated = vm.fit(model(4, low_rank(1)), tasks, off)
    assert abs(iterated.loss - fit.loss) < 1e-8
    evidence = fit.posterior().evidence()
    assert evidence.loc["all", "evidence"] == pytest.approx(-fit.loss, abs=1e-8)


def test_a_direction_too_many_is_no_doubt_and_one_of_a_weights_own_is() -> None:
    """With r = 2 of 3 weights several factors are the same prior: the fit is as certain as any."""
    tasks, _ = made(3)
    fit = vm.fit(model(3, low_rank(2)), tasks)
    assert fit.converged and not doubts(fit, own_end=True)
    tasks, _ = made(6)
    with pytest.warns(RuntimeWarning, match="beside the 2 directions that all weights share"):
        fit = vm.fit(model(6, low_rank(2)), tasks)
    assert fit.converged
    text = " ".join(doubts(fit, own_end=True))
    assert text.count("Heywood") == 1 and "hardly tell" not in text


def test_standard_errors_and_a_task_left_out_are_those_of_the_same_covariance() -> None:
    tasks, _ = made(3)
    fit, dense = (vm.fit(model(3, prior), tasks) for prior in (low_rank(1), FULL))
    assert fit.standard_errors is not None and dense.standard_errors is not None
    torch.testing.assert_close(
        fit.standard_errors["weight"], dense.standard_errors["weight"], rtol=1e-4, atol=0
    )
    assert "std. error" in str(fit)
    ours, wanted = (one.leave_one_task_out(num_samples=2000)["left_out"] for one in (fit, dense))
    # a flat hyperprior is one of each prior's own numbers, which moves an outlying task's most
    assert float((ours - wanted).drop("all").abs().median()) < 0.1
    over = vm.fit(model(3, low_rank(2)), tasks)
    with pytest.raises(ValueError, match="rank=2 is more than 3 weights tell apart.*rank=1"):
        over.leave_one_task_out()


def body(prior: vm.GaussianPrior, width: int, dtype: torch.dtype = F64) -> vm.TaskModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).to(dtype)
    return vm.TaskModel(net, vm.likelihoods.Gaussian(0.2), prior, shared=["0.*"])


def test_a_head_of_many_weights_takes_no_matrix_of_them() -> None:
    """The evidence in the smaller of rows and weights, and its gradient against differences."""
    tasks = vm.datasets.sinusoids(4, num_support=5, dtype=F64)
    network = body(low_rank(3), 2000)
    eta = network.init(torch.zeros((), dtype=F64))
    leaves = {name: value.requires_grad_() for name, value in eta.items()}
    largest = [0]

    def hook(found: Tensor) -> Tensor:
        largest[0] = max(largest[0], found.numel())
        return found

    with torch.autograd.graph.saved_tensors_hooks(hook, lambda kept: kept):
        total = closed_form.log_evidence(network, leaves, tasks.batch().support).sum()
    assert largest[0] < 2001**2 / 10
    gradient = torch.autograd.grad(total, list(leaves.values()))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for (name, value), slope in zip(leaves.items(), gradient, strict=True):
            way = torch.randn(value.shape, generator=generator, dtype=F64)
            ends = [
                closed_form.log_evidence(
                    network, leaves | {name: value + step * way}, tasks.batch().support
                ).sum()
                for step in (-1e-5, 1e-5)
            ]
            want = float((ends[1] - ends[0]) / 2e-5)
            assert float((slope * way).sum()) == pytest.approx(want, rel=1e-5, abs=1e-5), name


def test_points_of_such_a_head_take_none_either() -> None:
    """As ALPaCA and R2-D2 do: the head's weights at their mode, scored on query rows."""
    tasks = vm.datasets.sinusoids(4, num_support=5, num_query=5, dtype=F64)
    network = body(low_rank(3), 2000)
    strategy = vm.Implicit("delta", "query", minimizer=vm.ClosedForm())
    problem = strategy.problem(network, tasks, 0)
    eta = network.init(torch.zeros((), dtype=F64))
    with Largest() as seen:
        phi = closed_form.best(problem.guide, network, eta, tasks.batch().support)
    assert seen.bytes < 8 * 2001**2 / 10 and phi is not None
    # the inner loss is flat there
    leaf = phi["loc"].requires_grad_()
    loss = problem.losses("inner", tasks.batch(), 0)({"loc": leaf}, eta).sum()
    slope = torch.autograd.grad(loss, leaf)[0] * network.prior_distribution(eta).stddev
    assert float(slope.abs().max()) < 1e-9


def test_many_weights_ask_for_draws_only_where_there_are_some() -> None:
    """Beyond 512 weights "auto" draws, but of an evidence that is known nothing is drawn."""
    tasks = vm.datasets.sinusoids(3, num_support=4, num_query=4, dtype=F64)
    network, exact = body(low_rank(3), 600), vm.ClosedForm()
    found = vm.meta_gradient(network, tasks, vm.Implicit("laplace", minimizer=exact))
    eta = network.init(torch.zeros((), dtype=F64))
    known = -closed_form.log_evidence(network, eta, tasks.batch().support).sum()
    assert found.value == pytest.approx(float(known), rel=1e-10)
    with pytest.raises(ValueError, match="outer='query' of the guide laplace needs them with 601"):
        vm.fit(network, tasks, vm.Implicit("laplace", "query", minimizer=exact), num_steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_network_with_such_a_head_is_fitted_and_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    tasks = vm.datasets.sinusoids(8, num_support=5, num_query=5, dtype=dtype)
    network = body(low_rank(), 6, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps
        fit = vm.fit(network, tasks, num_steps=3, progress=False)
    assert fit.history["loss"].iloc[-1] < fit.history["loss"].iloc[0]
    fit.save(tmp_path / "fit.pt")
    again = vm.load(tmp_path / "fit.pt", body(low_rank(), 6, dtype))
    assert again.loss == fit.loss
    torch.testing.assert_close(again.prior.factor, fit.prior.factor)
    with pytest.raises(ValueError, match="rank"):
        vm.load(tmp_path / "fit.pt", body(low_rank(2), 6, dtype))
    assert "prior_sd" in fit.to_arviz(num_samples=10).posterior
    posterior = fit.posterior()
    assert posterior.score(tasks, num_samples=50).log_density.notna().all()
    assert posterior.predict([[0.0], [1.0]], num_samples=3).samples.isfinite().all()


def test_it_is_compared_with_the_dense_prior() -> None:
    tasks, _ = made(3, number=30)
    known, unseen = tasks[:20], tasks[20:].split(0.5)
    report = vm.compare(
        {name: vm.Joint("multivariate_normal") for name in ("full", "low rank")},
        model(3, FULL),
        known,
        unseen,
        1,
        models={"low rank": model(3, low_rank(1))},
        baselines=False,
        progress=False,
    )
    scores = report.table["log_density"]
    assert abs(scores["full"] - scores["low rank"]) < 1e-3


GUIDES = ["delta", "normal", "multivariate_normal", "low_rank", "laplace"]
STRATEGIES: dict[str, Callable[[str], vm.Strategy]] = {
    "Joint": lambda guide: vm.Joint(guide),  # type: ignore[arg-type]
    "Reinit": lambda guide: vm.Reinit(guide),  # type: ignore[arg-type]
    "Implicit": lambda guide: vm.Implicit(guide, "query"),  # type: ignore[arg-type]
    "Unrolled": lambda guide: vm.Unrolled(guide, "query", inner_steps=3),  # type: ignore[arg-type]
    "FirstOrder": lambda guide: vm.FirstOrder(guide, "query", inner_steps=3),  # type: ignore[arg-type]
    "Reptile": lambda guide: vm.Reptile(guide, inner_steps=3),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_route_of_the_dense_prior_is_one_of_it(strategy: str, guide: str) -> None:
    """The meta-gradient of a network of 7 weights is finite, or both priors are refused alike."""
    tasks = vm.datasets.sinusoids(4, num_support=4, num_query=4, dtype=F64)

    def found(prior: vm.GaussianPrior) -> object:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        network = vm.TaskModel(net, vm.likelihoods.Gaussian(1.0), prior)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return vm.meta_gradient(network, tasks, STRATEGIES[strategy](guide)).grads
        except (ValueError, TypeError) as error:
            return str(error)

    ours, dense = found(low_rank(2, precision=10.0)), found(vm.GaussianPrior(10.0, "full"))
    assert type(ours) is type(dense), (ours, dense)
    if isinstance(ours, str):
        assert ours == dense or "a delta guide cannot learn a low-rank prior" in ours
    else:
        assert isinstance(ours, dict)
        assert all(bool(value.isfinite().all()) for value in ours.values())
        assert bool(ours["prior_factor"].any()) or strategy in ("FirstOrder", "Reptile")


def test_hyperguides_are_reml_or_refused() -> None:
    tasks, _ = made(3)
    with pytest.raises(ValueError, match="use hyperguide='reml' or 'delta'"):
        vm.fit(model(3, low_rank(1)), tasks, hyperguide="normal")
    fit, dense = (
        vm.fit(model(3, prior), tasks, hyperguide="reml") for prior in (low_rank(1), FULL)
    )
    assert abs(fit.loss - dense.loss) < 1e-4
    torch.testing.assert_close(fit.prior.covariance, dense.prior.covariance, rtol=1e-2, atol=1e-2)
    assert "cor(weight[0,0], weight[0,1])" in set(fit.hyperparameters().index)


def test_its_raw_prior_is_that_of_the_same_covariance() -> None:
    """What is of low rank in standardised columns is moved as any covariance is."""
    tasks, scaling = made(3)[0].standardized()
    net = nn.Linear(3, 1).double()
    fit = vm.fit(
        vm.TaskModel(net, vm.likelihoods.Gaussian(), low_rank(1)),
        tasks,
        num_steps=2,
        progress=False,
    )
    dense = vm.TaskModel(
        net, vm.likelihoods.Gaussian(), vm.GaussianPrior(covariance=fit.prior.covariance)
    )
    with_it = vm.fit(dense, tasks, num_steps=1, progress=False)
    ours, wanted = fit.raw_prior(scaling), with_it.raw_prior(scaling)
    torch.testing.assert_close(ours.covariance, wanted.covariance)
    assert ours.factor is None and fit.prior.factor is not None


def test_a_hyperprior_holds_each_weights_sd() -> None:
    tasks, _ = made(3)
    narrow = dist.HalfNormal(torch.tensor(0.1, dtype=F64))
    free, held = (
        vm.fit(model(3, prior), tasks)
        for prior in (low_rank(1), low_rank(1, scale_hyperprior=narrow))
    )
    assert float(held.prior.sd["weight"].max()) < float(free.prior.sd["weight"].max())
