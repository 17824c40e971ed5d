"""The step size of a run: a factor by the way that is left, on top of whatever rate the optimizer
holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import varmeta as vm
from tests.cases import linear_model, ragged_tasks

PRIOR = vm.GaussianPrior(3.0)
GIVEN = 0.01


class Watched(torch.optim.SGD):
    """Gradient descent that writes down the rate of each step."""

    def __init__(self, params: Any, met: list[float], lr: float = GIVEN) -> None:
        super().__init__(params, lr=lr)
        self.met = met

    def step(self, closure: Any = None) -> Any:
        self.met.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(
    schedule: Any,
    make: Callable[[torch.optim.Optimizer], Any] | None = None,
    num_steps: int = 4,
    lr: float = GIVEN,
    **options: Any,
) -> tuple[list[float], vm.Fit]:
    """The rate of each step of a run under the schedule and a scheduler, stepped in the
    callback.
    """
    met: list[float] = []
    schedulers: list[Any] = []

    def factory(params: Any) -> torch.optim.Optimizer:
        optimizer = Watched(params, met, lr)
        schedulers.append(make(optimizer) if make else None)
        return optimizer

    def callback(row: dict[str, float]) -> None:
        if schedulers[0] is not None:
            schedulers[0].step()
        if row["step"] == options.get("stop_at"):
            raise KeyboardInterrupt

    more = {name: value for name, value in options.items() if name != "stop_at"}
    fit = vm.fit(
        linear_model(PRIOR), ragged_tasks(2), vm.Joint("normal"), num_steps, factory,
        schedule=schedule, callback=callback, **more,
    )  # fmt: skip
    return met, fit


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def by_hand(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def test_a_scheduler_of_the_users_own_keeps_its_effect() -> None:
    assert rates("constant", halving)[0] == pytest.approx([0.01, 0.005, 0.0025, 0.00125])
    assert rates("constant", by_hand)[0] == pytest.approx([0.01, 0.01 / 2, 0.01 / 3, 0.01 / 4])


def test_the_factors_of_schedule_and_scheduler_multiply() -> None:
    linear = lambda fraction: 1.0 - fraction  # noqa: E731
    assert rates(linear)[0] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert rates(linear, halving)[0] == pytest.approx([0.01, 0.0075 / 2, 0.005 / 4, 0.0025 / 8])
    assert rates(linear, by_hand)[0] == pytest.approx([0.01, 0.0075 / 2, 0.005 / 3, 0.0025 / 4])
    assert rates("cosine")[0] == pytest.approx(
        [0.01, 0.01 * (2 + 2**0.5) / 4, 0.005, 0.01 * (2 - 2**0.5) / 4]
    )


def test_a_rate_that_is_a_tensor_is_scaled_too() -> None:
    met: list[float] = []

    def factory(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=torch.tensor(GIVEN), foreach=False)
        optimizer.register_step_pre_hook(
            lambda one, *_: met.append(float(one.param_groups[0]["lr"]))
        )
        return optimizer

    vm.fit(
        linear_model(PRIOR),
        ragged_tasks(2),
        vm.Joint("normal"),
        2,
        factory,
        schedule=lambda fraction: 1.0 - fraction,
    )
    assert met == pytest.approx([0.01, 0.005])


@pytest.mark.parametrize("stored", [False, True])
def test_an_interrupted_run_under_an_own_schedule_goes_on(stored: bool, tmp_path: Path) -> None:
    met, whole = rates(lambda fraction: 1.0 - fraction**2, num_steps=6)
    first, broken = rates(lambda fraction: 1.0 - fraction**2, num_steps=6, stop_at=4)
    if stored:
        broken.save(tmp_path / "fit")
        broken = vm.load(tmp_path / "fit", linear_model(PRIOR))
    rest, resumed = rates(lambda fraction: 1.0 - fraction**2, num_steps=6, resume=broken)
    assert first + rest == met
    assert all(torch.equal(value, resumed.eta[name]) for name, value in whole.eta.items())


def test_resuming_goes_on_at_the_rate_that_a_scheduler_had_reached() -> None:
    """Where the optimizer is made as before; a new rate is taken as it is."""
    _, half = rates("constant", halving, num_steps=2)
    assert rates("constant", halving, num_steps=4, resume=half)[0] == pytest.approx(
        [0.0025, 0.00125]
    )
    assert rates("constant", halving, num_steps=3, lr=0.3, resume=half)[0] == pytest.approx([0.3])


def test_a_run_whose_schedule_had_fallen_warns_when_it_starts_high_again() -> None:
    _, half = rates(lambda fraction: 1.0 - 0.9 * fraction, num_steps=2)
    with pytest.warns(
        RuntimeWarning, match=r"had fallen to 0\.1 of its full size by its last step, 2"
    ):
        rates(lambda fraction: 1.0 - 0.9 * fraction, num_steps=4, resume=half)


def test_a_scheduler_in_a_hook_is_refused() -> None:
    def factory(params: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=GIVEN)
        scheduler = halving(optimizer)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    with pytest.raises(
        ValueError, match=r"a hook changed the learning rate within optimizer\.step \(to 0\.005\)"
    ):
        vm.fit(linear_model(PRIOR), ragged_tasks(2), vm.Joint("normal"), 2, factory)


STEP_LR = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)


def test_a_scheduler_of_torch_s_is_stepped_after_each_step() -> None:
    assert rates(STEP_LR, num_steps=6)[0] == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    warm = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.5, total_iters=2)
    assert rates(warm)[0] == pytest.approx([0.005, 0.0075, 0.01, 0.01])


@pytest.mark.parametrize("saved", [False, True])
def test_a_resumed_run_goes_on_where_its_scheduler_was(saved: bool, tmp_path: Path) -> None:
    met, half = rates(STEP_LR, num_steps=3)
    if saved:
        half.save(tmp_path / "half.vm")
        half = vm.load(tmp_path / "half.vm", linear_model(PRIOR))
    later, found = rates(STEP_LR, num_steps=6, resume=half)
    whole_rates, whole = rates(STEP_LR, num_steps=6)
    assert met + later == whole_rates
    assert all(torch.equal(value, whole.eta[name]) for name, value in found.eta.items())


def test_a_scheduler_that_needs_a_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="steps by a metric that you choose"):
        rates(partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=2))


def test_the_gradient_is_clipped_as_a_whole() -> None:
    steps: dict[float | None, dict[str, torch.Tensor]] = {}
    start = linear_model(PRIOR).init(torch.zeros((), dtype=torch.float64))
    for clip in (None, 0.5, 1e9):
        fit = rates("constant", num_steps=1, clip=clip)[1]
        steps[clip] = {name: value - start[name] for name, value in fit.eta.items()}
        gradient_norm = fit.run.history[0]["gradient_norm"]
    norms = {
        clip: float(torch.cat([by.reshape(-1) for by in step.values()]).norm())
        for clip, step in steps.items()
    }
    assert gradient_norm > 1.0  # what is recorded is not clipped
    assert norms[None] == pytest.approx(GIVEN * gradient_norm)
    assert norms[0.5] == pytest.approx(GIVEN * 0.5) and norms[1e9] == norms[None]
    for name, step in steps[0.5].items():
        torch.testing.assert_close(step, steps[None][name] * (0.5 / gradient_norm))


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_a_clip_that_is_no_length_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        rates("constant", clip=clip)


def test_lbfgs_is_not_clipped() -> None:
    with pytest.raises(ValueError, match="LBFGS chooses the length of its steps itself"):
        vm.fit(
            linear_model(PRIOR), ragged_tasks(2), vm.Implicit("delta"), 2, torch.optim.LBFGS,
            clip=1.0,
        )  # fmt: skip


def test_a_scheduler_in_the_wrong_place_is_told_where_it_belongs() -> None:
    with pytest.raises(TypeError, match=r"given as functools.partial\(StepLR"):
        rates(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2))


def test_a_scheduler_that_ends_before_the_run_is_refused_before_any_work() -> None:
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3)
    with pytest.raises(ValueError, match="OneCycleLR ends after its total_steps=3"):
        rates(cycle)
    assert len(rates(cycle, num_steps=3)[0]) == 3
