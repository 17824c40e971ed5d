"""The per-task objectives against exact posteriors, Pyro's own ELBOs, quadrature and difference
quotients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch import Tensor, nn

import varmeta as vm
from tests.cases import GUIDES, OUTERS, linear_model, net_model, ragged_tasks, seeded
from tests.common import F64, moved, problem, randn, start, with_grad
from varmeta.guides.kl import kl, move
from varmeta.numerics.noise import task_id
from varmeta.priors.factors import unit_lower
from varmeta.strategies.expectation import Cubature, MonteCarlo, Point, make_expectation

PRIORS: dict[str, Any] = {
    "shared": lambda: vm.GaussianPrior(1.7, "shared"),
    "full": lambda: vm.GaussianPrior(learn_precision="full", covariance=[[1.0, 0.4], [0.4, 0.7]]),
}


def gaussian(kind: str, seed: int, size: int = 3) -> dist.TorchDistribution:
    """Batch shape (2, 1)."""
    loc, sd = randn(2, 1, size, seed=seed), randn(2, 1, size, seed=seed + 1).exp()
    if kind == "diagonal":
        return dist.Normal(loc, sd).to_event(1)
    lower = unit_lower(randn(2, 1, size * (size - 1) // 2, seed=seed + 2), size)
    return dist.MultivariateNormal(loc, scale_tril=sd.unsqueeze(-1) * lower)


# -- divergence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_kind", ["diagonal", "dense"])
@pytest.mark.parametrize("p_kind", ["diagonal", "dense"])
def test_kl_is_torchs_and_monte_carlos(q_kind: str, p_kind: str) -> None:
    q, p = gaussian(q_kind, 1), gaussian(p_kind, 5)
    value = kl(q, p)

    def dense(d: Any) -> Any:
        if isinstance(d, torch.distributions.MultivariateNormal):
            return d
        return torch.distributions.MultivariateNormal(d.mean, torch.diag_embed(d.variance))

    torch.testing.assert_close(
        value, torch.distributions.kl_divergence(dense(q), dense(p)), rtol=1e-12, atol=1e-12
    )
    theta = move(q, randn(200_000, 1, 1, 3, seed=9))
    sampled = (q.log_prob(theta) - p.log_prob(theta)).double()
    error = sampled.std(0) / math.sqrt(len(sampled))
    assert bool(((sampled.mean(0) - value).abs() < 4 * error).all())


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_points_have_the_moments_of_the_guide(kind: str) -> None:
    q = gaussian(kind, 1)
    theta = move(
        q, Cubature().points(3, torch.zeros((), dtype=F64), torch.zeros(1), 0, 0).unsqueeze(-2)
    )
    torch.testing.assert_close(theta.mean(0), q.mean, rtol=1e-13, atol=1e-13)
    centred = theta - q.mean
    covariance = torch.einsum("ptud,ptue->tude", centred, centred) / len(theta)
    expected = q.covariance_matrix if kind == "dense" else torch.diag_embed(q.variance)
    torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-12)
    point = dist.Delta(q.mean, event_dim=1)
    assert torch.equal(move(point, torch.ones(4, 1, 1, 3, dtype=F64)), q.mean.expand(4, 2, 1, 3))


def test_a_family_without_closed_form_raises() -> None:
    p = gaussian("diagonal", 1)
    heavy = dist.StudentT(torch.tensor(3.0, dtype=F64), p.mean, 1.0).to_event(1)
    low_rank = dist.LowRankMultivariateNormal(
        p.mean, torch.ones(3, 1, dtype=F64), torch.ones(3, dtype=F64)
    )
    for q in (heavy, low_rank, dist.Normal(p.mean, 1.0)):
        with pytest.raises(TypeError, match="no closed form"):
            kl(q, p)


# -- expectation -----------------------------------------------------------------------------------


def test_monte_carlo_is_antithetic_standard_normal_and_follows_the_task() -> None:
    rule, like = MonteCarlo(20_000), torch.zeros((), dtype=F64)
    ids = torch.tensor([task_id(name) for name in "abc"])
    points = rule.points(2, like, ids, 3, 7)
    assert points.shape == (20_000, 3, 2)
    assert torch.equal(points[:10_000], -points[10_000:])
    assert float(points.mean(0).abs().max()) < 1e-15
    half = points[:10_000].reshape(10_000, -1)
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in half.T.numpy())
    assert float((torch.corrcoef(half.T) - torch.eye(6, dtype=F64)).abs().max()) < 0.05
    order = torch.tensor([2, 0])
    assert torch.equal(rule.points(2, like, ids[order], 3, 7), points[:, order])
    assert not torch.equal(rule.points(2, like, ids, 3, 8), points)
    assert not torch.equal(rule.points(2, like, ids, 4, 7), points)


@pytest.mark.parametrize("expectation", ["cubature", "monte_carlo"])
def test_a_minibatch_in_any_order_has_the_losses_of_the_whole(expectation: str) -> None:
    model, tasks = net_model(vm.GaussianPrior(1.0)), ragged_tasks(4)
    eta, batch = start(model), tasks.batch()
    made = problem(model, "normal", expectation)
    phi = moved(made.start(batch, eta))
    for name in OUTERS:
        whole = made.losses(name, batch, 5)(phi, eta)
        assert torch.equal(
            whole, problem(model, "normal", expectation).losses(name, tasks.batch(), 5)(phi, eta)
        )
        for rows in ([3, 0], [2]):
            part = made.losses(name, tasks.batch(rows), 5)(
                {key: value[rows] for key, value in phi.items()}, eta
            )
            torch.testing.assert_close(part, whole[rows], rtol=1e-12, atol=1e-12)
    noisy = made.losses("elbo", batch, 6)(phi, eta)
    assert torch.equal(noisy, made.losses("elbo", batch, 5)(phi, eta)) == (
        expectation == "cubature"
    )


def test_two_points_are_no_bound_for_binary_data_and_many_are() -> None:
    """Four equal answers with intercepts of sd 5: the optimal two-point "bound" exceeds the log
    likelihood.
    """
    y = torch.ones(4, dtype=F64)
    tasks = vm.TaskSet([vm.Task((torch.zeros(4, 0, dtype=F64), y))])
    model = vm.TaskModel(
        vm.LinearPredictor([]).double(), vm.likelihoods.Bernoulli(), vm.GaussianPrior(1 / 25)
    )
    z, w = np.polynomial.hermite_e.hermegauss(80)
    exact = float(np.log((w / np.sqrt(2 * np.pi)) @ (1 / (1 + np.exp(-5 * z))) ** 4))
    found = {rule: _best(model, tasks, rule) for rule in ("cubature", "quadrature")}
    assert found["quadrature"] < exact < found["cubature"]
    assert found["quadrature"] == pytest.approx(exact, abs=0.1)


def _best(model: vm.TaskModel, tasks: vm.TaskSet, rule: str) -> float:
    strategy = vm.Joint("normal", expectation=rule)
    made, eta = strategy.problem(model, tasks, 0), model.init(torch.zeros((), dtype=F64))
    phi = strategy.adapt(made, tasks.batch(), eta).value
    return -float(made.losses("elbo", tasks.batch(), 0)(phi, eta))


def test_which_rule_is_taken() -> None:
    assert make_expectation("auto", 24, 2, linear=True, frozen=False) == Cubature()
    assert make_expectation("auto", 25, 2, linear=True, frozen=False) == MonteCarlo(2)
    assert make_expectation("auto", 10, 2, linear=False, frozen=False) == MonteCarlo(2)
    assert make_expectation("auto", 100, 2, linear=True, frozen=True) == Cubature()
    assert make_expectation("auto", 60, 2, linear=False, frozen=True) == Cubature(rotations=8)
    assert make_expectation("auto", 100, 2, linear=False, frozen=True) == MonteCarlo(2)
    assert make_expectation("monte_carlo", 3, 8, linear=True, frozen=True) == MonteCarlo(8)
    with pytest.raises(ValueError, match="'quantiles' has gone: 'quadrature'"):
        make_expectation("quantiles", 1, 2, linear=True, frozen=False)
    assert make_expectation(Point(), 3, 2, linear=True, frozen=True) == Point()
    for particles in (0, 1, 3):
        with pytest.raises(ValueError, match="even number"):
            MonteCarlo(particles)
    with pytest.raises(ValueError, match="expectation must be"):
        make_expectation("simpson", 3, 2, True, False)
    with pytest.raises(TypeError, match="a name or a rule"):
        make_expectation(3, 3, 2, True, False)  # type: ignore[arg-type]


def test_the_predictive_objective_is_one_function_where_the_problem_is_deterministic() -> None:
    model, batch = linear_model(vm.GaussianPrior(1.0)), ragged_tasks(3).batch()
    for expectation, fixed in (("cubature", True), ("monte_carlo", False)):
        made, eta = problem(model, "normal", expectation), start(model)
        phi = made.start(batch, eta)
        first, second = (made.losses("query_predictive", batch, step)(phi, eta) for step in (0, 1))
        assert torch.equal(first, second) == fixed == made.deterministic


# -- exact answers ---------------------------------------------------------------------------------


def exact(
    model: vm.TaskModel, eta: dict[str, Tensor], data: Any, sd: float
) -> list[tuple[Tensor, Tensor, float]]:
    """Posterior mean, covariance and -log evidence of every task of a linear regression with
    intercept, by scipy.
    """
    p = model.prior_distribution(eta)
    root = (
        p.scale_tril
        if isinstance(p, torch.distributions.MultivariateNormal)
        else torch.diag(p.stddev)
    )
    prior = root @ root.T
    answers = []
    for x, y, mask in zip(data.x, data.y, data.mask, strict=True):
        design = torch.cat([x[mask], torch.ones(int(mask.sum()), 1, dtype=F64)], -1)
        covariance = torch.linalg.inv(torch.linalg.inv(prior) + design.T @ design / sd**2)
        mean = covariance @ (torch.linalg.inv(prior) @ p.mean + design.T @ y[mask] / sd**2)
        evidence = 0.0
        if len(design):
            marginal = design @ prior @ design.T + sd**2 * torch.eye(len(design), dtype=F64)
            evidence = float(
                stats.multivariate_normal(design @ p.mean, marginal).logpdf(y[mask].numpy())
            )
        answers.append((mean, covariance, -evidence))
    return answers


@pytest.mark.parametrize("kind", PRIORS)
def test_dense_guide_at_the_exact_posterior_has_the_log_evidence(kind: str) -> None:
    model = linear_model(PRIORS[kind]())
    tasks = vm.TaskSet([*ragged_tasks(3), vm.Task(name="no data")])
    batch, eta = tasks.batch(), moved(start(model))
    sd = float(eta["log_scale"].exp())
    answers = exact(model, eta, batch.support, sd)
    evidence = torch.tensor([answer[2] for answer in answers], dtype=F64)
    roots = torch.stack([torch.linalg.cholesky(answer[1]) for answer in answers])
    spread = roots.diagonal(dim1=-2, dim2=-1)
    dense = {
        "loc": torch.stack([answer[0] for answer in answers]),
        "log_scale": spread.log(),
        "tril": (roots / spread.unsqueeze(-1))[:, 1, :1],
    }
    made = problem(model, "multivariate_normal", "cubature")
    losses = made.losses("elbo", batch, 0)(dense, eta)
    torch.testing.assert_close(losses, evidence, rtol=1e-10, atol=1e-10)
    phi = with_grad(dense)
    for gradient in torch.autograd.grad(
        made.losses("elbo", batch, 0)(phi, eta).sum(), list(phi.values())
    ):
        assert float(gradient.abs().max()) < 1e-10
    # the best mean-field guide: exact mean, 1 / diagonal of the posterior precision; its bound is
    # below
    precisions = torch.stack([torch.linalg.inv(answer[1]).diagonal() for answer in answers])
    best = {"loc": dense["loc"], "log_scale": -0.5 * precisions.log()}
    mean_field = problem(model, "normal", "cubature").losses("elbo", batch, 0)(best, eta)
    # KL[mean field || posterior] = 1/2 log(prod diag(P) / det P)
    covariances = torch.stack([answer[1] for answer in answers])
    gap = 0.5 * (precisions.log().sum(-1) + torch.logdet(covariances))
    torch.testing.assert_close(mean_field, evidence + gap, rtol=1e-10, atol=1e-10)
    assert bool((gap[:3] > 1e-4).all())
    # everything but the mean is off by the KL to the posterior, which only a sampled expectation
    # would blur
    wrong = moved(dense)
    assert bool((made.losses("elbo", batch, 0)(wrong, eta) > evidence).all())


def test_monte_carlo_agrees_with_quadrature() -> None:
    """One weight, a nonlinear mean: E_q f by Gauss-Hermite."""
    model = vm.TaskModel.from_pyro(
        lambda params, x, y: pyro.sample("y", dist.Normal(torch.sin(params["w"] * x), 0.5), obs=y),
        {"w": ()},
    )
    x, y = randn(5), randn(5, seed=2)
    batch, eta = vm.TaskSet([vm.Task((x, y), query=(x, y))]).batch(), start(model)
    phi = {"loc": torch.tensor([[0.4]], dtype=F64), "log_scale": torch.tensor([[-0.7]], dtype=F64)}
    nodes, weights = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    w = 0.4 + math.exp(-0.7) * nodes
    logs = dist.Normal(torch.sin(w[:, None] * x), 0.5).log_prob(y).sum(-1)
    made = problem(model, "normal", "monte_carlo", 100_000)
    noise = made.expectation.points(1, eta["w"], batch.ids, 0, 0)
    nll = made.objective.terms(phi, eta, batch.support, noise)[1][:, 0]
    pairs = nll.reshape(2, -1).mean(0)
    expected = -float((weights * logs).sum())
    assert abs(float(nll.mean()) - expected) < 4 * float(pairs.std()) / math.sqrt(len(pairs))
    predictive = float(made.objective.query_predictive(phi, eta, batch, noise))
    assert predictive == pytest.approx(-math.log(float((weights * logs.exp()).sum())), rel=2e-2)


@pytest.mark.parametrize(
    ("guide", "kind"),
    # Pyro has no analytic KL between a diagonal and a dense Gaussian, and samples it without a word
    [("delta", "shared"), ("delta", "full"), ("normal", "shared"), ("multivariate_normal", "full")],
)
def test_losses_sum_to_pyros_own_elbo(guide: str, kind: str) -> None:
    """Trace_ELBO for a point; TraceMeanField_ELBO, whose KL is analytic too, at the same draw."""
    model, batch = linear_model(PRIORS[kind]()), ragged_tasks(4).batch()
    eta = moved(start(model))
    made = problem(model, guide)
    phi = moved(made.start(batch, eta))

    def run_guide(eta: Any, data: Any) -> Any:
        return made.guide(phi, eta, data)

    size = model.weights.size
    if guide == "delta":
        noise = torch.zeros(1, 1, size, dtype=F64)
        expected = Trace_ELBO().loss(model, run_guide, eta, batch.support)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theta = (
                pyro.poutine.trace(run_guide).get_trace(eta, batch.support).nodes["theta"]["value"]
            )
            torch.manual_seed(0)
            expected = TraceMeanField_ELBO().loss(model, run_guide, eta, batch.support)
        q = made.guide.distribution(phi, eta, batch.support)
        offset = theta - q.mean
        if guide == "normal":
            noise = (offset / q.stddev).squeeze(-2).unsqueeze(0)
        else:
            noise = torch.linalg.solve_triangular(q.scale_tril, offset.unsqueeze(-1), upper=False)
            noise = noise.squeeze(-1).squeeze(-2).unsqueeze(0)
    assert float(made.objective(phi, eta, batch, noise).sum()) == pytest.approx(expected, rel=1e-12)


def test_theta0s_gradient_is_exact_whatever_the_noise() -> None:
    """d sum_i F_i / d theta0 = lambda sum_i (theta0 - loc_i): no variance, for the KL is
    analytic.
    """
    model, batch = net_model(vm.GaussianPrior(1.3)), ragged_tasks(4).batch()
    for guide in ("normal", "multivariate_normal"):
        made = problem(model, guide, "monte_carlo", 2)
        eta = with_grad(moved(start(model)))
        phi = {name: value.detach() for name, value in moved(made.start(batch, eta)).items()}
        theta0 = model.weights.flatten(eta)
        expected = 1.3 * (theta0 - phi["loc"]).sum(0)
        draws = []
        for step in range(5):
            losses = made.losses("elbo", batch, step)(phi, eta)
            gradients = torch.autograd.grad(
                losses.sum(), [eta[name] for name in model.weights.names]
            )
            draws.append(
                model.weights.flatten(dict(zip(model.weights.names, gradients, strict=True)))
            )
            torch.testing.assert_close(draws[-1], expected, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(draw, draws[0]) for draw in draws)


def test_the_four_objectives_are_made_of_one_kl_and_two_losses() -> None:
    model, tasks = net_model(vm.GaussianPrior(1.3)), ragged_tasks(4)
    batch, eta = tasks.batch(), start(model)
    made = problem(model, "normal", "monte_carlo", 80)
    phi = moved(made.start(batch, eta))
    noise = made.expectation.points(model.weights.size, eta["0.bias"], batch.ids, 3, 0)
    divergence, support = made.objective.terms(phi, eta, batch.support, noise)
    assert batch.query is not None
    _, query = made.objective.terms(phi, eta, batch.query, noise)
    values = {name: made.losses(name, batch, 0)(phi, eta) for name in OUTERS}
    same = torch.testing.assert_close
    same(values["elbo"], divergence + support.mean(0))
    same(values["query_elbo"], divergence + query.mean(0))
    same(values["query"], query.mean(0))
    same(values["query_predictive"], -(-query).exp().mean(0).log())
    assert bool((values["query_predictive"] <= values["query"]).all())  # Jensen
    # a logarithm of a mean over two draws would be far too large: never fewer than 64
    few = problem(model, "normal", "monte_carlo", 2)
    noise = MonteCarlo(64).points(model.weights.size, eta["0.bias"], batch.ids, 3, 0)
    _, query = made.objective.terms(phi, eta, batch.query, noise)
    same(few.losses("query_predictive", batch, 0)(phi, eta), -(-query).exp().mean(0).log())
    with pytest.raises(ValueError, match="unknown outer objective"):
        made.losses("evidence", batch, 0)
    without = vm.TaskSet([vm.Task(task.support) for task in tasks]).batch()
    with pytest.raises(ValueError, match="no query data"):
        made.losses("query", without, 0)(phi, eta)


def test_tasks_without_support_or_query_count_for_nothing_but_their_kl() -> None:
    model = linear_model(vm.GaussianPrior(2.0))
    full = ragged_tasks(2)
    tasks = vm.TaskSet(
        [full[0], vm.Task(name="empty"), vm.Task(query=full[1].query, name="query only")]
    )
    batch, eta = tasks.batch(), start(model)
    for guide in GUIDES:
        made = problem(model, guide)
        phi = moved(made.start(batch, eta))
        q = made.guide.distribution(phi, eta, batch.support)
        divergence = kl(q, model.prior_distribution(eta)).squeeze(-1)
        torch.testing.assert_close(made.losses("elbo", batch, 0)(phi, eta)[1:], divergence[1:])
        assert float(made.losses("query", batch, 0)(phi, eta)[1]) == 0.0
        assert float(made.losses("query_predictive", batch, 0)(phi, eta)[1]) == pytest.approx(
            0.0, abs=1e-15
        )
        assert float(made.losses("query", batch, 0)(phi, eta)[2]) > 0.0


# -- derivatives -----------------------------------------------------------------------------------


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    mean = torch.tanh((params["w"] * x).sum(-1)) + params["shift"]
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_second_derivatives_in_phi_and_eta(guide: Any, outer: str, kind: str) -> None:
    """gradgradcheck: what Newton steps, implicit and unrolled gradients rest on."""
    start_at = {"w": randn(2), "log_sd": torch.tensor(-0.3), "shift": torch.tensor(0.2)}
    model = vm.TaskModel.from_pyro(program, start_at, PRIORS[kind](), shared=["log_sd", "shift"])
    batch, made = ragged_tasks(2, features=2).batch(), problem(model, guide)
    eta = with_grad(moved(start(model)))
    phi = with_grad(moved(made.start(batch, eta)))
    names = [*phi], [*eta]
    losses = made.losses(outer, batch, 0)

    def function(*values: Tensor) -> Tensor:
        point = dict(zip(names[0], values, strict=False))
        shared = dict(zip(names[1], values[len(point) :], strict=True))
        return losses(point, shared) + 0.0 * sum(value.sum() for value in values)

    inputs = (*phi.values(), *eta.values())
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5, rtol=1e-4)


def test_float32_stays_float32() -> None:
    net = seeded(lambda: nn.Linear(1, 1))
    model = vm.TaskModel(net, vm.likelihoods.StudentT(), PRIORS["full"]())
    batch = ragged_tasks(3).to(dtype=torch.float32).batch()
    eta = model.init(batch.support.x.new_zeros(()))
    assert {value.dtype for value in eta.values()} == {torch.float32}
    for guide in GUIDES:
        for expectation in ("cubature", "monte_carlo"):
            made = problem(model, guide, expectation, 2)
            for name in OUTERS:
                assert (
                    made.losses(name, batch, 0)(made.start(batch, eta), eta).dtype == torch.float32
                )
