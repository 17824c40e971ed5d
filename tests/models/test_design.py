"""The columns of a linear output against its Jacobian, and what is not linear after all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import seeded
from tests.linear_gaussian import MODELS, moved
from varmeta.guides.closed_form import design_of
from varmeta.models.design import columns
from varmeta.models.linearity import is_linear_in


@pytest.mark.parametrize("case", MODELS)
def test_the_columns_are_the_jacobian(case: str) -> None:
    model, tasks = MODELS[case]()
    eta, x = moved(model), tasks.batch().support.x
    theta = model.weights.flatten(eta | model.weights.unflatten(model.weights.flatten(eta)))

    def output(theta: torch.Tensor) -> torch.Tensor:
        return model.output(theta.expand(len(x), 1, -1), eta, x).reshape(len(x), x.shape[1], -1)

    design, constant = design_of(model, eta, x)
    want = torch.autograd.functional.jacobian(output, theta)
    torch.testing.assert_close(design, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(constant + design @ theta, output(theta), rtol=1e-12, atol=1e-12)


def test_a_module_that_comes_again_after_the_layer_is_seen() -> None:
    """`named_children` leaves a second occurrence out, so that a tanh after the layer went by and
    the output was called linear.
    """
    tanh = nn.Tanh()
    net = nn.Sequential(nn.Linear(1, 4), tanh, nn.Linear(4, 1), tanh)
    assert not is_linear_in(net, ["2.weight", "2.bias"])
    assert is_linear_in(net[:3], ["2.weight", "2.bias"])
    nested = nn.Sequential(nn.Linear(1, 4), nn.Sequential(nn.Identity(), tanh, nn.Identity()))
    assert not is_linear_in(nested, ["0.weight", "0.bias"])


def test_a_module_that_comes_twice_before_the_layer_runs_twice() -> None:
    def make() -> nn.Module:
        tanh = nn.Tanh()
        return nn.Sequential(nn.Linear(1, 4), tanh, nn.Linear(4, 4), tanh, nn.Linear(4, 1))

    model = vm.TaskModel(
        seeded(make), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0), shared=["0.*", "2.*"]
    )
    eta, x = moved(model), torch.linspace(-2, 2, 5, dtype=torch.float64).reshape(1, 5, 1)
    design, constant = design_of(model, eta, x)
    theta = model.weights.flatten(eta)
    want = model.output(theta.reshape(1, 1, -1), eta, x)
    torch.testing.assert_close(constant + design @ theta, want, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_used_twice_is_not_known() -> None:
    again = nn.Linear(3, 3)
    net = nn.Sequential(nn.Linear(1, 3), again, nn.Tanh(), again, nn.Linear(3, 1))
    assert not is_linear_in(net, ["4.weight", "4.bias"])


def test_columns_of_no_points_are_none() -> None:
    """Torch cannot tell a size from no numbers, which ended a fit without support rows."""
    net = nn.Linear(2, 3).double()
    design, constant = columns(net, ["weight", "bias"], {}, torch.zeros(0, 2).double())
    assert design.shape == (0, 3, 9) and constant.shape == (0, 3)
