"""Schedules of the step size: factors on whatever learning rate the optimiser then has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch

from varmeta._checks import kind_of

Decay = Callable[[float], float]
ScheduleName = Literal["cosine", "constant"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
DECAYS: dict[ScheduleName, Decay] = {
    "cosine": lambda fraction: 0.5 * (1.0 + math.cos(math.pi * min(1.0, fraction))),
    "constant": lambda fraction: 1.0,
}
# How a run under the user's own schedule is recorded: a function has no name that a file could
# keep.
OWN = "own"
# Where the learning rate that the factory gave stands in the optimizer's state, beside the one that
# schedulers made of it.
GIVEN = "given_lr"


def decay_of(schedule: ScheduleName | Decay) -> Decay:
    """The factor as a function of the fraction of the way, from 0 to 1.

    Raises ValueError for an unknown name and for a function whose factor at the start, half way or
    the end is no finite number of at least 0; TypeError for what is neither.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES} or a function, not {schedule!r}")
        return DECAYS[schedule]
    if not callable(schedule):
        raise TypeError(
            f"schedule must be one of {SCHEDULES} or a function of the fraction of the way, "
            f"not {kind_of(schedule)}"
        )

    def checked(fraction: float) -> float:
        factor = schedule(min(1.0, fraction))
        try:
            number = float(factor)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not (number >= 0 and math.isfinite(number)):
            raise ValueError(
                f"schedule({min(1.0, fraction):g}) must be a finite number of at least 0, the "
                f"factor on the learning rate at that fraction of the way, not {factor!r}"
            )
        return number

    for fraction in (0.0, 0.5, 1.0):
        checked(fraction)
    return checked


def label(schedule: ScheduleName | Decay) -> str:
    return schedule if isinstance(schedule, str) else OWN


class Rates:
    """The rates of an optimizer, with a schedule's factor on them for the length of one step.

    Between two steps the optimizer holds the rates without the factor, so that a scheduler of the
    user's own, stepped from `fit(callback=...)`, reads and writes what it would without a schedule.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault(GIVEN, float(group["lr"]))

    def go_on_from(self, groups: list[dict[str, object]]) -> None:
        """Keep a loaded state's rates where this optimizer was made with the same ones.

        Else take the new.

        groups: the parameter groups as the factory made them, before the state was loaded.
        """
        for group, new in zip(self.optimizer.param_groups, groups, strict=True):
            if group.get(GIVEN) != new[GIVEN]:
                group["lr"], group[GIVEN] = new["lr"], new[GIVEN]

    def step(self, closure: Callable[[], float], factor: float) -> None:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        during = [lr * factor for lr in before]
        for group, lr in zip(groups, during, strict=True):
            group["lr"] = lr
        try:
            self.optimizer.step(closure)
            moved = [
                group["lr"]
                for group, lr in zip(groups, during, strict=True)
                if group["lr"] is not lr
            ]
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr
        if moved:
            raise ValueError(
                f"a hook changed the learning rate within optimizer.step (to {float(moved[0]):g}), "
                "where the schedule's factor is on it: step your scheduler in fit(callback=lambda "
                "row: scheduler.step()) instead"
            )
