"""Step sizes on the mean over a task's points, and inner rules made of plain numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import adam, linear_model, ragged_tasks, seeded
from varmeta.numerics.minimize import minimize
from varmeta.strategies.strategy import Strategy

PRIOR = vm.GaussianPrior(3.0)
LR = 0.05


def by_hand(task: vm.Task, model: vm.TaskModel, steps: int) -> torch.Tensor:
    """K steps of lr / n down one task's penalised sum of squares, from theta0: weight and bias,
    `(2,)`.
    """
    assert task.support is not None
    x, y = task.support
    start = torch.cat([value.detach().reshape(-1) for value in model.net.parameters()])  # type: ignore[union-attr]
    theta = start
    for _ in range(steps):
        residual = x[:, 0] * theta[0] + theta[1] - y
        gradient = torch.stack([(residual * x[:, 0]).sum(), residual.sum()]) / 0.7**2 + 3.0 * (
            theta - start
        )
        theta = theta - LR / len(x) * gradient
    return theta


@pytest.mark.parametrize(
    "strategy",
    [
        vm.Unrolled(inner_steps=4, minimizer=vm.GradientDescent(LR, per_point=True)),
        vm.Implicit("delta", "query", 4, vm.GradientDescent(LR, per_point=True)),
        vm.FirstOrder(inner_steps=4, minimizer=vm.GradientDescent(LR, per_point=True)),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_a_step_per_point_is_divided_by_the_tasks_own_number_of_points(strategy: Strategy) -> None:
    tasks, model = ragged_tasks(4), linear_model(PRIOR)
    batch = tasks.batch()
    problem = strategy.problem(model, tasks, 0)
    found = strategy.adapt(problem, batch, model.init(batch.support.x.new_zeros(()))).value["loc"]
    expected = torch.stack([by_hand(task, model, 4) for task in tasks])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_more_rows_of_the_same_kind_change_no_step() -> None:
    """Up to the prior's part: where every row stands twice, the sum doubles and the mean stays."""
    model = linear_model(vm.GaussianPrior(1e-12))
    once = ragged_tasks(3)
    twice = vm.TaskSet(
        [vm.Task(tuple(torch.cat([z, z]) for z in task.support), name=task.name) for task in once]  # type: ignore[union-attr, arg-type]
    )
    ends = []
    for tasks in (once, twice):
        strategy = vm.Unrolled(inner_steps=3, minimizer=vm.GradientDescent(LR, per_point=True))
        batch = tasks.batch()
        eta = model.init(batch.support.x.new_zeros(()))
        ends.append(strategy.adapt(strategy.problem(model, tasks, 0), batch, eta).value["loc"])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_stored_guides_of_joint_take_steps_per_point() -> None:
    tasks, model = ragged_tasks(3), linear_model(PRIOR)
    joint = vm.Joint("normal", minimizer=vm.GradientDescent(LR, per_point=True))
    still = lambda params: torch.optim.SGD(params, lr=1e-300)  # noqa: E731
    fit = vm.fit(model, tasks, joint, 1, still, schedule="constant")
    assert fit.run.state.phi is not None
    theta0 = torch.cat([value.detach().reshape(-1) for value in model.net.parameters()])  # type: ignore[union-attr]
    # at the prior's own scale the cubature is exact for the quadratic, so the location moves as a
    # point would
    expected = torch.stack([by_hand(task, model, 1) for task in tasks])
    torch.testing.assert_close(fit.run.state.phi["loc"], expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(expected[0], theta0)


def test_the_minimizer_alone_asks_for_the_number_of_points() -> None:
    fn = lambda phi: phi["w"] ** 2  # noqa: E731
    rule = vm.GradientDescent(0.1, per_point=True)
    start = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"give minimize\(lr_scale=1 / points\)"):
        minimize(fn, start, rule, steps=1)
    found = minimize(fn, start, rule, steps=1, lr_scale=torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(found.value["w"], torch.tensor([0.8, 0.9]))
    to_tolerance = minimize(fn, start, rule, lr_scale=torch.tensor([1.0, 0.5]))
    assert int(to_tolerance.stats["steps"][1]) > int(to_tolerance.stats["steps"][0]) > 1
    for given in (torch.ones(3), torch.ones(())):
        with pytest.raises(ValueError, match="one factor per task"):
            minimize(fn, start, rule, steps=1, lr_scale=given)


def test_a_step_size_that_is_n_times_the_fields_is_told_of_by_fit_and_by_adapt() -> None:
    """The README's recipe on a 1-32-32-1 network.

    On sums its steps diverge in the course of the fit, when the gradient's certificate has warned
    already, and end 40 sds off; on means they end within one.
    """

    def make() -> nn.Module:
        layers = (nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        return nn.Sequential(*layers)

    options = {"num_support": 10, "num_query": 10}
    known, unseen = (vm.datasets.sinusoids(n, seed=n, **options) for n in (8, 5))
    sd = float(unseen.query_rows.y.std())

    def errors(rule: vm.GradientDescent) -> tuple[float, list[str]]:
        model = vm.TaskModel(seeded(make).float(), vm.likelihoods.Gaussian(), vm.GaussianPrior())
        strategy = vm.Implicit("delta", "query", 5, rule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fast = lambda params: torch.optim.Adam(params, lr=3e-2)  # noqa: E731
            fit = vm.fit(model, known, strategy, 40, fast)
            found = fit.adapt(unseen).score().loc["all", "rmse"]
        return float(found) / sd, [str(one.message) for one in caught]

    far, said = errors(vm.GradientDescent(0.01))
    near, also = errors(vm.GradientDescent(0.01, per_point=True))
    assert far > 3 and near < 1
    numbers = "lr=0.01 on up to 10 points is a step of 0.1 on their mean.  Take GradientDescent"
    assert "the fit diverges" in said[2]
    assert [numbers in one for one in said] == [False, True, False, True]
    assert said[3].startswith("adaptation did not end well")
    assert len(also) == 1 and "not certified" in also[0]


def test_steps_that_diverge_say_what_they_are_on_the_mean_and_what_to_take() -> None:
    """A 1-32-32-1 network at the field's rate: the summed loss of ten points makes 0.1 of 0.01."""
    tasks = vm.datasets.sinusoids(4, num_support=10, num_query=2)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    model = vm.TaskModel(
        seeded(make).float(), vm.likelihoods.Gaussian(scale=0.3), vm.GaussianPrior()
    )
    strategy = vm.Implicit("delta", "query", 5, vm.GradientDescent(0.01), on_unconverged="ignore")
    with pytest.warns(
        RuntimeWarning,
        match=r"lr=0\.01 on up to 10 points is a step of 0\.1 on their mean.*per_point=True",
    ):
        vm.fit(model, tasks, strategy, 1, adam)
    safe = vm.Implicit(
        "delta", "query", 5, vm.GradientDescent(0.01, per_point=True), on_unconverged="ignore"
    )
    vm.fit(model, tasks, safe, 1, adam)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda: vm.GradientDescent(lr=torch.tensor(0.05, requires_grad=True)),
            "lr of GradientDescent .* asks for a gradient",
        ),
        (lambda: vm.GradientDescent(clip=torch.tensor(0.05)), "clip of GradientDescent must be a"),
        (lambda: vm.Adam(lr=torch.tensor(0.05, requires_grad=True)), "lr of Adam"),
        (lambda: vm.Adam(betas=(torch.tensor(0.9), 0.999)), "betas of Adam"),
        (lambda: vm.Adam(eps=torch.tensor(1e-8)), "eps of Adam"),
        (lambda: vm.NewtonCG(damping=torch.tensor(0.1)), "damping of NewtonCG"),
        (lambda: vm.StochasticAlg(lr=torch.tensor(0.1), temperature=1.0), "lr of StochasticAlg"),
    ],
)
def test_a_tensor_as_a_number_is_refused(make: Callable[[], Any], what: str) -> None:
    with pytest.raises(TypeError, match=what):
        make()


def test_a_tensor_in_a_strategy_is_refused_before_any_work() -> None:
    strategy = vm.Implicit("delta", "query", tolerance=torch.tensor(1e-6))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"tolerance of Implicit must be a plain number, not a tensor"
    ):
        vm.fit(linear_model(PRIOR), ragged_tasks(2), strategy, 1, adam)
    solver = vm.Implicit("delta", "query", linear_solver=vm.CG(rtol=torch.tensor(1e-6)))
    with pytest.raises(TypeError, match="rtol of CG"):
        vm.meta_gradient(linear_model(PRIOR), ragged_tasks(2), solver)
