"""Learned precision on conjugate Gaussian tasks, where the exact answer is a formula."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm

# 40 tasks of 4 observations in 3 dimensions with unit noise.  The data are drawn, then scaled
# within and between tasks so that the exact maximum-likelihood precision and evidence are those of
# the example on which an unguarded delta guide ran to a precision of 1.1e8.
TASKS, POINTS, SIZE = 40, 4, 3
EXACT_PRECISION, EXACT_LOSS = 5.49, 703.0


def conjugate_tasks(query: bool = False) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(TASKS, SIZE, generator=generator, dtype=torch.float64)
    means -= means.mean(0)
    # var(task mean) = 1 / precision + 1 / n at the maximum of the likelihood
    variance = 1 / EXACT_PRECISION + 1 / POINTS
    means *= math.sqrt(variance) / means.square().mean().sqrt()
    inside = torch.randn(TASKS, POINTS, SIZE, generator=generator, dtype=torch.float64)
    inside -= inside.mean(1, keepdim=True)
    cells = TASKS * SIZE
    between = 0.5 * cells * (math.log(2 * math.pi * variance) + 1)
    constant = 0.5 * cells * ((POINTS - 1) * math.log(2 * math.pi) + math.log(POINTS))
    inside *= math.sqrt(2 * (EXACT_LOSS - between - constant)) / inside.norm()
    y = means[:, None] + inside
    x = torch.ones(POINTS, 1, dtype=torch.float64)
    if not query:
        return vm.TaskSet([vm.Task(support=(x, rows)) for rows in y])
    # every observation is the query once, with the other three as support
    folds = [torch.arange(POINTS) == held_out for held_out in range(POINTS)]
    return vm.TaskSet(
        [vm.Task(support=(x[~q], rows[~q]), query=(x[q], rows[q])) for rows in y for q in folds]
    )


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample(
        "y", dist.Normal(params["mean"], torch.ones_like(params["mean"])).to_event(1), obs=y
    )


def model(prior: vm.GaussianPrior) -> vm.TaskModel:
    return vm.TaskModel.from_pyro(program, {"mean": (SIZE,)}, prior)


def precision(fit: vm.Fit) -> float:
    return float(fit.prior.precision["mean"].mean())


@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
def test_gaussian_guides_reach_the_exact_precision_and_evidence(guide: str) -> None:
    fit = vm.fit(model(vm.GaussianPrior(1.0, "shared")), conjugate_tasks(), vm.Joint(guide))
    assert abs(precision(fit) / EXACT_PRECISION - 1) <= 1e-4
    assert abs(fit.loss - EXACT_LOSS) <= 1e-4


def test_delta_guide_with_a_hyperprior_stays_near() -> None:
    # a hyperprior as strong as the data, with its mean at the precision that the tasks were made
    # with in the example
    prior = vm.GaussianPrior(4.0, "shared", hyperprior=dist.Gamma(120.0, 30.0))
    fit = vm.fit(model(prior), conjugate_tasks(), vm.Joint("delta"))
    assert fit.converged
    assert abs(precision(fit) / EXACT_PRECISION - 1) <= 0.25


@pytest.mark.parametrize("outer", ["query", "query_predictive"])
def test_delta_guide_with_a_query_objective_stays_near(outer: str) -> None:
    fit = vm.fit(
        model(vm.GaussianPrior(1.0, "shared")),
        conjugate_tasks(query=True),
        vm.Implicit("delta", outer),
    )
    assert fit.converged
    assert abs(precision(fit) / EXACT_PRECISION - 1) <= 0.25


@pytest.mark.parametrize(
    "strategy", [vm.Joint("delta"), vm.Reinit("delta"), vm.Implicit("delta"), vm.Reptile("delta")]
)
def test_bare_delta_guide_names_the_three_ways_out(strategy: vm.Joint) -> None:
    with pytest.raises(ValueError, match="Gaussian guide.*hyperprior.*query objective"):
        vm.fit(model(vm.GaussianPrior(1.0, "shared")), conjugate_tasks(), strategy)


def test_why_the_guard_is_there() -> None:
    """Without it the joint objective of a delta guide falls without bound as the precision
    grows.
    """
    tasks = conjugate_tasks()
    unguarded = model(vm.GaussianPrior(1.0, "shared"))
    centre = torch.stack(
        [task.support[1].mean(0) for task in tasks if task.support is not None]
    ).mean(0)
    problem = vm.Joint("delta").problem(unguarded, tasks, 0)
    losses = problem.losses("elbo", tasks.batch(), 0)
    values = []
    for log_precision in (5.0, 15.0, 25.0):
        eta = {"mean": centre, "log_precision": torch.tensor(log_precision, dtype=torch.float64)}
        values.append(float(losses(problem.start(tasks.batch(), eta), eta).sum()))
    assert values[0] > values[1] > values[2]
    # 10 units of log precision are worth 5 nats for each of the 120 weights
    assert abs((values[1] - values[2]) - 600.0) <= 1e-6


def test_first_order_strategies_refuse_a_precision_that_they_cannot_learn() -> None:
    with pytest.raises(ValueError, match="passes no derivative to the precision"):
        vm.fit(
            model(vm.GaussianPrior(1.0, "shared")),
            conjugate_tasks(query=True),
            vm.FirstOrder("delta"),
        )
