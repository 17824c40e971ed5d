"""A network whose parts do not put out what the whole does is run whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, ragged_tasks, seeded
from varmeta.models.shared_layers import split

SHARED = ("body.*",)
UNROLLED = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.01))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class AsksForItsKind(Net):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.body(x)
        return self.head(3.0 * seen if isinstance(x, Tensor) else seen)


class Writes(Net):
    """Two names of one tensor, which `*=` changes under both."""

    def forward(self, x: Tensor) -> Tensor:
        seen = known = self.body(x)
        seen *= 2.0
        return self.head(seen + known)


class HoldsItsBody(Net):
    """The value is the same either way; the derivative is not."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.body(x)
        return self.head(seen)


class Tries(Net):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.body(x)
        try:
            few = len(x) < 100
        except Exception:
            few = False
        return self.head(seen * (0.5 if few else 1.0))


class StartsAtZero(AsksForItsKind):
    """Where the head is 0 everything is the same."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


MISREAD = [AsksForItsKind, Writes, HoldsItsBody, Tries, StartsAtZero]


def model_of(make: type[Net]) -> vm.TaskModel:
    return vm.TaskModel(seeded(make), vm.likelihoods.Gaussian(), vm.GaussianPrior(2.0), SHARED)


def uncut(make: type[Net]) -> vm.TaskModel:
    model = model_of(make)
    model.__dict__["_split"] = None
    return model


@pytest.mark.parametrize("make", MISREAD)
def test_what_tracing_misreads_is_run_whole(make: type[Net]) -> None:
    tasks = ragged_tasks(2)
    model = model_of(make)
    # tracing sees nothing wrong, so that the test would notice a better tracer
    assert split(seeded(make), ["head.weight", "head.bias"]) is not None
    found = vm.meta_gradient(model, tasks, UNROLLED)
    expected = vm.meta_gradient(uncut(make), tasks, UNROLLED)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", MISREAD)
def test_a_fit_of_a_file_is_of_the_whole_network_too(make: type[Net], tmp_path: Path) -> None:
    fit = vm.fit(model_of(make), ragged_tasks(2), UNROLLED, 2, adam)
    fit.save(tmp_path / "fit")
    loaded = vm.load(tmp_path / "fit", model_of(make))
    assert not loaded.model.cut
    x = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).unsqueeze(-1)
    means = [one.posterior().expected(x).mean for one in (fit, loaded)]
    torch.testing.assert_close(*means, rtol=1e-9, atol=1e-12)
    net = loaded.model.net
    assert net is not None
    weights = {**fit.eta, **{name: value[0] for name, value in fit.posterior().mean.items()}}
    own = {name: weights[name] for name, _ in net.named_parameters()}
    by_hand = torch.func.functional_call(net, own, (x,)).squeeze(-1)
    torch.testing.assert_close(means[1][0], by_hand, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_rightly_stays_cut(dtype: torch.dtype) -> None:
    model = model_of(Net)
    vm.meta_gradient(model, ragged_tasks(2).to(dtype), UNROLLED)
    assert model.cut and model.ahead({}, []) is not model
