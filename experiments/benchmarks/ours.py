"""varmeta on the shared work: the strategy's step, captured and compiled, called as `fit` calls
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import varmeta as vm
from experiments.benchmarks.work import (
    ADAM_LR,
    CG_STEPS,
    INNER_STEPS,
    LOG_SD,
    LR,
    MAML_STEPS,
    PRECISION,
    Step,
    Work,
)  # fmt: skip
from varmeta.fitting.compiled_step import Step as OuterStep
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import Batch


def imaml(work: Work, compiled: bool = True, inner_steps: int = INNER_STEPS) -> Step:
    strategy = vm.Implicit(
        "delta",
        "query",
        inner_steps,
        vm.GradientDescent(LR),
        vm.CG(max_steps=CG_STEPS, rtol=1e-30),
        "ignore",
    )
    return _meta_gradient(work, strategy, compiled)


def maml(work: Work, compiled: bool = True, inner_steps: int = MAML_STEPS) -> Step:
    return _meta_gradient(
        work, vm.Unrolled("delta", "query", inner_steps, vm.GradientDescent(LR)), compiled
    )


def joint(work: Work, compiled: bool = True) -> Step:
    model = model_of(
        work, vm.likelihoods.Gaussian(), vm.GaussianPrior(PRECISION, learn_precision="shared")
    )
    strategy = vm.Joint("normal", minimizer=vm.Adam(lr=ADAM_LR))
    problem, batch, eta = _start(model, tasks_of(work), strategy)
    leaves = list(eta.values())
    optimizer = torch.optim.Adam(leaves, lr=ADAM_LR, fused=True)
    fast = OuterStep(strategy, compiled, 1)
    state = strategy.init(problem, batch, eta)
    loc = torch.cat(
        [torch.as_tensor(value).reshape(work.tasks, -1) for value in work.loc.values()], -1
    )
    state = begin = replace(state, phi={"loc": loc, "log_scale": torch.full_like(loc, LOG_SD)})

    def run() -> tuple[float, dict[str, Tensor]]:
        nonlocal state

        def closure() -> float:
            nonlocal state
            total, gradient, state, _ = fast(problem, batch, eta, state)
            for name, leaf in eta.items():
                leaf.grad = gradient[name]
            return float(total)

        loss = optimizer.step(closure)
        return loss, {name: leaf.grad for name, leaf in eta.items() if leaf.grad is not None}

    return Step(run, _values(work), _draws(strategy, problem, batch, eta, begin))


def joint_noise(work: Work, step: int = 0) -> np.ndarray:
    """The standardised draws `(2, tasks, SIZE)` that the joint step of that number uses."""
    model = model_of(
        work, vm.likelihoods.Gaussian(), vm.GaussianPrior(PRECISION, learn_precision="shared")
    )
    problem, batch, _ = _start(model, tasks_of(work), vm.Joint("normal"))
    return problem.noise("elbo", batch, step).cpu().numpy()


def model_of(work: Work, likelihood: Any, prior: vm.GaussianPrior) -> vm.TaskModel:
    width = len(work.theta0["0.bias"])
    net = nn.Sequential(
        nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    net.to(torch.as_tensor(work.x_support).dtype)
    net.load_state_dict({name: torch.as_tensor(value) for name, value in work.theta0.items()})
    return vm.TaskModel(net, likelihood, prior)


def tasks_of(work: Work) -> vm.TaskSet:
    parts = zip(work.x_support, work.y_support, work.x_query, work.y_query, strict=True)
    tasks = vm.TaskSet(
        [vm.Task(support=(x[:, None], y), query=(u[:, None], v)) for x, y, u, v in parts]
    )
    return tasks.to(device=torch.get_default_device())


def _start(
    model: vm.TaskModel, tasks: vm.TaskSet, strategy: Strategy
) -> tuple[Problem, Batch, dict[str, Tensor]]:
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = model.init(batch.support.x.new_zeros(()))
    return problem, batch, {name: value.requires_grad_() for name, value in eta.items()}


def _meta_gradient(work: Work, strategy: Strategy, compiled: bool) -> Step:
    model = model_of(
        work, vm.likelihoods.Gaussian(1.0, learn_scale=False), vm.GaussianPrior(PRECISION)
    )
    problem, batch, eta = _start(model, tasks_of(work), strategy)
    fast = OuterStep(strategy, compiled, 1)
    state = strategy.init(problem, batch, eta)

    def run() -> tuple[float, dict[str, Tensor]]:
        total, gradient, _, _ = fast(problem, batch, eta, state)
        return float(total), gradient

    return Step(run, _values(work))


def _values(work: Work) -> Callable[[tuple[float, dict[str, Tensor]]], tuple[float, np.ndarray]]:
    def values(found: tuple[float, dict[str, Tensor]]) -> tuple[float, np.ndarray]:
        gradient = torch.cat([found[1][name].reshape(-1) for name in work.theta0])
        return found[0], gradient.cpu().numpy().astype(np.float64)

    return values


def _draws(
    strategy: Strategy, problem: Problem, batch: Batch, eta: dict[str, Tensor], begin: Any
) -> Callable[[], float]:
    known = {name: value.detach().clone() for name, value in eta.items()}
    count = 0

    def draw() -> float:
        nonlocal count
        count += 1
        return float(strategy.loss(problem, batch, known, replace(begin, step=count))[0].detach())

    return draw
