"""A shared body in half precision: a module of the user's own around it, as the docs say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded

LABELS = torch.arange(200) // 10
EPISODES = vm.episodes(
    torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)), LABELS, 5, 1, 4
)


class Half(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.layers(x)
        return out.float()


def body() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    )


UNROLLED = vm.Unrolled("delta", "query", 3, vm.GradientDescent(0.1, per_point=True))


# of a body that varies nobody solves for a minimum to tolerance with eight bits
@pytest.mark.parametrize(
    ("strategy", "shared"),
    [(UNROLLED, ["0.*"]), (UNROLLED, []), (vm.Implicit("delta", "query"), ["0.*"])],
)
def test_gradients_are_those_of_single_precision_but_for_rounding(
    strategy: vm.Strategy, shared: list[str]
) -> None:
    tasks, found = EPISODES.take(4), []
    plain = seeded(lambda: nn.Sequential(body(), nn.Linear(8 * 16, 5)))
    half = nn.Sequential(Half(copy.deepcopy(plain[0])), copy.deepcopy(plain[1]))
    for net in (plain, half):
        model = vm.TaskModel(net, vm.likelihoods.Categorical(5), vm.GaussianPrior(1.0), shared)
        found.append(vm.meta_gradient(model, tasks, strategy))
    assert found[1].value == pytest.approx(found[0].value, rel=0.02)
    for name, gradient in found[0].grads.items():
        other = found[1].grads[name.replace("0.", "0.layers.", 1) if name[0] == "0" else name]
        assert other.dtype == torch.float32  # the master weights'
        assert float((other - gradient).norm()) < 0.1 * float(gradient.norm()), name
