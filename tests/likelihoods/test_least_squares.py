"""Classes by least squares, beside ridge regression, softmax and R2-D2 by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import check, seeded
from tests.common import F64, randn
from varmeta.fitting.baselines import BASELINES, baseline
from varmeta.posteriors.arviz_groups import _observed
from varmeta.strategies.strategy import Strategy

L = vm.likelihoods
DELTA = vm.Implicit("delta", outer="query", minimizer=vm.ClosedForm())


def body(classes: int = 3, features: int = 2, bias: bool = True) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, classes, bias=bias))
    )


def model_of(likelihood: Any, **options: Any) -> vm.TaskModel:
    prior = options.pop("prior", vm.GaussianPrior(2.0))
    return vm.TaskModel(body(3, **options), likelihood, prior, shared=["0.*"])


def tasks_of(
    number: int = 4, classes: int = 3, seed: int = 0, ragged: bool = True, apart: float = 1.5
) -> vm.TaskSet:
    """Clouds around centres of a task's own, of unequal numbers of rows; float64."""
    found = []
    for index in range(number):
        centres = apart * randn(classes, 2, seed=seed + 10 * index)
        support, query = (5 + index % 3, 4 + index % 2) if ragged else (6, 30)

        def rows(count: int, seed: int, centres: Tensor = centres) -> tuple[Tensor, Tensor]:
            y = torch.arange(count) % classes
            return centres[y] + randn(count, 2, seed=seed), y

        found.append(
            vm.Task(rows(support, seed + 100 + index), query=rows(query, seed + 200 + index))
        )
    return vm.TaskSet(found)


def moved(model: vm.TaskModel) -> dict[str, Tensor]:
    eta = model.init(torch.zeros((), dtype=F64))
    return {name: x + 0.2 * randn(*x.shape, seed=len(name)) for name, x in eta.items()}


def by_hand(model: vm.TaskModel, eta: dict[str, Tensor], task: vm.Task) -> Tensor:
    """The query's logits: ridge regression towards theta0 by torch.linalg, then a temperature."""
    (x, y), (new, _) = task.support, task.query
    classes = model.likelihood.num_classes

    def features(x: Tensor) -> Tensor:
        hidden = (x @ eta["0.weight"].T + eta["0.bias"]).tanh()
        return torch.cat([hidden, torch.ones(len(x), 1, dtype=F64)], 1)

    start = torch.cat([eta["2.weight"], eta["2.bias"].unsqueeze(1)], 1).T
    precision = eta["log_precision"].exp() if "log_precision" in eta else torch.tensor(2.0).double()
    penalty = eta["log_scale"].exp().square() * precision
    target = 2.0 * nn.functional.one_hot(y, classes).double() - 1.0
    z = features(x)
    normal = z.T @ z + penalty * torch.eye(z.shape[1], dtype=F64)
    ridge = start + torch.linalg.solve(normal, z.T @ (target - z @ start))
    return features(new) @ ridge / eta["log_temperature"].exp()


def outer_by_hand(model: vm.TaskModel, eta: dict[str, Tensor], tasks: vm.TaskSet) -> Tensor:
    """R2-D2's loss, in nats and summed."""
    return sum(
        nn.functional.cross_entropy(by_hand(model, eta, task), task.query[1], reduction="sum")
        for task in tasks
    )


LEARNED = vm.GaussianPrior(2.0, learn_precision="shared")


