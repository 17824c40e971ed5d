"""The identities of the post's mathematics, to 1e-8."""

from __future__ import annotations

import torch
from torch.func import hessian

import varmeta as vm
from tests.cases import MODELS, linear_model, ragged_tasks, scalar_model
from varmeta.strategies.problem import Problem

TIGHT = {"tolerance": 1e-13, "linear_solver": vm.CG(rtol=1e-13)}


def solved(
    model: vm.TaskModel, tasks: vm.TaskSet
) -> tuple[Problem, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    strategy = vm.Implicit("delta", **TIGHT)
    problem = strategy.problem(model, tasks, 0)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    phi = strategy.adapt(problem, tasks.batch(), eta).value["loc"]
    return problem, phi, model.weights.flatten(eta), eta


def flat(model: vm.TaskModel, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.weights.flatten(grads)


def same_data_inside_and_outside(tasks: vm.TaskSet) -> vm.TaskSet:
    return vm.TaskSet(
        [vm.Task(support=task.support, query=task.support, name=task.name) for task in tasks]
    )


def test_envelope_gradient_is_lambda_times_the_offset() -> None:
    """outer="elbo": dM/dtheta0 = lambda sum_i (theta0 - theta_i*), no Hessian (Moreau envelope;
    Reptile's direction).
    """
    for make in MODELS.values():
        model, tasks = make(vm.GaussianPrior(3.0)), ragged_tasks(4)
        _, phi, theta0, _ = solved(model, tasks)
        result = vm.meta_gradient(model, tasks, vm.Implicit("delta", "elbo", **TIGHT))
        torch.testing.assert_close(
            flat(model, result.grads), 3.0 * (theta0 - phi).sum(0), rtol=1e-8, atol=1e-8
        )


def test_imaml_gradient_is_the_envelope_gradient_preconditioned() -> None:
    """f = g: the iMAML gradient is sum_i (I + H_i / lambda)^-1 lambda (theta0 - theta_i*)."""
    precision = 3.0
    for make in MODELS.values():
        model = make(vm.GaussianPrior(precision))
        tasks = same_data_inside_and_outside(ragged_tasks(4))
        problem, phi, theta0, eta = solved(model, tasks)
        expected = torch.zeros_like(theta0)
        for index in range(len(tasks)):
            single = tasks[[index]].batch()
            loss = problem.losses("query", single, 0)
            dense = hessian(lambda row: loss({"loc": row[None]}, eta).sum())(phi[index])  # noqa: B023
            system = torch.eye(len(theta0), dtype=torch.float64) + dense / precision
            expected += torch.linalg.solve(system, precision * (theta0 - phi[index]))
        result = vm.meta_gradient(model, tasks, vm.Implicit("delta", "query", **TIGHT))
        torch.testing.assert_close(flat(model, result.grads), expected, rtol=1e-8, atol=1e-8)


def test_the_posts_derivative_in_one_dimension() -> None:
    """d theta*/d theta0 = lambda / (lambda + f''), the post's 1 / (1 + f'') at lambda = 1."""
    model, tasks = scalar_model(vm.GaussianPrior(1.0)), ragged_tasks(1)
    problem, phi, _, eta = solved(model, tasks)
    loss = problem.losses("query", same_data_inside_and_outside(tasks).batch(), 0)
    curvature = hessian(lambda w: loss({"loc": w.reshape(1, 1)}, eta).sum())(phi[0, 0])
    step = 1e-5
    ends = []
    for sign in (1.0, -1.0):
        moved = eta | {"w": eta["w"] + sign * step}
        ends.append(vm.Implicit("delta", **TIGHT).adapt(problem, tasks.batch(), moved).value["loc"])
    numeric = float(ends[0] - ends[1]) / (2 * step)
    assert abs(numeric - 1.0 / (1.0 + float(curvature))) <= 1e-8


def test_unrolled_to_convergence_is_implicit() -> None:
    model, tasks = linear_model(vm.GaussianPrior(3.0, "shared")), ragged_tasks(3)
    implicit = vm.meta_gradient(model, tasks, vm.Implicit("normal", "query", **TIGHT))
    long = vm.Unrolled("normal", "query", inner_steps=600, minimizer=vm.GradientDescent(lr=0.08))
    unrolled = vm.meta_gradient(model, tasks, long)
    for name, gradient in implicit.grads.items():
        torch.testing.assert_close(unrolled.grads[name], gradient, rtol=1e-8, atol=1e-8)


def test_reptile_pulls_along_the_envelope_direction() -> None:
    """With phi_K held fixed the elbo's derivative is lambda (theta0 - phi_K), Reptile's own
    direction.
    """
    model, tasks = linear_model(vm.GaussianPrior(3.0)), ragged_tasks(3)
    strategy = vm.Reptile(inner_steps=7)
    problem = strategy.problem(model, tasks, 0)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    phi = strategy.adapt(problem, tasks.batch(), eta).value["loc"]
    grads = vm.meta_gradient(model, tasks, strategy).grads
    expected = 3.0 * (model.weights.flatten(eta) - phi).sum(0)
    torch.testing.assert_close(flat(model, grads), expected, rtol=1e-12, atol=1e-12)


def test_first_order_is_the_query_gradient_at_the_end() -> None:
    """First-order MAML: dG/dtheta0 = sum_i grad g_i(phi_K)."""
    model, tasks = linear_model(vm.GaussianPrior(3.0)), ragged_tasks(3)
    strategy = vm.FirstOrder(inner_steps=7)
    problem = strategy.problem(model, tasks, 0)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    phi = strategy.adapt(problem, tasks.batch(), eta).value["loc"].requires_grad_()
    loss = problem.losses("query", tasks.batch(), 0)({"loc": phi}, eta).sum()
    (expected,) = torch.autograd.grad(loss, phi)
    grads = vm.meta_gradient(model, tasks, strategy).grads
    torch.testing.assert_close(flat(model, grads), expected.sum(0), rtol=1e-12, atol=1e-12)
