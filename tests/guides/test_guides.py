"""Guides between mean-field and dense, and Laplace's: exact posteriors, sizes, graphs, and what is
refused.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import GUIDES, STRUCTURED, known, linear_model, net_model, ragged_tasks, seeded
from tests.common import moved, problem, start
from varmeta.graphs import capture

FEATURES = 6


def regression(prior: vm.GaussianPrior, features: int = FEATURES) -> vm.TaskModel:
    net = seeded(lambda: nn.Linear(features, 1))
    return vm.TaskModel(net, vm.likelihoods.Gaussian(scale=0.4, learn_scale=False), prior)


def exact(
    model: vm.TaskModel, tasks: vm.TaskSet, eta: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and log evidences of the tasks' posteriors, from the normal equations."""
    p = model.prior_distribution(eta)
    covariance = p.covariance_matrix if model.prior.dense else torch.diag(p.variance)
    means, covariances, evidences = [], [], []
    for task in tasks:
        assert task.support is not None
        x, y = task.support
        design = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        posterior = torch.linalg.inv(covariance.inverse() + design.T @ design / 0.16)
        means.append(posterior @ (covariance.inverse() @ p.mean + design.T @ y / 0.16))
        covariances.append(posterior)
        marginal = design @ covariance @ design.T + 0.16 * torch.eye(len(y), dtype=y.dtype)
        evidences.append(dist.MultivariateNormal(design @ p.mean, marginal).log_prob(y))
    return torch.stack(means), torch.stack(covariances), torch.stack(evidences)


DENSE_PRIOR = torch.eye(FEATURES + 1, dtype=torch.float64) + 0.4


@pytest.mark.parametrize(
    ("guide", "prior"),
    [
        ("multivariate_normal", vm.GaussianPrior(2.0)),
        ("multivariate_normal", vm.GaussianPrior(covariance=DENSE_PRIOR)),
        (vm.guides.LowRank(5), vm.GaussianPrior(2.0)),  # the largest task has five observations
        ("laplace", vm.GaussianPrior(2.0)),
        ("laplace", vm.GaussianPrior(covariance=DENSE_PRIOR)),
        (vm.guides.Laplace("gauss_newton"), vm.GaussianPrior(2.0)),
        (vm.guides.Structured(("*",)), vm.GaussianPrior(covariance=DENSE_PRIOR)),
    ],
)
def test_posteriors_of_linear_gaussian_tasks_are_exact(guide: Any, prior: vm.GaussianPrior) -> None:
    """Covariances to 1e-5, evidences to 1e-6 nats."""
    model, tasks = regression(prior), ragged_tasks(3, features=FEATURES)
    strategy = vm.Implicit(guide, tolerance=1e-11)
    fit = known(model, tasks, strategy)
    posterior = fit.posterior()
    mean, covariance, evidence = exact(model, tasks, fit.eta)
    torch.testing.assert_close(model.weights.flatten(posterior.mean), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        posterior.distribution.covariance_matrix.squeeze(1), covariance, rtol=1e-5, atol=1e-5
    )
    losses = posterior.q.problem.losses("elbo", tasks.batch(), 0)(posterior.q.phi, fit.eta)
    torch.testing.assert_close(-losses, evidence, rtol=0, atol=1e-6)


def test_structured_is_dense_inside_its_block_and_mean_field_outside() -> None:
    """With independent halves of the weights the family holds the posterior exactly; otherwise it
    is a lower bound.
    """
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    design[:20, 3:], design[20:, :3] = 0.0, 0.0
    design[:, 3:] = torch.linalg.qr(design[:, 3:])[0]  # no correlations there
    y = torch.randn(40, generator=generator, dtype=torch.float64)
    tasks = vm.TaskSet([vm.Task((design, y))])

    def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
        mean = (params["a"] * x[..., :3]).sum(-1) + (params["b"] * x[..., 3:]).sum(-1)
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    model = vm.TaskModel.from_pyro(program, {"a": (3,), "b": (3,)}, vm.GaussianPrior(1.0))
    losses = {}
    for guide in ("normal", vm.guides.Structured(("a",)), "multivariate_normal"):
        fit = known(model, tasks, vm.Implicit(guide))
        losses[str(guide)] = fit.loss
        if isinstance(guide, vm.guides.Structured):
            found = fit.posterior().distribution.covariance_matrix.squeeze()
            expected = torch.linalg.inv(torch.eye(6, dtype=torch.float64) + 4.0 * design.T @ design)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert losses["structured(dense=a)"] == pytest.approx(losses["multivariate_normal"], abs=1e-8)
    assert losses["normal"] > losses["multivariate_normal"] + 1e-3