def test_the_head_is_ridge_regression() -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    eta = moved(model)
    problem = DELTA.problem(model, tasks, 0)
    assert model.is_linear_gaussian and DELTA.traits(problem).closed_form
    loc = DELTA.adapt(problem, tasks.batch(), eta).value["loc"]
    found = model.weights.unflatten(loc)
    for index, task in enumerate(tasks):
        hidden = (task.query[0] @ eta["0.weight"].T + eta["0.bias"]).tanh()
        out = hidden @ found["2.weight"][index].T + found["2.bias"][index]
        logits = by_hand(model, eta, task)
        torch.testing.assert_close(out / eta["log_temperature"].exp(), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", ["query", "query_predictive"])
def test_the_outer_loss_and_its_gradient_are_r2d2(outer: Any) -> None:
    """Value and every derivative, beside the loop by hand and beside differences of it."""
    model, tasks = model_of(L.LeastSquaresClasses(3), prior=LEARNED), tasks_of()
    eta = moved(model)
    strategy = vm.Implicit("delta", outer, minimizer=vm.ClosedForm())
    found = vm.meta_gradient(model, tasks, strategy, eta=eta)
    leaves = {name: x.clone().requires_grad_() for name, x in eta.items()}
    value = outer_by_hand(model, leaves, tasks)
    value.backward()
    assert found.value == pytest.approx(float(value.detach()), rel=1e-12)
    assert {"0.weight", "2.bias", "log_precision", "log_scale", "log_temperature"} <= set(eta)
    for name, x in leaves.items():
        torch.testing.assert_close(found.grads[name], x.grad, rtol=1e-9, atol=1e-10)
        by = 1e-5
        for at in range(min(3, x.numel())):
            step = torch.zeros_like(x).flatten()
            step[at] = by
            ends = [
                float(vm.meta_gradient(model, tasks, strategy, eta={**eta, name: moved_x}).value)
                for moved_x in (eta[name] + step.view_as(x), eta[name] - step.view_as(x))
            ]
            slope = (ends[0] - ends[1]) / (2 * by)
            assert slope == pytest.approx(float(found.grads[name].flatten()[at]), abs=1e-8)


@pytest.mark.parametrize("guide", ["delta", "normal", "multivariate_normal", "laplace"])
@pytest.mark.parametrize("outer", ["query", "query_predictive", "query_elbo", "elbo"])
def test_the_iterated_minimum_says_the_same(guide: Any, outer: Any) -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    eta = moved(model)
    exact, iterated = (
        vm.meta_gradient(
            model, tasks, vm.Implicit(guide, outer, minimizer=rule, tolerance=1e-12), eta=eta
        )
        for rule in (vm.ClosedForm(), vm.NewtonCG())
    )
    assert exact.value == pytest.approx(iterated.value, rel=1e-8)
    for name, gradient in iterated.grads.items():
        torch.testing.assert_close(exact.grads[name], gradient, rtol=1e-6, atol=1e-7)


def test_predictions_are_the_softmax_and_scores_those_of_classes() -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    fit = vm.fit(model, tasks, DELTA, 3, lambda p: torch.optim.Adam(p, 0.1), compile=False)
    posterior = fit.adapt(tasks)
    logits = [by_hand(model, fit.eta, task) for task in tasks]
    expected = posterior.expected([task.query[0] for task in tasks])
    for index, each in enumerate(logits):
        probs = expected.mean[index][: len(each)]
        torch.testing.assert_close(probs, each.softmax(-1), rtol=1e-10, atol=1e-12)
    y = torch.cat([task.query[1] for task in tasks])
    every = torch.cat(logits)
    row = posterior.score().loc["all"]
    assert set(row.index) == {"n", "log_density", "error_rate", "calibration_error"}
    assert row["log_density"] == pytest.approx(-float(nn.functional.cross_entropy(every, y)))
    assert row["error_rate"] == pytest.approx(float((every.argmax(-1) != y).double().mean()))
    drawn = posterior.predict(tasks[0].query[0], num_samples=50).samples
    assert set(drawn.unique().tolist()) <= {0, 1, 2} and drawn.shape[2:] == (4,)


def test_a_gaussian_guide_averages_over_the_posterior() -> None:
    """The dense guide's probabilities are the mean softmax of draws of the exact posterior."""
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    strategy = vm.Implicit("multivariate_normal", "query_predictive")
    fit = vm.fit(model, tasks, strategy, 2, lambda p: torch.optim.Adam(p, 0.1), compile=False)
    posterior, x = fit.adapt(tasks), tasks[0].query[0]
    probs = posterior.expected(x, num_samples=4000).mean[0]
    draws = posterior.sample(4000, seed=1)
    hidden = (x @ fit.eta["0.weight"].T + fit.eta["0.bias"]).tanh()
    out = hidden @ draws["2.weight"][:, 0].mT + draws["2.bias"][:, 0].unsqueeze(1)
    by_draws = (out / fit.eta["log_temperature"].exp()).softmax(-1).mean(0)
    torch.testing.assert_close(probs, by_draws, rtol=0, atol=0.02)


def test_the_regression_is_not_called_a_density_of_classes() -> None:
    likelihood = L.LeastSquaresClasses(3, temperature=0.3, learn_temperature=False)
    model, tasks = model_of(likelihood), tasks_of()
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), 5, compile=False)
    assert "of the regression of +-1 targets" in str(fit) and "log likelihood" not in str(fit)
    assert fit.log_likelihood is None
    for ask in (fit.posterior().evidence, fit.posterior().diagnose, fit.leave_one_task_out):
        with pytest.raises(ValueError, match="no density of classes"):
            ask()
    log_prob, mask = fit.adapt(tasks).log_prob(num_samples=20)
    assert bool((log_prob[:, mask] < 0).all())


