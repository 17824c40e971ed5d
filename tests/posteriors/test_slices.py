"""Wide networks: memory has a bound in tasks, draws and weights, and numbers stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import varmeta as vm
from tests.cases import adam, ragged_tasks, seeded
from varmeta.fitting.run import Run
from varmeta.strategies.strategy import State

TASKS, POINTS, LENGTH, CHANNELS = 12, 5, 100, 16
ALL = TASKS * POINTS * LENGTH * CHANNELS  # numbers in one activation of all tasks under one draw


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operation within it makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.element_size())
        return out


def posterior(guide: str) -> vm.Posterior:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, POINTS, 1, LENGTH, generator=generator, dtype=torch.float64)
    tasks = vm.TaskSet(
        [vm.Task(query=(one, one.mean((-2, -1)))) for one in x]
    )  # whose posterior is the prior
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(1, CHANNELS, 1),
            nn.Tanh(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(CHANNELS, 1),
        )
    )
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(precision=4.0))
    return vm.Fit(
        model, tasks, vm.Joint(guide), 0, Run(model.init(x.new_zeros(())), State())
    ).adapt(tasks)


@pytest.mark.parametrize("guide", ["delta", "normal"])
def test_a_wide_network_is_run_on_some_draws_and_some_tasks(
    guide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = posterior(guide)
    x = torch.randn(
        POINTS, 1, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    whole, mean = found.score(num_samples=3), found.expected(x, 3).samples
    monkeypatch.setattr("varmeta.posteriors.slices.CHUNK", ALL // 2)
    with Largest() as largest:
        parts, again = found.score(num_samples=3), found.expected(x, 3).samples
    assert largest.numbers <= ALL // 2
    torch.testing.assert_close(again, mean, rtol=1e-12, atol=1e-12)
    assert parts.to_numpy(float) == pytest.approx(whole.to_numpy(float), rel=1e-10, abs=1e-10)


def test_a_prior_of_many_weights_makes_no_matrix_of_their_pairs(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 500), nn.Tanh(), nn.Linear(500, 1))

    prior = vm.GaussianPrior(learn_precision="per_module")
    model = vm.TaskModel(seeded(net), vm.likelihoods.Gaussian(), prior)
    with Largest() as largest:
        fit = vm.fit(model, ragged_tasks(3), vm.Joint("normal"), 1, adam)
        text = str(fit)
        fit.save(tmp_path / "fit.vm")
        back = vm.load(tmp_path / "fit.vm", model)
    size = model.weights.size
    assert "0.weight (500, 1)" in text and largest.numbers < size**2 / 10
    assert (tmp_path / "fit.vm").stat().st_size < size**2
    sd = model.weights.flatten(fit.prior.sd)
    torch.testing.assert_close(back.prior.covariance, torch.diag(sd.square()))
