"""`ClosedForm` as an inner minimiser: the numbers of the iterated ones, and when it is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import OUTERS, linear_model, net_model, ragged_tasks, seeded
from tests.linear_gaussian import MODELS, dense_evidence, moved

ITERATED = vm.NewtonCG()


@pytest.mark.parametrize("guide", ["multivariate_normal", "normal", "delta", "laplace"])
@pytest.mark.parametrize("outer", OUTERS[:3])
@pytest.mark.parametrize("case", ["full", "head", "covariates", "two outputs"])
def test_value_and_gradient_are_those_of_the_iterated_minimum(
    case: str, outer: str, guide: str
) -> None:
    model, tasks = MODELS[case]()
    eta = moved(model)
    kinds = [
        vm.Implicit(guide, outer, minimizer=minimizer, tolerance=1e-12)
        for minimizer in (vm.ClosedForm(), ITERATED)
    ]
    exact, iterated = (vm.meta_gradient(model, tasks, kind, eta=eta) for kind in kinds)
    assert exact.value == pytest.approx(iterated.value, rel=1e-8)
    for name, gradient in iterated.grads.items():
        torch.testing.assert_close(exact.grads[name], gradient, rtol=1e-6, atol=1e-7)
    assert exact.certificate is not None and exact.certificate.ok
    assert float(exact.certificate.decrement.max()) < 1e-20


@pytest.mark.parametrize("case", ["full", "head", "two outputs", "covariates"])
def test_the_predictive_density_is_exact(case: str) -> None:
    """Where the iterated strategy takes 64 draws: -log p(query | support), as ALPaCA has it."""
    model, tasks = MODELS[case]()
    eta = moved(model)
    strategy = vm.Implicit("multivariate_normal", "query_predictive")
    value = vm.meta_gradient(model, tasks, strategy, eta=eta).value
    both = dense_evidence(model, eta, tasks, query=True) - dense_evidence(model, eta, tasks)
    assert value == pytest.approx(-float(both.sum()), rel=1e-10)


@pytest.mark.parametrize("strategy", [vm.Joint, vm.Reinit, vm.Implicit])
def test_a_dense_guide_takes_it_by_itself(strategy: type) -> None:
    model, tasks = MODELS["full"]()
    chosen = strategy("multivariate_normal")
    assert chosen.traits(chosen.problem(model, tasks, 0)).closed_form
    for guide in ("normal", "delta") if strategy is vm.Implicit else ("normal",):
        other = strategy(guide)
        assert not other.traits(other.problem(model, tasks, 0)).closed_form
    asked = strategy("multivariate_normal", minimizer=vm.Adam(1e-2))
    assert not asked.traits(asked.problem(model, tasks, 0)).closed_form
    by_draws = strategy("multivariate_normal", expectation="monte_carlo")
    assert not by_draws.traits(by_draws.problem(model, tasks, 0)).closed_form


def test_one_weight_has_no_correlations_to_miss() -> None:
    model = vm.TaskModel(
        vm.LinearPredictor([]).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )
    joint = vm.Joint("normal")
    assert joint.traits(joint.problem(model, ragged_tasks(features=0), 0)).closed_form


def test_what_is_not_known_is_iterated() -> None:
    tasks = ragged_tasks()
    prior = vm.GaussianPrior(1.0)
    student = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.StudentT(), prior)
    own_noise = vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), vm.likelihoods.Gaussian(per_task=True), prior
    )
    for model in (student, own_noise, net_model(prior)):
        joint = vm.Joint("multivariate_normal")
        assert not joint.traits(joint.problem(model, tasks, 0)).closed_form


def test_what_it_does_not_serve_is_refused() -> None:
    tasks, prior = ragged_tasks(), vm.GaussianPrior(1.0)
    with pytest.raises(ValueError, match="linear in the weights that vary by construction"):
        vm.meta_gradient(net_model(prior), tasks, vm.Implicit(minimizer=vm.ClosedForm()))
    with pytest.raises(ValueError, match="does not know the minimum of the guide low_rank"):
        vm.fit(linear_model(prior), tasks, vm.Joint("low_rank", minimizer=vm.ClosedForm()))
    with pytest.raises(ValueError, match="ClosedForm takes no inner steps: leave out inner_steps"):
        vm.Implicit(minimizer=vm.ClosedForm(), inner_steps=5)
    with pytest.raises(TypeError, match=r"vm\.ClosedForm\(\)"):
        vm.fit(linear_model(prior), tasks, vm.Implicit(minimizer="closed_form"))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", MODELS)
def test_adaptation_is_that_of_the_iterated_guide(case: str) -> None:
    model, tasks = MODELS[case]()
    eta, batch = moved(model), tasks.batch()
    found = []
    for minimizer in (None, vm.Adam(1e-2)):
        strategy = vm.Joint("multivariate_normal", minimizer=minimizer)
        problem = strategy.problem(model, tasks, 0)
        found.append(strategy.adapt(problem, batch, eta).value)
    for name, value in found[1].items():  # which ends where its gradient is 1e-8 of the first
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)


def test_minibatches_and_a_compiled_step_learn_a_body() -> None:
    """A shared body under the exact evidence: nothing is stored for a task, and the compiled step
    is the eager one.
    """
    model, tasks = MODELS["head"]()
    ends = [
        vm.fit(
            model, tasks, vm.Joint("multivariate_normal"), 20, lambda p: torch.optim.Adam(p, 1e-2),
            batch_size=3, compile=compiled,
        )
        for compiled in (False, True)
    ]  # fmt: skip
    assert ends[0].run.state.phi is None
    for name, value in ends[0].eta.items():
        torch.testing.assert_close(ends[1].eta[name], value, rtol=1e-6, atol=1e-8)
    start = vm.meta_gradient(model, tasks, vm.Joint("multivariate_normal")).value
    assert ends[0].loss < start
    assert ends[0].loss == pytest.approx(
        -float(dense_evidence(model, ends[0].eta, tasks).sum()), rel=1e-10
    )


def test_a_task_whose_numbers_are_lost_is_told() -> None:
    model = linear_model(vm.GaussianPrior(1.0))
    tasks = ragged_tasks()
    strategy = vm.Joint("multivariate_normal")
    eta = {n: v.clone() for n, v in model.init(torch.zeros((), dtype=torch.float64)).items()}
    eta["log_scale"] = torch.tensor(math.nan, dtype=torch.float64)
    solution = strategy.adapt(strategy.problem(model, tasks, 0), tasks.batch(), eta)
    assert solution.result.tolist() == [5] * len(tasks)


@pytest.mark.parametrize("guide", ["normal", "delta"])
def test_a_fit_descends_the_objective_of_its_guide(guide: str) -> None:
    """Not the evidence, which a guide that cannot be the posterior does not have."""
    model, tasks = MODELS["fixed"]()
    exact = vm.fit(model, tasks, vm.Implicit(guide, minimizer=vm.ClosedForm()))
    iterated = vm.fit(model, tasks, vm.Implicit(guide, minimizer=ITERATED))
    assert exact.loss == pytest.approx(iterated.loss, rel=1e-5)


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
@pytest.mark.parametrize("outer", ["elbo", "query"])
def test_draws_that_it_would_not_take_are_refused(outer: str, guide: str) -> None:
    """A strategy said that it is not noisy, and drew all the same."""
    model, tasks = MODELS["full"]()
    strategy = vm.Implicit(guide, outer, minimizer=vm.ClosedForm(), expectation="monte_carlo")
    with pytest.raises(ValueError, match="takes no draws, but expectation='monte_carlo'"):
        vm.meta_gradient(model, tasks, strategy)


def test_the_exact_predictive_density_rests_on_no_draws() -> None:
    """The certificate was of an objective by 64 draws, which is not what is differentiated."""
    model, tasks = MODELS["full"]()
    strategy = vm.Implicit("multivariate_normal", "query_predictive")
    found = vm.meta_gradient(model, tasks, strategy, eta=moved(model)).certificate
    assert found is not None and found.ok
    assert float(found.decrement.max()) < 1e-20
    assert float(found.residual.max()) < 1e-10


@pytest.mark.parametrize("strategy", [vm.Joint, vm.Reinit, vm.Implicit])
def test_laplaces_evidence_of_a_gaussian_task_is_exact(strategy: type) -> None:
    """At the mode, where it is defined, so that every strategy may have it; it was refused."""
    model, tasks = MODELS["full"]()
    eta = moved(model)
    found = vm.meta_gradient(model, tasks, strategy("laplace", minimizer=vm.ClosedForm()), eta=eta)
    assert found.value == pytest.approx(-float(dense_evidence(model, eta, tasks).sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("guide", "distance"),
    [("multivariate_normal", 1e6), ("multivariate_normal", 1e9), ("normal", 1e6)],
)
def test_a_task_that_is_far_away_is_adapted_to(guide: str, distance: float) -> None:
    """A million noise sds from the others: the conjugate mean, where a search was lost."""
    tasks = vm.datasets.lines(20, num_support=6, noise=0.1, dtype=torch.float64)
    net = seeded(lambda: nn.Linear(1, 1))
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior)
    fit = vm.fit(model, tasks, vm.Joint(guide))
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).unsqueeze(-1)
    noise = fit.eta["log_scale"].exp()
    y = distance * noise + 2.0 * x[:, 0]
    found = fit.adapt(vm.TaskSet([vm.Task((x, y))])).mean
    known = model.prior_distribution(fit.eta)
    design = torch.cat([x, torch.ones_like(x)], 1)
    precision = torch.diag(1 / known.variance) + design.T @ design / noise**2
    pulled = known.mean / known.variance + design.T @ y / noise**2
    want = torch.linalg.solve(precision, pulled)
    got = torch.cat([found["weight"].reshape(-1), found["bias"].reshape(-1)])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-5 * float(noise))


def test_an_objective_at_draws_is_said_to_be_noisy() -> None:
    """513 weights, whose query loss is taken at new draws in every step; a density is known."""
    model = vm.TaskModel(
        seeded(lambda: nn.Linear(512, 1)), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )
    tasks = ragged_tasks(features=512)
    noisy = {}
    for outer in ("elbo", "query", "query_predictive"):
        strategy = vm.Implicit("multivariate_normal", outer)
        traits = strategy.traits(strategy.problem(model, tasks, 0))
        assert traits.closed_form
        noisy[outer] = traits.noisy
    assert noisy == {"elbo": False, "query": True, "query_predictive": False}
