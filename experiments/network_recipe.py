"""The first recipe for a network, on three sets of curves: python -m experiments.network_recipe
--data DIR --out DIR.

Data are standardised by what the known tasks show; a task shows ten rows (chickweight: half,
gapminder: six) and is scored on the rest.
Two recipes: "body" shares all layers but the last, whose weights are integrated out in closed form;
"whole" lets all layers vary under a mean-field guide.  Both leave the prior's precision to start at
the layers' fan-in.  A body that is fitted as a point fits few rows too well, so "body" holds a
fifth of the known tasks out and keeps the state that predicts them best.  DIR holds a folder per
set (see docs/strategies.md).
"""

from __future__ import annotations

import argparse
import csv
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

import varmeta as vm

Curves = list[tuple[str, np.ndarray, np.ndarray]]
SHARED = (
    Path(os.environ.get("VARMETA_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
)


def intel_lab(folder: Path) -> Curves:
    """Temperature of 50 sensors against the hours since the first midnight, and the time of day on
    its circle.
    """
    data = np.load(folder / "intel_lab" / "data.npz", allow_pickle=True)
    hours = data["hours"]
    x = np.stack([hours, np.sin(np.pi * hours / 12), np.cos(np.pi * hours / 12)], 1)
    return [(f"sensor {number}", x, y) for number, y in enumerate(data["temperature"])]


def _of_table(path: Path, task: str, x: str, y: str) -> Curves:
    groups = pd.read_csv(path).groupby(task, sort=False)
    return [
        (str(name), rows[[x]].to_numpy(float), rows[y].to_numpy(float)) for name, rows in groups
    ]


SETS: dict[str, tuple[Callable[[Path], Curves], Callable[[int], int]]] = {
    "intel_lab": (intel_lab, lambda rows: 10),
    "chickweight": (
        lambda folder: _of_table(folder / "chickweight" / "data.csv", "Chick", "Time", "weight"),
        lambda rows: rows // 2,
    ),
    "gapminder": (
        lambda folder: _of_table(folder / "gapminder" / "data.csv", "country", "year", "life_exp"),
        lambda rows: 6,
    ),
}


def split(curves: Curves, shown: Callable[[int], int], seed: int) -> tuple[vm.TaskSet, vm.TaskSet]:
    """Four fifths of the tasks to learn from, one fifth unseen, drawn by the seed as are the rows
    that are shown.
    """
    draw = np.random.default_rng(seed)
    tasks = []
    for name, x, y in curves:
        rows, count = draw.permutation(len(y)), max(1, shown(len(y)))
        known, rest = rows[:count], rows[count:]
        parts = [(x[r].astype("float32"), y[r].astype("float32")) for r in (known, rest)]
        tasks.append(vm.Task(parts[0], parts[1], name=name))
    order = draw.permutation(len(tasks))
    unseen = len(tasks) // 5
    train, scaling = vm.TaskSet([tasks[i] for i in order[unseen:]]).standardized()
    return train, scaling.apply(vm.TaskSet([tasks[i] for i in order[:unseen]]))


# Steps at most.
STEPS = {"body": 1000, "whole": 3000}


def fit(recipe: str, train: vm.TaskSet, num_steps: int, seed: int) -> vm.Fit:
    torch.manual_seed(seed)
    features = int(train.batch().support.x.shape[-1])
    net = nn.Sequential(
        nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    prior = vm.GaussianPrior(learn_precision="per_module")

    def adam(params: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, 1e-2)

    if recipe == "whole":
        model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior)
        return vm.fit(model, train, vm.Joint("normal"), num_steps, adam, seed=seed)
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), prior, shared=["0.*", "2.*"])
    held = max(1, len(train) // 5)
    known, validation = train[:-held], vm.Validation(train[-held:], every=20)
    head = vm.Joint("multivariate_normal")
    return vm.fit(model, known, head, num_steps, adam, seed=seed, validate=validation)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default=SHARED, help="folder with a folder for each set"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument(
        "--recipes", nargs="*", choices=("body", "whole"), default=["body", "whole"]
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.sets:
        make, shown = SETS[name]
        for recipe in arguments.recipes:
            for seed in range(arguments.seeds):
                train, unseen = split(make(arguments.data), shown, seed)
                begin = time.perf_counter()
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    most = 20 if arguments.size == "smoke" else STEPS[recipe]
                    found = fit(recipe, train, most, seed)
                    score = found.adapt(unseen).score(unseen).loc["all"]
                row = {
                    "set": name,
                    "recipe": recipe,
                    "seed": seed,
                    "steps": found.run.step,
                    "noise": float(found.prior.scale or 0.0),
                    "rmse": float(score["rmse"]),
                    "log_density": float(score["log_density"]),
                    "coverage": float(score["coverage"]),
                    "seconds": time.perf_counter() - begin,
                    "warnings": len(said),
                }
                rows.append(row)
                print(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()},
                    flush=True,
                )
                with (arguments.out / "network_recipe.csv").open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
