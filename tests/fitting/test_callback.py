"""Callbacks: what they hear, and that they end a run without losing it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import varmeta as vm
from tests.cases import linear_model, ragged_tasks
from tests.fitting.test_ensemble import model_of as network
from tests.fitting.test_validation import HEAD, TRAIN, adam, head_model
from tests.linear_gaussian import REGRESSIONS
from varmeta.fitting.callback import Row

# one of each solver: steps of an optimiser, joint Newton, Newton in closed form, an ensemble
WAYS: dict[str, Callable[..., vm.Fit]] = {
    "steps": lambda **o: vm.fit(head_model(), TRAIN, HEAD, optimizer=adam, **o),
    "newton": lambda **o: vm.fit(
        linear_model(vm.GaussianPrior(1.0)), ragged_tasks(), vm.Joint("normal"), **o
    ),
    "profiled": lambda **o: vm.fit(*REGRESSIONS["full"](), **o),
    "ensemble": lambda **o: vm.fit(
        network(head_model().net), TRAIN, HEAD, optimizer=adam, ensemble=2, **o
    ),
}


def run(way: str, callback: Callable[[Any], object], **options: Any) -> vm.Fit:
    steps = {"num_steps": 20} if way in ("steps", "ensemble") else {}
    return WAYS[way](callback=callback, **(steps | options))


@pytest.mark.parametrize("way", WAYS)
def test_it_hears_eta_after_the_step(way: str) -> None:
    heard: list[tuple[float, dict[str, torch.Tensor]]] = []
    fit = run(way, lambda row: heard.append((row["step"], row.eta)))
    assert [step for step, _ in heard] == list(range(1, len(fit.history) + 1))
    last = fit.members.points if fit.members is not None else fit.eta
    for name, value in last.items():
        torch.testing.assert_close(heard[-1][1][name].to(value), value)
        assert not heard[-1][1][name].requires_grad
    assert all(type(row) is dict for row in fit.run.history)


def test_it_hears_the_rate_of_the_step() -> None:
    """The optimizer's own, with the schedule's factor on it."""
    for schedule, expected in (
        ("constant", [3e-2] * 4),
        (lambda fraction: 1.0 - fraction, [3e-2, 2.25e-2, 1.5e-2, 0.75e-2]),
        (partial(torch.optim.lr_scheduler.StepLR, step_size=2), [3e-2, 3e-2, 3e-3, 3e-3]),
    ):
        heard: list[float] = []
        hear = lambda row, heard=heard: heard.append(row["lr"])  # noqa: E731
        fit = run("steps", hear, num_steps=4, schedule=schedule)
        assert heard == pytest.approx(expected) == fit.history["lr"].tolist()


@pytest.mark.parametrize("way", WAYS)
def test_it_may_end_the_run(way: str) -> None:
    def enough(row: Row) -> None:
        if row["step"] == 2:
            raise vm.StopFit

    fit = run(way, enough)
    assert fit.run.step == 2 and fit.stop.startswith("ended by the callback after 2 steps")
    assert not fit.converged
    on = run(way, lambda row: None, resume=fit)
    whole = run(way, lambda row: None)
    if way == "steps":  # with steps that fall to zero at the same end
        for name, value in whole.eta.items():
            torch.testing.assert_close(on.eta[name], value, rtol=1e-12, atol=1e-12)
    assert on.loss == pytest.approx(whole.loss, rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_an_exception_of_its_own_loses_nothing(way: str) -> None:
    def broken(row: Row) -> None:
        if row["step"] == 2:
            raise ZeroDivisionError("of the logger")

    with pytest.raises(ZeroDivisionError, match="of the logger") as caught:
        run(way, broken)
    fit = caught.value.fit  # type: ignore[attr-defined]
    assert isinstance(fit, vm.Fit) and fit.run.step == 2
    assert "ended by the callback's ZeroDivisionError after 2 steps" in fit.stop
    assert any(".fit" in note for note in caught.value.__notes__)
    assert run(way, lambda row: None, resume=fit).run.step > 2


def test_a_posterior_of_eta_is_all_or_nothing() -> None:
    def broken(row: Row) -> None:
        raise ZeroDivisionError("of the logger")

    with pytest.raises(ZeroDivisionError, match="of the logger") as caught:
        vm.fit(
            linear_model(vm.GaussianPrior(learn_precision="shared")), ragged_tasks(8),
            vm.Joint("multivariate_normal"), hyperguide="normal", callback=broken,
        )  # fmt: skip
    assert not hasattr(caught.value, "fit")
