"""A task's posterior and evidence in closed form: against dense covariances, the iterated minimum,
and differences.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.linear_gaussian import MODELS, NETWORKS, dense_evidence, moved
from varmeta.guides import closed_form


@pytest.mark.parametrize("case", MODELS)
def test_the_evidence_is_that_of_the_rows(case: str) -> None:
    model, tasks = MODELS[case]()
    eta, batch = moved(model), tasks.batch()
    found = closed_form.log_evidence(model, eta, batch.support)
    torch.testing.assert_close(found, dense_evidence(model, eta, tasks), rtol=1e-10, atol=1e-10)
    assert batch.query is not None
    ahead = closed_form.log_predictive(model, eta, batch.support, batch.query)
    want = dense_evidence(model, eta, tasks, query=True) - dense_evidence(model, eta, tasks)
    torch.testing.assert_close(ahead, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("guide", ["multivariate_normal", "normal", "laplace", "delta"])
@pytest.mark.parametrize("case", MODELS)
def test_phi_is_where_the_iteration_ends(case: str, guide: str) -> None:
    model, tasks = MODELS[case]()
    eta, batch = moved(model), tasks.batch()
    strategy = vm.Implicit(guide, minimizer=vm.NewtonCG(), tolerance=1e-11)
    problem = strategy.problem(model, tasks, 0)
    phi = closed_form.best(problem.guide, model, eta, batch.support)
    assert phi is not None
    want = strategy.adapt(problem, batch, eta).value
    for name, value in want.items():
        torch.testing.assert_close(phi[name], value, rtol=1e-7, atol=1e-7)
    # no higher than where the iteration ended
    losses = problem.losses("inner", batch, 0)
    assert bool((losses(phi, eta) <= losses(want, eta) + 1e-10).all())


@pytest.mark.parametrize("case", [*NETWORKS, "full", "covariates", "precision weights"])
def test_the_gradient_is_that_of_differences(case: str) -> None:
    """In the body, theta0, the covariance and the noise; central differences in float64."""
    model, tasks = MODELS[case]()
    eta, data = moved(model), tasks.batch().support
    leaves = {name: value.clone().requires_grad_() for name, value in eta.items()}
    total = closed_form.log_evidence(model, leaves, data).sum()
    gradient = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    generator = torch.Generator().manual_seed(0)
    for name, value in eta.items():
        way = torch.randn(value.shape, generator=generator, dtype=torch.float64)

        def at(step: float, name: str = name, way: Tensor = way) -> Tensor:
            here = {**eta, name: eta[name] + step * way}
            return closed_form.log_evidence(model, here, data).sum()

        h = 1e-3  # of fourth order
        slope = (8.0 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12.0 * h)
        want = (gradient[name] * way).sum()
        assert abs(float(slope - want)) <= 1e-8 * max(1.0, abs(float(want))), name


def test_float32_data_are_worked_out_in_float64() -> None:
    """With a residual of a thousandth of the data float32 sums would be off by whole nats."""
    model, tasks = MODELS["head"]()
    eta = {n: v.float() for n, v in (moved(model) | {"log_scale": torch.tensor(-5.0)}).items()}
    narrow = closed_form.log_evidence(model, eta, tasks.to(torch.float32).batch().support)
    wide = closed_form.log_evidence(
        model, {n: v.double() for n, v in eta.items()}, tasks.batch().support
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-3)
