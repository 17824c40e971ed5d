"""Several responses: one noise scale for all is said where it cannot fit, and a program gives each
its own.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import randn
from varmeta import likelihoods as L

SCALES = torch.tensor([1.0, 100.0], dtype=torch.float64)


def two_responses(scales: Tensor = SCALES, tasks: int = 20, rows: int = 8) -> list[Tensor]:
    return [
        scales * (3.0 + randn(2, seed=i) + 0.5 * randn(rows, 2, seed=100 + i)) for i in range(tasks)
    ]


def task_set(ys: list[Tensor]) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((y.new_zeros(len(y), 0), y)) for y in ys])


def run(likelihood: L.Likelihood, ys: list[Tensor]) -> vm.Fit:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.level.expand(len(x), 2)

    model = vm.TaskModel(seeded(Levels), likelihood, vm.GaussianPrior(1.0))
    return vm.fit(model, task_set(ys), vm.Joint("delta"), num_steps=1)


@pytest.mark.parametrize("likelihood", [L.Gaussian(), L.StudentT(), L.Gaussian(per_task=True)])
def test_scales_apart_under_one_noise_scale_are_said(likelihood: L.Likelihood) -> None:
    ys = two_responses()
    low, high = (f"{float(s):.3g}" for s in torch.cat(ys).std(0, correction=0))
    with pytest.warns(
        RuntimeWarning,
        match=rf"2 responses, of sds from {low} to {high}, but .* learns one noise scale",
    ):
        run(likelihood, ys)


def test_log_normal_responses_are_not_told_to_be_standardized() -> None:
    """Which leaves them as they are: only a scale of its own for each mends it."""
    ys = [(0.02 * y * SCALES.new_tensor([1.0, 0.5])).exp() for y in two_responses()]
    with pytest.warns(
        RuntimeWarning,
        match="learns one noise scale for all of them, that of the largest: give each",
    ):
        run(L.LogNormal(), ys)


@pytest.mark.parametrize(
    ("likelihood", "scales"),
    [
        (L.Gaussian(), [1.0, 2.0]),
        (L.Gaussian(1.0, learn_scale=False), [1.0, 100.0]),
        (L.LogNormal(), [1.0, 100.0]),
    ],
)
def test_no_word_where_one_scale_may_fit(likelihood: L.Likelihood, scales: list[float]) -> None:
    """Alike; given by the user; or a scale of the logarithm, of which a factor is no part."""
    ys = two_responses(torch.tensor(scales, dtype=torch.float64))
    run(likelihood, [y.abs() for y in ys] if isinstance(likelihood, L.LogNormal) else ys)


def test_a_program_gives_each_response_its_own_scale() -> None:
    """With to_event(1) and independent weights the fit is the two fits of one response each, to the
    last nat.
    """

    def program(params: Any, x: Tensor, y: Tensor | None) -> Any:
        mean = params["level"].expand(*params["level"].shape[:-2], x.shape[-2], 2)
        return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()).to_event(1), obs=y)

    ys = two_responses()
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    one_each = {"low": (), "high": ()}

    def named(params: Any, x: Tensor, y: Tensor | None) -> Any:
        return program(
            {"level": torch.stack([params["low"], params["high"]], -1), "log_sd": params["log_sd"]},
            x,
            y,
        )

    both = vm.fit(
        vm.TaskModel.from_pyro(named, one_each | {"log_sd": (2,)}, prior, shared=["log_sd"]),
        task_set(ys),
        vm.Joint("multivariate_normal"),
    )
    alone = [
        vm.fit(
            vm.TaskModel(vm.LinearPredictor([]).double(), L.Gaussian(), prior),
            task_set([y[:, k] for y in ys]),
            vm.Joint("multivariate_normal"),
        )
        for k in range(2)
    ]
    assert both.loss == pytest.approx(sum(one.loss for one in alone), abs=1e-5)
    for k, (name, one) in enumerate(zip(one_each, alone, strict=True)):
        assert float(both.eta["log_sd"][k]) == pytest.approx(
            math.log(float(one.prior.scale)), abs=1e-4
        )
        assert float(both.standard_errors[name]) == pytest.approx(
            float(one.standard_errors["intercept"]), rel=1e-3
        )
