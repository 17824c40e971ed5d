"""From a table to the printed fit, beside lme_python, mixedlm and statsmodels."""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import varmeta as vm

SHARED = (
    Path(os.environ.get("VARMETA_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
)
# file, task, predictor, response
SETS = {
    "sleepstudy": ("Subject", "Days", "Reaction"),
    "hsb82": ("school", "cses", "mAch"),
    "radon_all": ("county", "floor", "log_radon"),
}


def table(folder: Path, name: str) -> pd.DataFrame:
    frame = pd.read_csv(folder / name / "data.csv")
    frame = frame[frame.floor < 2] if name == "radon_all" else frame
    return frame[list(SETS[name])].rename(
        columns=dict(zip(SETS[name], ("task", "x", "y"), strict=True))
    )


def ours(frame: pd.DataFrame) -> tuple[float, str]:
    tasks = vm.TaskSet.from_frame(frame, task="task", x=["x"], y="y")
    prior = vm.GaussianPrior(learn_precision="full")
    fit = vm.fit(vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior), tasks)
    text = str(fit)
    return (float("nan") if fit.log_likelihood is None else fit.log_likelihood), text


def lme_python(frame: pd.DataFrame) -> tuple[float, str]:
    import lme_python as lme

    fit = lme.lmer("y ~ x + (x | task)", frame, reml=False)
    return float(fit.log_likelihood), str(fit)


def mixedlm(frame: pd.DataFrame) -> tuple[float, str]:
    import mixedlm as mlm

    fit = mlm.lmer("y ~ x + (x | task)", frame, REML=False)
    return float(fit.logLik().value if hasattr(fit.logLik(), "value") else fit.logLik()), str(fit)


def statsmodels(frame: pd.DataFrame) -> tuple[float, str]:
    from statsmodels.regression.mixed_linear_model import MixedLM

    fit = MixedLM.from_formula("y ~ x", frame, groups="task", re_formula="~ x").fit(reml=False)
    return float(fit.llf), str(fit.summary())


WAYS: dict[str, Callable[[pd.DataFrame], tuple[float, str]]] = {
    "varmeta": ours,
    "lme_python": lme_python,
    "mixedlm": mixedlm,
    "statsmodels": statsmodels,
}


def run(arguments: argparse.Namespace) -> None:
    installed = {
        name: way
        for name, way in WAYS.items()
        if name == "varmeta" or importlib.util.find_spec(name) is not None
    }
    rounds, rows = (1 if arguments.size == "smoke" else 9), list[dict[str, Any]]()
    for data in SETS:
        if not (arguments.data / data / "data.csv").exists():
            print(f"{data}: no such set under {arguments.data}")
            continue
        frame = table(arguments.data, data)
        seconds: dict[str, list[float]] = {name: [] for name in installed}
        values: dict[str, float] = {}
        # in turns, so that a busy moment meets all; the first round is for imports
        for number in range(rounds + 1):
            for name, way in installed.items():
                begin = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    values[name], _ = way(frame)
                if number:
                    seconds[name].append(time.perf_counter() - begin)
        for name, found in seconds.items():
            row = {
                "data": data,
                "by": name,
                "median_ms": round(1e3 * statistics.median(found), 1),
                "least_ms": round(1e3 * min(found), 1),
                "log_likelihood": round(values[name], 5),
            }
            rows.append(row)
            print(row, flush=True)
    pd.DataFrame(rows).to_csv(arguments.out / "closed_form_speed.csv", index=False)