def test_more_freedom_brings_the_bound_nearer() -> None:
    model, tasks = net_model(vm.GaussianPrior(1.0), width=2), ragged_tasks(3)
    guides = ["normal", vm.guides.LowRank(1), vm.guides.LowRank(2), "multivariate_normal"]
    # the losses differ by far more than what a flat valley leaves open
    how = {"expectation": "cubature", "on_unconverged": "ignore", "tolerance": 1e-6}
    losses = [known(model, tasks, vm.Implicit(guide, **how)).loss for guide in guides]
    assert all(a > b + 1e-3 for a, b in pairwise(losses))
    block = known(model, tasks, vm.Implicit(STRUCTURED, **how)).loss
    assert losses[0] > block > losses[-1]


@pytest.mark.parametrize(
    ("guide", "numbers"),
    [
        ("normal", 28 + 28),
        ("multivariate_normal", 28 + 28 + 28 * 27 // 2),
        ("low_rank", 28 + 28 + 28 * 5 - 10),
        (vm.guides.LowRank(1), 28 + 28 + 28),
        (vm.guides.LowRank(28), 28 + 28 + 28 * 27 // 2),  # no more than dense
        (vm.guides.Structured(("2.*",)), 28 + 28 + 10 * 9 // 2),
        ("laplace", 28),
    ],
)
def test_numbers_per_task(guide: Any, numbers: int) -> None:
    model, batch = net_model(vm.GaussianPrior(1.0), width=9), ragged_tasks(3).batch()
    phi = problem(model, guide).start(batch, start(model))
    assert sum(value[0].numel() for value in phi.values()) == numbers


def test_low_rank_starts_near_the_prior() -> None:
    for prior in (vm.GaussianPrior(3.0), vm.GaussianPrior(covariance=DENSE_PRIOR)):
        model, batch = regression(prior), ragged_tasks(3, features=FEATURES).batch()
        made, eta = problem(model, "low_rank"), start(model)
        q, p = (
            made.guide.distribution(made.start(batch, eta), eta, batch.support),
            model.prior_distribution(eta),
        )
        torch.testing.assert_close(q.mean, p.mean.expand_as(q.mean), rtol=0, atol=0)
        torch.testing.assert_close(q.stddev, p.stddev.expand_as(q.mean), rtol=0.1, atol=0)
        spread = q.stddev.unsqueeze(-1) * q.stddev.unsqueeze(-2)
        expected = p.covariance_matrix if prior.dense else torch.diag(p.variance)
        expected = expected / torch.outer(p.stddev, p.stddev)
        off = (q.covariance_matrix / spread - expected).abs()
        assert 0 < float(off.max()) < 0.1


@pytest.mark.parametrize("outer", ["elbo", "query", "query_predictive"])
@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_gradients_can_be_captured(guide: Any, outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph of plain tensor operations, whose numbers at another point are those of the eager
    run.
    """
    model, batch = net_model(vm.GaussianPrior(2.0, "shared")), ragged_tasks(3).batch()
    made, eta = problem(model, guide), start(model)
    losses = made.losses(outer, batch, 0)
    batch.support.filled, batch.query.filled  # noqa: B018 (outside of the graph)

    def gradient(inputs: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        leaves = {
            kind: {n: v.detach().requires_grad_() for n, v in tree.items()}
            for kind, tree in inputs.items()
        }
        with torch.enable_grad():
            flat = [*leaves["phi"].values(), *leaves["eta"].values()]
            value = losses(leaves["phi"], leaves["eta"])
            found = torch.autograd.grad(
                value.sum(), flat, allow_unused=True, materialize_grads=True
            )
        return {"value": value.detach(), "gradients": list(found)}

    monkeypatch.setattr(capture, "compile_graph", lambda graph, examples: graph)
    captured = capture.Captured(gradient)
    for seed in (1, 2):
        point = {"phi": moved(made.start(batch, eta), seed=seed), "eta": moved(eta, seed=seed)}
        eager, traced = gradient(point), captured(point)
        torch.testing.assert_close(traced["value"], eager["value"], rtol=1e-10, atol=1e-10)
        for a, b in zip(traced["gradients"], eager["gradients"], strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-8, atol=1e-10
            )  # H is nearly singular at some points
    assert len(captured._made) == 1


@pytest.mark.parametrize("guide", [vm.guides.LowRank(2), STRUCTURED, "laplace"], ids=str)
def test_through_fit_adapt_and_disk(guide: Any, tmp_path: Any) -> None:
    tasks = ragged_tasks(5)
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)))
    # with a noise scale to learn, Laplace's evidence of so few rows has no maximum
    model = vm.TaskModel(
        net, vm.likelihoods.Gaussian(0.5, learn_scale=False), vm.GaussianPrior(2.0, "shared")
    )
    strategy = vm.Implicit(guide) if guide == "laplace" else vm.Joint(guide, expectation="cubature")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # so few steps
        fit = vm.fit(model, tasks, strategy, num_steps=3)
        again = vm.fit(model, tasks, strategy, num_steps=4, resume=fit)
    assert fit.run.step == 3 and again.run.step == 4
    fit.save(tmp_path / "fit.pt")
    loaded = vm.load(tmp_path / "fit.pt", model)
    assert loaded.strategy == fit.strategy
    new = ragged_tasks(3, seed=4)
    same = torch.testing.assert_close
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # under such a prior a task may end at a saddle
        same(loaded.adapt(new).draws(5), fit.adapt(new).draws(5), rtol=0, atol=0)
    same(loaded.posterior().draws(5), fit.posterior().draws(5), rtol=0, atol=0)
    assert str(guide).partition("(")[0] in str(fit)
    assert fit.posterior().score(num_samples=20)["log_density"].notna().all()


def test_a_task_without_data_gets_the_prior() -> None:
    model = net_model(vm.GaussianPrior(4.0), width=2)
    for guide in ("low_rank", STRUCTURED, "laplace"):
        fit = known(model, ragged_tasks(3), vm.Implicit(guide))
        q = fit.adapt(vm.TaskSet([vm.Task(name="new")])).distribution
        expected = 0.25 * torch.eye(7, dtype=torch.float64)
        torch.testing.assert_close(q.covariance_matrix.squeeze(), expected, rtol=0, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: vm.guides.LowRank(0), ValueError, "rank must be"),
        (lambda: vm.guides.LowRank(1.5), (TypeError, ValueError), "rank must be"),
        (lambda: vm.guides.Structured("head.*"), TypeError, "dense must be a list of patterns"),
        (lambda: vm.guides.Structured(()), ValueError, "dense is empty"),
        (lambda: vm.guides.Laplace("fisher"), ValueError, "hessian must be one of"),
    ],
)
def test_bad_options(make: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_pattern_without_a_match_is_refused_before_any_work() -> None:
    with pytest.raises(
        ValueError,
        match=r"dense='head.\*' matches none of the weights that vary, \['bias', 'weight'\]",
    ):
        vm.fit(
            linear_model(vm.GaussianPrior(1.0)),
            ragged_tasks(2),
            vm.Joint(vm.guides.Structured(("head.*",))),
        )


def test_a_guide_that_is_not_bound_says_so() -> None:
    with pytest.raises(RuntimeError, match="bound to a model first"):
        vm.guides.Laplace().model  # noqa: B018


def test_guides_with_other_options_are_told_apart() -> None:
    """A graph that was made under one is not used under another."""
    model = net_model(vm.GaussianPrior(1.0))
    options = [
        vm.guides.LowRank(1),
        vm.guides.LowRank(2),
        vm.guides.Laplace("exact"),
        vm.guides.Laplace("gauss_newton"),
        vm.guides.Structured(("0.*",)),
        vm.guides.Structured(("2.*",)),
        vm.guides.Dense(),
        vm.guides.MeanField(),
    ]
    assert len({guide.bound(model).key for guide in options}) == len(options)
    again = vm.guides.Laplace("exact").bound(net_model(vm.GaussianPrior(2.0)))
    assert again.key == options[2].key


@pytest.mark.parametrize(
    "guide", ["multivariate_normal", vm.guides.Structured(("*",)), vm.guides.LowRank(4)]
)
def test_memory_of_correlated_guides_grows_with_the_square_of_the_weights(guide: Any) -> None:
    """Of a gradient by cubature, all operations counted: per task and squared weight it does not
    grow.
    """

    def bytes_of(size: int, count: int) -> float:
        tasks = ragged_tasks(count, features=size)
        model = vm.TaskModel(
            nn.Linear(size, 1, bias=False).double(),
            vm.likelihoods.Gaussian(),
            vm.GaussianPrior(2.0),
        )
        built = vm.Joint(guide, expectation="cubature").problem(model, tasks, 0)
        batch = tasks.batch()
        graph = built.gradient_graph("elbo", batch, model.init(batch.support.x.new_zeros(())))
        return capture.graph_bytes(graph) / (count * size**2)

    small, large = bytes_of(16, 4), bytes_of(64, 4)
    assert large <= 1.2 * small
    assert bytes_of(64, 8) <= 1.05 * large