def test_an_exported_joint_density_is_that_of_the_regression() -> None:
    """Beside log q, whose difference is then one number of each task: the log evidence."""
    likelihood = L.LeastSquaresClasses(3, temperature=0.3, learn_temperature=False)
    model, tasks = model_of(likelihood), tasks_of(2)
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), 2, compile=False)
    posterior = fit.adapt(tasks)
    found = _observed(posterior.observer, posterior.q.theta(20, 0), 0, of_guide=True)
    stats = found.groups["sample_stats"]
    gap = stats["log_joint"] - stats["log_q"]
    torch.testing.assert_close(gap, gap[:1].expand_as(gap), rtol=0, atol=1e-8)
    assert set(found.groups["observed_data"]["y"].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "strategy", [vm.Joint("multivariate_normal"), vm.Implicit("laplace"), vm.Reptile()]
)
def test_a_temperature_that_nothing_tells_is_refused(strategy: Strategy) -> None:
    with pytest.raises(ValueError, match="says nothing of 'log_temperature'.*outer='query'"):
        vm.fit(model_of(L.LeastSquaresClasses(3)), tasks_of(), strategy, 2)


def test_a_learned_temperature_calibrates_held_out_tasks() -> None:
    train, test = (tasks_of(20, seed=seed, ragged=False, apart=4.0) for seed in (0, 5000))
    scores = {}
    for learn in (False, True):
        likelihood = L.LeastSquaresClasses(3, scale=0.5, learn_temperature=learn)
        model = model_of(likelihood)
        fit = vm.fit(model, train, DELTA, 60, lambda p: torch.optim.Adam(p, 0.05), compile=False)
        scores[learn] = fit.adapt(test).score().loc["all"]
    assert scores[True]["calibration_error"] < 0.5 * scores[False]["calibration_error"]
    assert scores[True]["log_density"] > scores[False]["log_density"] + 0.1


def test_validation_tasks_move_the_temperature_to_where_they_are_predicted_best() -> None:
    train, held_out = tasks_of(6), tasks_of(6, seed=700)
    watch = vm.Validation(held_out, every=5, calibrate=True)
    model = model_of(L.LeastSquaresClasses(3, temperature=20.0))
    fit = vm.fit(
        model, train, DELTA, 5, lambda p: torch.optim.Adam(p, 1e-3), compile=False, validate=watch
    )
    assert "times the temperature found" in fit.stop
    logits = torch.cat([by_hand(model, fit.eta, task) for task in held_out])
    y = torch.cat([task.query[1] for task in held_out])
    near = [float(nn.functional.cross_entropy(logits * by, y)) for by in (0.95, 1.0, 1.05)]
    assert near[1] == min(near)


