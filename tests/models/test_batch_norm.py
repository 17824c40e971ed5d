"""Batch norm by the rows of a task, as MAML's code has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, seeded

F64 = torch.float64
LR = 0.01


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))


def images() -> nn.Module:
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 1)), nn.Upsample(scale_factor=2), *layers, nn.Linear(9, 1)
    )


def tasks_of(*sizes: int, query: int = 4) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)

    def part(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 2, generator=generator, dtype=F64)
        return x, x.sum(-1) + torch.randn(n, generator=generator, dtype=F64)

    return vm.TaskSet([vm.Task(part(n), part(query)) for n in sizes])


def model_of(made: nn.Module, shared: tuple[str, ...] = ()) -> vm.TaskModel:
    likelihood = vm.likelihoods.Gaussian(1.0, learn_scale=False)
    return vm.TaskModel(made, likelihood, vm.GaussianPrior(2.0), shared, batch_norm="batch")


@pytest.mark.parametrize("make", [net, images])
@pytest.mark.parametrize("head", [False, True])
def test_gradients_are_those_of_a_network_in_training_mode(make: Any, head: bool) -> None:
    """A loop over tasks in plain PyTorch: support by its statistics, query by its own."""
    made, tasks = seeded(make), tasks_of(3, 3)
    last = f"{len(made) - 1}."
    shared = tuple(n for n, _ in made.named_parameters() if head and not n.startswith(last))
    model = model_of(made, shared)
    strategy = vm.Unrolled("delta", "query", 2, vm.GradientDescent(LR))
    found = vm.meta_gradient(model, tasks, strategy)
    start = {n: v.detach().requires_grad_() for n, v in made.named_parameters()}
    plain, total = seeded(make).train(), torch.zeros((), dtype=F64)

    def loss(values: dict[str, Tensor], part: Any) -> Tensor:
        out = torch.func.functional_call(plain, values, (part[0],)).squeeze(-1)
        return 0.5 * (out - part[1]).square().sum()

    own = [n for n in start if n not in model.shared]
    for task in tasks:
        here = {n: start[n] for n in own}
        for _ in range(2):
            away = sum((here[n] - start[n]).square().sum() for n in own)
            inner = loss(start | here, task.support) + away
            steps = torch.autograd.grad(inner, [here[n] for n in own], create_graph=True)
            here = {n: here[n] - LR * g for n, g in zip(own, steps, strict=True)}
        total = total + loss(start | here, task.query)
    gradients = torch.autograd.grad(total, list(start.values()))
    for name, gradient in zip(start, gradients, strict=True):
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-7, atol=1e-9)


def test_a_fit_predicts_by_the_rows_that_it_is_asked_for() -> None:
    model, tasks = model_of(seeded(net)), tasks_of(4, 4)
    fit = vm.fit(model, tasks, vm.Joint("delta"), 3, adam, progress=False)
    posterior = fit.posterior()
    x = tasks.batch().support.x
    whole, some = posterior.expected(list(x)).mean, posterior.expected(list(x[:, :2])).mean
    assert not torch.allclose(whole[:, :2], some)
    # nothing is kept of what was seen
    assert torch.equal(posterior.expected(list(x)).mean, whole)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("sizes", [(3, 4), (4, 2, 4)])
def test_tasks_of_other_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\).*same number of rows"):
        vm.fit(model_of(seeded(net)), tasks_of(*sizes), progress=False)
    fit = vm.fit(model_of(seeded(net)), tasks_of(3, 3), vm.Joint("delta"), 1, adam)
    x = [torch.randn(2, 2, dtype=F64), torch.randn(3, 2, dtype=F64)]
    with pytest.raises(ValueError, match="same number of rows"):
        fit.posterior().predict(x)


def test_the_network_that_was_given_keeps_its_statistics() -> None:
    made = seeded(net)
    model_of(made)
    assert made[1].running_mean is not None
    with pytest.raises(ValueError, match=r"batch_norm='batch'"):
        vm.TaskModel(made, vm.likelihoods.Gaussian())
