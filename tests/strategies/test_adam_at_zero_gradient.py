"""The gradient through Adam's inner steps where a weight's own gradient is 0: a slope of lr / eps
that must cancel.
"""

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm


def column_of_zeros(dtype: torch.dtype) -> tuple[nn.Module, vm.TaskSet]:
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    zeros = torch.stack([x[:, 0], torch.zeros(4)], -1)
    tasks = vm.TaskSet([vm.Task((zeros, y), (x, y + 1.0))])
    return nn.Linear(2, 1).to(dtype), tasks.to(dtype)


def no_support(dtype: torch.dtype) -> tuple[nn.Module, vm.TaskSet]:
    net, tasks = column_of_zeros(dtype)
    return net, vm.TaskSet([vm.Task(None, tasks[0].query, name="new"), tasks[0]])


def dead_unit(dtype: torch.dtype) -> tuple[nn.Module, vm.TaskSet]:
    """Its ReLU is 0 on every support point, and not on the query's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[0].bias.copy_(torch.tensor([0.2, 0.1]))
    x, y = torch.rand(4, 1, dtype=torch.float64) + 0.5, torch.randn(4, dtype=torch.float64)
    tasks = vm.TaskSet([vm.Task((x, y), (-x, y + 1.0))])
    return net.to(dtype), tasks.to(dtype)


# in single precision the rounding of a normal guide's gradient is above Adam's eps, so that it
# moves
@pytest.mark.parametrize(
    ("guide", "dtype"),
    [("delta", torch.float64), ("normal", torch.float64), ("delta", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("made", [column_of_zeros, no_support, dead_unit])
def test_equals_central_differences(
    made: object, guide: str, steps: int, dtype: torch.dtype
) -> None:
    """Differences in double precision, whatever the gradient is taken in."""

    def model_and_tasks(dtype: torch.dtype) -> tuple[vm.TaskModel, vm.TaskSet]:
        net, tasks = made(dtype)  # type: ignore[operator]
        return vm.TaskModel(
            net, vm.likelihoods.Gaussian(1.0, learn_scale=False), vm.GaussianPrior(2.0)
        ), tasks

    strategy = vm.Unrolled(guide, inner_steps=steps, minimizer=vm.Adam(lr=0.01))
    found = vm.meta_gradient(*model_and_tasks(dtype), strategy).grads
    model, tasks = model_and_tasks(torch.float64)
    start = model.init(torch.zeros((), dtype=torch.float64))
    size = max(float(g.abs().max()) for g in found.values())

    def value(name: str, move: Tensor) -> float:
        return vm.meta_gradient(
            model, tasks, strategy, eta={**start, name: start[name] + move}
        ).value

    for name, gradient in found.items():
        for i in range(gradient.numel()):
            step = torch.zeros(gradient.numel(), dtype=torch.float64)
            step[i] = 1e-5
            move = step.reshape(gradient.shape)
            exact = (value(name, move) - value(name, -move)) / 2e-5
            tolerance = 1e-6 if dtype == torch.float64 else 1e-3
            assert abs(float(gradient.reshape(-1)[i]) - exact) <= tolerance * size, (name, i)