def test_padding_and_ragged_tasks_do_not_meet() -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    eta = moved(model)
    whole = vm.meta_gradient(model, tasks, DELTA, eta=eta)
    alone = [vm.meta_gradient(model, tasks[[i]], DELTA, eta=eta) for i in range(len(tasks))]
    assert whole.value == pytest.approx(sum(one.value for one in alone), rel=1e-12)
    for name, gradient in whole.grads.items():
        parts = torch.stack([one.grads[name] for one in alone]).sum(0)
        torch.testing.assert_close(gradient, parts, rtol=1e-10, atol=1e-12)


def test_two_classes_a_missing_class_and_no_support() -> None:
    head = seeded(lambda: nn.Linear(2, 2))
    model = vm.TaskModel(head, L.LeastSquaresClasses(2), vm.GaussianPrior(1.0))
    x, y = randn(6, 2, seed=3), torch.tensor([0, 1, 0, 1, 1, 0])
    missing = vm.Task((x[y == 0], y[y == 0]), query=(x, y))
    bare = vm.Task((x[:0], y[:0]), query=(x, y))
    tasks = vm.TaskSet([vm.Task((x, y), query=(x, y)), missing, bare])
    fit = vm.fit(model, tasks, DELTA, 3, lambda p: torch.optim.Adam(p, 0.01), compile=False)
    posterior = fit.adapt(tasks)
    score = posterior.score()
    assert bool(score["log_density"].map(math.isfinite).all())
    prior = x @ fit.eta["weight"].T + fit.eta["bias"]
    at_prior = (prior / fit.eta["log_temperature"].exp()).softmax(-1)
    expected = posterior.expected(x).mean
    torch.testing.assert_close(expected[2], at_prior, rtol=1e-9, atol=1e-10)
    assert float((expected[1] - at_prior)[:, 0].mean()) > 0  # of the only class that it saw


@pytest.mark.parametrize(
    ("y", "match"),
    [
        ([0, 1, 3], "row 2: y = 3 is outside the support of LeastSquaresClasses: expected a class"),
        ([0, 1, -1], "row 2: y = -1 is outside"),
        ([0.0, 1.0, 0.5], "row 2: y = 0.5 is outside"),
        ([[0], [1], [2]], "expected a class 0, ..., 2, a single number in each row"),
    ],
)
def test_odd_labels_are_refused(y: Any, match: str) -> None:
    rows = randn(3, 2), torch.tensor(y)
    tasks = vm.TaskSet([vm.Task(rows, query=rows)], dtype=F64)
    with pytest.raises(ValueError, match=match):
        vm.fit(model_of(L.LeastSquaresClasses(3)), tasks, DELTA, 1)


def test_odd_arguments_are_refused() -> None:
    for wrong in (1, 2.5):
        with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2"):
            L.LeastSquaresClasses(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="temperature must be a positive"):
        L.LeastSquaresClasses(3, temperature=0.0)
    with pytest.raises(TypeError, match="takes no weights"):
        L.Weighted(L.LeastSquaresClasses(3))
    with pytest.raises(ValueError, match="puts out 3 numbers for a row, but .* each class, 4"):
        vm.fit(model_of(L.LeastSquaresClasses(4)), tasks_of(), DELTA, 1)


def test_it_is_saved_printed_and_compared(tmp_path: Any) -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of(6)
    fit = vm.fit(model, tasks, DELTA, 3, lambda p: torch.optim.Adam(p, 0.05), compile=False)
    assert "temperature" in str(fit)
    assert "query loss (no bound), of classes fitted as targets: " in str(fit)
    fit.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", model)
    one, other = (each.adapt(tasks).score().loc["all"] for each in (fit, again))
    assert one.equals(other)
    categorical = vm.TaskModel(body(), L.Categorical(3), vm.GaussianPrior(2.0), shared=["0.*"])
    report = vm.compare(
        {"least squares": DELTA, "laplace": vm.Implicit("laplace")}, model, tasks, tasks, 1,
        models={"laplace": categorical}, budget=3, compile=False, num_samples=50, baselines=False,
        optimizer=lambda p: torch.optim.Adam(p, 0.05),
    )  # fmt: skip
    assert not report.runs["failed"].any(), report.runs["stop"].tolist()
    assert set(report.scores["method"]) == {"least squares", "laplace"}


