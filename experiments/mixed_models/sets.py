"""The data sets with their references, which lie beside a checkout (VARMETA_SHARED names their
place), not in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import varmeta as vm

SHARED = (
    Path(os.environ.get("VARMETA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
)
INTERCEPT = "intercept"


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(SHARED / name / "data.csv")


def reference(name: str, file: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((SHARED / name / file).read_text())
    return numbers


def regression(
    columns: Sequence[str], likelihood: Any, prior: vm.GaussianPrior, shared: Sequence[str] = ()
) -> vm.TaskModel:
    return vm.TaskModel(vm.LinearPredictor(columns), likelihood, prior, shared=shared)


def radon(x: list[str]) -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("radon_mn"), task="county", x=x, y="log_radon")


def rats() -> vm.TaskSet:
    frame = table("rats").assign(day=lambda d: d.day - 22.0)
    return vm.TaskSet.from_frame(frame, task="rat", x=["day"], y="weight")


def sleepstudy() -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("sleepstudy"), task="Subject", x=["Days"], y="Reaction")


def dyestuff() -> vm.TaskSet:
    return vm.TaskSet.from_frame(table("dyestuff"), task="Batch", x=[], y="Yield")


COLUMNS = [
    "part",
    "data",
    "model",
    "quantity",
    "varmeta",
    "reference",
    "error",
    "sd_ratio",
    "k_hat",
    "ess",
    "seconds",
]
