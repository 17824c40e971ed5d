"""Zhou et al.'s sinusoids: a shared body of tanh layers, and a Gaussian head in closed form.

y = a sin(x + b), a ~ U(0.1, 5), b ~ U(0, 2 pi), x ~ U(-5, 5), without noise; 200 tasks of 50 points
to learn from, 200 unseen ones that show 5 or 10 points and are scored on a grid of 200.  100 more
tasks, seen by neither, tell which step to keep and how wide the noise is.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import pandas as pd
import torch
from torch import nn

import varmeta as vm

PUBLISHED = {"MAML": (0.208, 0.033), "Meta-MinibatchProx": (0.149, 0.027)}


def tasks(number: int, points: int, seed: int) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-5, 5, 200).unsqueeze(-1)
    found = []
    for index in range(number):
        a, b = torch.rand(2, generator=generator)
        x = 10 * torch.rand(points, 1, generator=generator) - 5

        def curve(x: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b) -> torch.Tensor:
            return ((0.1 + 4.9 * a) * torch.sin(x + 2 * math.pi * b)).squeeze(-1)

        found.append(vm.Task((x, curve(x)), (grid, curve(grid)), f"{seed}/{index}"))
    return vm.TaskSet(found)


def learn(train: vm.TaskSet, held: vm.TaskSet, num_steps: int, seed: int) -> vm.Fit:
    """The recipe of docs/strategies.md."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(scale=0.3), prior, shared=["0.*", "2.*"])
    return vm.fit(
        model, train, vm.Joint("multivariate_normal"), num_steps,
        lambda parameters: torch.optim.Adam(parameters, 3e-3), batch_size=25, seed=seed,
        validate=vm.Validation(held, every=250, patience=None, calibrate=True),
    )  # fmt: skip


def held_out(seed: int) -> vm.TaskSet:
    """50 tasks that show 5 points, and 50 that show 10."""
    return vm.TaskSet([t for shots in (5, 10) for t in tasks(50, shots, 10 * seed + shots + 1)])


def score(fit: vm.Fit, test: vm.TaskSet) -> dict[str, float]:
    row = fit.adapt(test).score().loc["all"]
    return {"mse": float(row["rmse"]) ** 2, "coverage": float(row["coverage"])}


def run(arguments: argparse.Namespace) -> None:
    steps = 20 if arguments.size == "smoke" else 3_000
    rows: list[dict[str, Any]] = []
    for seed in range(1 if arguments.size == "smoke" else arguments.seeds):
        train = tasks(200, 50, 10 * seed)
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            fit = learn(train, held_out(seed), steps, seed)
        seconds = time.perf_counter() - begin
        for shots in (5, 10):
            found = score(fit, tasks(200, shots, 10 * seed + shots))
            row = {"seed": seed, "shots": shots, **found, "seconds": seconds}
            rows.append(row)
            print({k: round(v, 6) for k, v in row.items()}, flush=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(arguments.out / "closed_form_sinusoids.csv", index=False)
    print(frame.groupby("shots")["mse"].agg(["mean", "min", "max"]))
    print("published, of methods that move the whole network:", PUBLISHED)