def test_baselines_keep_temperature_and_scale_where_they_start() -> None:
    model, tasks = model_of(L.LeastSquaresClasses(3, temperature=0.4)), tasks_of()
    for name in BASELINES:
        alone, strategy = baseline(name, model, tasks, [])
        check(strategy, alone, tasks)
        assert not {"log_temperature", "log_scale"} & set(alone.init(torch.zeros(())))
        assert alone.predictive.likelihood.temperature == 0.4


@pytest.mark.parametrize("strategy", [vm.Unrolled("delta"), vm.FirstOrder("delta")])
def test_steps_from_the_prior_learn_the_temperature_too(strategy: Strategy) -> None:
    """The derivative in the temperature at phi_K, by differences."""
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    eta, name, by = moved(model), "log_temperature", 1e-5
    slope = vm.meta_gradient(model, tasks, strategy, eta=eta).grads[name]
    high, low = (
        vm.meta_gradient(model, tasks, strategy, eta={**eta, name: eta[name] + step}).value
        for step in (by, -by)
    )
    assert float(slope) == pytest.approx((high - low) / (2 * by), rel=1e-7)
    assert abs(float(slope)) > 1e-3


def test_members_are_mixed() -> None:
    """Of an ensemble the probabilities are the mean of its members' softmax."""
    model, tasks = model_of(L.LeastSquaresClasses(3)), tasks_of()
    strategy = vm.Implicit("multivariate_normal", "query_predictive")
    fit = vm.fit(
        model, tasks, strategy, 2, lambda p: torch.optim.Adam(p, 0.05), compile=False, ensemble=2
    )
    x = tasks[0].query[0]
    probs = fit.adapt(tasks).expected(x, num_samples=2000).mean[0]
    each = []
    for k in range(2):
        eta = {name: value[k] for name, value in fit.members.points.items()}
        one = vm.Fit(model, tasks, strategy, 0, type(fit.run)(eta, fit.run.state))
        each.append(one.adapt(tasks).expected(x, num_samples=2000).mean[0])
    torch.testing.assert_close(probs, sum(each) / 2, rtol=0, atol=0.03)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(x), dtype=F64))


def test_a_posterior_of_eta_predicts_classes() -> None:
    likelihood = L.LeastSquaresClasses(2, temperature=0.3, learn_temperature=False)
    head = seeded(lambda: nn.Linear(2, 2))
    prior = vm.GaussianPrior(learn_precision="shared")
    model, tasks = vm.TaskModel(head, likelihood, prior), tasks_of(8, classes=2)
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"), hyperguide="multivariate_normal")
    assert "log evidence of the targets" in str(fit)
    posterior = fit.adapt(tasks)
    row = posterior.score(num_samples=200).loc["all"]
    assert row["error_rate"] < 0.5 and row["log_density"] < 0
    probs = posterior.expected(tasks[0].query[0], num_samples=200).mean[0]
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs), dtype=F64))


def test_float_labels_are_not_scaled() -> None:
    likelihood = L.LeastSquaresClasses(3)
    tasks = tasks_of()
    parts = [[(x, y.double()) for x, y in (task.support, task.query)] for task in tasks]
    wide = vm.TaskSet([vm.Task(*pair) for pair in parts])
    scaled, scaling = wide.standardized(likelihood)
    torch.testing.assert_close(scaled[0].support[1], wide[0].support[1])
    drawn = torch.tensor([[0.0, 2.0]], dtype=F64)
    torch.testing.assert_close(scaling.y_inverse(drawn), drawn)
    model, eta = model_of(likelihood), moved(model_of(likelihood))
    one, other = (vm.meta_gradient(model, each, DELTA, eta=eta).value for each in (tasks, wide))
    assert one == pytest.approx(other, rel=1e-12)
