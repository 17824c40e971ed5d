"""Where a network's prior precision starts, and a noise scale that swallows the data."""

from __future__ import annotations

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, linear_model, ragged_tasks
from varmeta.models.fan_in import fan_ins
from varmeta.results.doubts import doubts


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def start(
    net: nn.Module, learn: str | None, precision: float | None = None, **more: object
) -> dict[str, Tensor]:
    prior = vm.GaussianPrior(precision, learn)
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, **more)  # type: ignore[arg-type]
    found = model.init(torch.zeros((), dtype=torch.float64))
    return {name: value.exp() for name, value in found.items() if name.startswith("log_precision")}


def test_a_networks_precision_starts_at_the_fan_in_of_each_layer() -> None:
    found = start(network(), "per_module")
    assert {name: round(float(value), 9) for name, value in found.items()} == {
        "log_precision.0": 1.0, "log_precision.2": 32.0, "log_precision.4": 32.0
    }  # fmt: skip
    each = start(network(), "per_parameter")
    assert torch.allclose(each["log_precision.2.bias"], torch.full((32,), 32.0).double())
    assert torch.allclose(each["log_precision.0.weight"], torch.ones(32, 1).double())
    # one number for all: the geometric mean over the weights, 64 of 1 and 1,089 of 32
    assert float(start(network(), "shared")["log_precision"]) == pytest.approx(
        math.exp(1089 / 1153 * math.log(32))
    )


def test_what_is_given_is_kept_and_a_regression_starts_at_one() -> None:
    assert {float(value) for value in start(network(), "per_module", 1.0).values()} == {1.0}
    assert start(network(), None) == {}
    for net in (
        nn.Linear(7, 1),
        vm.LinearPredictor(["a", "b", "c"]),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2)),
    ):
        assert {float(value) for value in start(net, "shared").values()} == {1.0}
    assert float(
        start(network(), "per_module", shared=["0.*", "2.*"])["log_precision.4"]
    ) == pytest.approx(32.0)


def test_fan_in_by_kind_of_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5),
        nn.GroupNorm(2, 8),
        nn.Flatten(),
        nn.Bilinear(4, 5, 2),
        nn.Embedding(9, 6),
    )
    found = fan_ins(net)
    assert found == {"0.weight": 75, "0.bias": 75, "3.weight": 20, "3.bias": 20}
    # as PyTorch's own starts: sd of uniform numbers on +- 1 / sqrt(fan-in)
    bound = float(net[0].bias.detach().abs().max()) if isinstance(net[0], nn.Conv2d) else math.nan
    assert bound <= found["0.bias"] ** -0.5


def test_a_noise_scale_above_the_datas_sd_is_said_with_both() -> None:
    fit = vm.fit(linear_model(vm.GaussianPrior(3.0)), ragged_tasks(4), vm.Joint("normal"), 1, adam)
    assert not [sentence for sentence in doubts(fit, own_end=True) if "noise scale" in sentence]
    y = torch.cat([task.support[1] for task in fit.tasks if task.support is not None])
    fit.run.eta["log_scale"] = (2.0 * y.std()).log()
    fit.run.history.append({**fit.run.history[-1], "step": 500})
    loud = vm.Fit(fit.model, fit.tasks, fit.strategy, 0, fit.run)
    (sentence,) = [sentence for sentence in doubts(loud, own_end=True) if "noise scale" in sentence]
    both = (
        f"noise scale, {2 * float(y.std()):.3g}, exceeds the sd of the data, {float(y.std()):.3g}: "
    )
    assert f"{both}the weights explain nothing" in sentence
    assert (
        "learn_loc" in sentence and "network" not in sentence
    )  # a regression's prior holds it, and no fan-in


def test_a_scale_that_a_hyperprior_holds_above_the_datas_sd_does_not_warn() -> None:
    held = dist.LogNormal(torch.tensor(3.0), torch.tensor(0.01))
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(scale_hyperprior=held), vm.GaussianPrior(3.0)
    )
    fit = vm.fit(model, ragged_tasks(4), vm.Joint("normal"))
    assert fit.prior.scale is not None and float(fit.prior.scale) > 10.0
    assert not [sentence for sentence in doubts(fit) if "noise scale" in sentence]


def test_a_scale_that_explains_or_has_not_moved_up_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vm.fit(linear_model(vm.GaussianPrior(3.0)), ragged_tasks(4), vm.Joint("normal"))
        model = vm.TaskModel(
            nn.Linear(1, 1), vm.likelihoods.Gaussian(scale=5.0), vm.GaussianPrior(3.0)
        )
        vm.fit(model, ragged_tasks(4), vm.Joint("normal"), 2, adam)  # on its way down
