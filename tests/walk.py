"""How far a call walks through the house: python -m tests.walk.

For a default `vm.fit` of a regression with two weights per task, and for `fit.adapt` of two tasks:
how many of the package's files it enters, how often it crosses from one into another, and how often
it calls what one call should ask once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import varmeta as vm

ROOT = str(Path(vm.__file__).parent)
ONCE = ("Problem.make", "TaskModel.is_linear", "TaskModel.init")


@dataclass
class Walk:
    """files: entered; crossings: calls from one file into another, by both; calls: of each name."""

    files: set[str] = field(default_factory=set)
    crossings: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        here = frame.f_code.co_filename
        if event != "call" or not here.startswith(ROOT):
            return
        back = frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(ROOT):
            back = back.f_back
        self.files.add(os.path.relpath(here, ROOT))
        self.calls[frame.f_code.co_qualname] += 1
        if back is not None and back.f_code.co_filename != here:
            pair = (back.f_code.co_filename, here)
            self.crossings[os.path.relpath(pair[0], ROOT), os.path.relpath(pair[1], ROOT)] += 1

    @property
    def text(self) -> str:
        asked = ", ".join(f"{name} {self.calls[name]}" for name in ONCE)
        return f"{len(self.files)} files, {sum(self.crossings.values())} crossings; {asked}"


def walked(call: Callable[[], Any]) -> tuple[Any, Walk]:
    walk = Walk()
    sys.setprofile(walk)
    try:
        found = call()
    finally:
        sys.setprofile(None)
    return found, walk


def two_weights() -> tuple[vm.TaskModel, vm.TaskSet]:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for size in (5, 6, 7, 8, 5, 6):
        x, own, noise = (
            torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (size, 2, size)
        )
        tasks.append(vm.Task((x, 1 + 0.3 * own[0] + (0.5 + 0.3 * own[1]) * x + 0.3 * noise)))
    prior = vm.GaussianPrior(learn_precision="full")
    return vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior), vm.TaskSet(tasks)


def walks() -> dict[str, Walk]:
    model, tasks = two_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fit, of_fit = walked(lambda: vm.fit(model, tasks))
        _, of_adapt = walked(lambda: fit.adapt(tasks[:2]))
    return {"fit": of_fit, "adapt": of_adapt}


if __name__ == "__main__":
    for name, walk in walks().items():
        print(f"{name}: {walk.text}")
        for (one, other), times in walk.crossings.most_common(12):
            print(f"  {times:5d}  {one} -> {other}")
