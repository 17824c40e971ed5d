"""Schedules of the step size: factors on whatever learning rate the optimiser then has."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from varmeta._checks import kind_of, nearest

Decay = Callable[[float], float]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
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
# Where a scheduler's own state stands in it.
SCHEDULER = "scheduler"


def scheduler_of(schedule: object) -> SchedulerFactory | None:
    """What makes a scheduler of torch's for an optimizer, where `schedule` is that.

    Raises ValueError for one that steps by a metric.

    >>> scheduler_of(partial(torch.optim.lr_scheduler.StepLR, step_size=100)) is not None
    True
    >>> scheduler_of(lambda fraction: 1.0 - fraction) is None
    True
    """
    made: Any = schedule.func if isinstance(schedule, partial) else schedule
    if not (isinstance(made, type) and issubclass(made, LRScheduler)):
        return None
    if issubclass(made, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau steps by a metric that you choose: make it in the optimizer's "
            "factory and step it in callback, scheduler.step(row['validation'])"
        )
    return schedule  # type: ignore[return-value]


def decay_of(schedule: ScheduleName | Decay | SchedulerFactory) -> Decay:
    """The factor as a function of the fraction of the way, from 0 to 1.

    A scheduler of torch's has its own way to change the rate: the factor is 1.

    Raises ValueError for an unknown name and for a function whose factor at the start, half way or
    the end is no finite number of at least 0; TypeError for what is neither.
    """
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {SCHEDULES} or a function, not {schedule!r}"
                f"{nearest(schedule, SCHEDULES)}"
            )
        return DECAYS[schedule]
    if scheduler_of(schedule) is not None:
        return DECAYS["constant"]
    if not callable(schedule):
        raise TypeError(
            f"schedule must be one of {SCHEDULES}, a function of the fraction of the way or a "
            "scheduler of torch's such as functools.partial(StepLR, step_size=100), not "
            f"{kind_of(schedule)}"
        )
    own: Any = schedule

    def checked(fraction: float) -> float:
        factor = own(min(1.0, fraction))
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

    try:
        own(0.0)
    except TypeError as error:
        raise TypeError(
            f"schedule is called with the fraction of the way, and raises TypeError: {error}.  A "
            "scheduler of torch's is given as functools.partial(StepLR, step_size=100)"
        ) from error
    for fraction in (0.0, 0.5, 1.0):
        checked(fraction)
    return checked


def label(schedule: ScheduleName | Decay | SchedulerFactory) -> str:
    return schedule if isinstance(schedule, str) else OWN


class Rates:
    """The rates of an optimizer, with a schedule's factor on them for the length of one step.

    Between two steps the optimizer holds the rates without the factor, so that a scheduler of the
    user's own, stepped from `fit(callback=...)`, reads and writes what it would without a schedule.

    taken: the first group's rate in the last step, with the factor on it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: SchedulerFactory | None = None,
        num_steps: int | None = None,
    ) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault(GIVEN, float(group["lr"]))
        self.taken = math.nan
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        last = getattr(self.scheduler, "total_steps", None)
        if last is not None and num_steps is not None and last < num_steps:
            raise ValueError(
                f"{type(self.scheduler).__name__} ends after its total_steps={last}, before "
                f"num_steps={num_steps}: give it as many"
            )

    def state(self) -> dict[str, Any]:
        """The optimizer's, and with it the scheduler's."""
        own = {} if self.scheduler is None else {SCHEDULER: self.scheduler.state_dict()}
        return {**self.optimizer.state_dict(), **own}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        given = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        if self.scheduler is not None and SCHEDULER in state:
            self.scheduler.load_state_dict(state[SCHEDULER])
        self.go_on_from(given)

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
        self.taken = float(during[0])
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
        if self.scheduler is not None:
            self.scheduler.step()
        if moved:
            raise ValueError(
                f"a hook changed the learning rate within optimizer.step (to {float(moved[0]):g}), "
                "where the schedule's factor is on it: step your scheduler in fit(callback=lambda "
                "row: scheduler.step()) instead"
            )
