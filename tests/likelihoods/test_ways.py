"""Tasks with other numbers of classes under one head: the classes that a task lacks get nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.numerics.tree import detach
from varmeta.strategies.check import check_strategy

LABELS = torch.arange(80) // 8
ROWS = torch.eye(10, dtype=torch.float64)[LABELS] + 0.3 * torch.randn(
    80, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64
)
MIXED = vm.episodes(ROWS, LABELS, ways=(2, 5), shots=2, queries=3)


def classes(outputs: int = 5, **options: Any) -> vm.TaskModel:
    torch.manual_seed(0)
    likelihood = vm.likelihoods.Categorical(outputs, ways="ways")
    return vm.TaskModel(nn.Linear(10, outputs), likelihood, vm.GaussianPrior(2.0), **options)


def narrow(task: vm.Task) -> tuple[vm.TaskModel, vm.TaskSet]:
    """A model with no outputs but the task's, and the task alone."""
    assert task.support is not None
    ways = int(task.support[1].max()) + 1
    made = nn.Linear(10, ways)
    whole = classes().net
    assert isinstance(whole, nn.Linear)
    with torch.no_grad():
        made.weight.copy_(whole.weight[:ways])
        made.bias.copy_(whole.bias[:ways])
    likelihood = vm.likelihoods.Categorical(ways)
    return vm.TaskModel(made, likelihood, vm.GaussianPrior(2.0)), vm.TaskSet([task])


def test_episodes_of_different_ways_say_theirs() -> None:
    tasks = MIXED.take(60)
    ways = tasks.features["ways"]
    assert set(ways.tolist()) == {2.0, 3.0, 4.0, 5.0}
    for task, number in zip(tasks, ways.tolist(), strict=True):
        assert task.support is not None and task.query is not None
        assert task.support[1].unique().tolist() == list(range(int(number)))
        assert task.query[1].unique().tolist() == list(range(int(number)))
    assert len(MIXED.classes_of(3)) == int(ways[3])


@pytest.mark.parametrize(
    "strategy",
    [
        vm.Unrolled("delta", "query", 3, vm.GradientDescent(0.1)),
        vm.Implicit("delta", "query"),
        vm.Implicit("laplace"),
        vm.Implicit(vm.guides.Laplace(hessian="gauss_newton")),
    ],
    ids=lambda s: s.describe(),
)
def test_losses_are_those_of_heads_without_the_other_classes(strategy: vm.Strategy) -> None:
    tasks, model = MIXED.take(8), classes()
    eta = model.init(torch.zeros((), dtype=torch.float64))
    problem = strategy.problem(model, tasks, 0)
    check_strategy(strategy, problem, tasks)
    state = strategy.init(problem, tasks.batch(), eta)
    losses = strategy.loss(problem, tasks.batch(), eta, state)[2].losses
    for position, task in enumerate(tasks):
        own, alone = narrow(task)
        at = own.init(torch.zeros((), dtype=torch.float64))
        known = strategy.problem(own, alone, 0)
        found = strategy.loss(known, alone.batch(), at, strategy.init(known, alone.batch(), at))
        torch.testing.assert_close(losses[position], found[2].losses[0])


def test_a_fit_s_gradient_is_finite_and_right() -> None:
    tasks, model = MIXED.take(6), classes()
    strategy = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.1))
    found = vm.meta_gradient(model, tasks, strategy)
    eta = detach(model.init(torch.zeros((), dtype=torch.float64)))
    problem = strategy.problem(model, tasks, 0)

    def value(by: float) -> float:
        moved = eta | {"weight": eta["weight"].clone()}
        moved["weight"][3, 4] += by
        state = strategy.init(problem, tasks.batch(), moved)
        return float(strategy.loss(problem, tasks.batch(), moved, state)[0].detach())

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close(float(found.grads["weight"][3, 4]), slope, rtol=1e-6, atol=1e-8)
    assert all(bool(g.isfinite().all()) for g in found.grads.values())


def test_predictions_of_new_tasks_know_their_classes() -> None:
    fit = vm.fit(classes(), MIXED, vm.Implicit("delta", "query"), 5, batch_size=4)
    tasks = MIXED.take(10, start=500)
    posterior = fit.adapt(tasks)
    probs = posterior.expected(ROWS[:3]).samples[0]
    for position, ways in enumerate(tasks.features["ways"].int().tolist()):
        assert not probs[position, :, ways:].any()
        assert float(probs[position, :, :ways].sum(-1).min()) == pytest.approx(1.0)
    assert int(posterior.predict(ROWS[:3], 50).samples.max()) <= 4
    assert posterior.score()["log_density"].notna().all()


def test_the_closed_form_head_knows_them_too() -> None:
    likelihood = vm.likelihoods.LeastSquaresClasses(5, ways="ways")
    model = vm.TaskModel(nn.Linear(10, 5), likelihood, vm.GaussianPrior(2.0))
    head = vm.Implicit("delta", "query", minimizer=vm.ClosedForm())
    fit = vm.fit(model, MIXED, head, 5, batch_size=4)
    tasks = MIXED.take(10, start=500)
    probs = fit.adapt(tasks).expected(ROWS[:3]).samples[0]
    for position, ways in enumerate(tasks.features["ways"].int().tolist()):
        assert not probs[position, :, ways:].any()


@pytest.mark.parametrize(
    ("features", "classes_of", "sentence"),
    [
        (None, [0, 1], "needs the feature 'ways' of every task, but these tasks have none"),
        ({"ways": 1.0}, [0, 0], "is 1, expected its number of classes, 2 to 5"),
        ({"ways": 2.5}, [0, 1], "is 2.5, expected its number of classes"),
        ({"ways": 6.0}, [0, 1], "is 6, expected its number of classes, 2 to 5"),
        ({"ways": 2.0}, [0, 2], "row 1: y = 2, but the task has 2 classes: expected 0 to 1"),
    ],
)
def test_what_is_not_true_of_a_task_is_refused(
    features: dict[str, float] | None, classes_of: list[int], sentence: str
) -> None:
    part = ROWS[:2], torch.tensor(classes_of)
    tasks = vm.TaskSet([vm.Task(part, part, features=features)])
    for learn in (
        lambda: vm.fit(classes(), tasks, vm.Implicit("delta", "query"), 2),
        lambda: vm.meta_gradient(classes(), tasks, vm.Implicit("delta", "query")),
    ):
        with pytest.raises(ValueError, match=sentence):
            learn()


def test_a_stream_s_later_tasks_are_looked_at_for_it() -> None:
    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        part = ROWS[:2], torch.tensor([0, 1 + step])
        return [vm.Task(part, part, features={"ways": 2.0})]

    with pytest.raises(ValueError, match="task 'task 0 of step 1', row 1: y = 2"):
        vm.fit(classes(), tasks, vm.Implicit("delta", "query"), 3)


def test_laplace_of_tasks_without_some_classes_in_single_precision() -> None:
    """LAPACK gave up on the curvature, most of whose eigenvalues are 0, of one of these."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        rows, labels = torch.randn(200, 6), torch.arange(200) // 20
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    tasks = vm.episodes(rows, labels, (2, 5), 1, 2)
    likelihood = vm.likelihoods.Categorical(5, ways="ways")
    model = vm.TaskModel(net, likelihood, vm.GaussianPrior(1.0), shared=["0.*"])
    strategy = vm.Implicit("laplace", "query_predictive")
    fit = vm.fit(model, tasks, strategy, 4, batch_size=3)
    assert fit.adapt(tasks.take(40)).score()["log_density"].notna().all()
