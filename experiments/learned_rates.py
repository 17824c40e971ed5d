"""Does a learned inner learning rate beat the best fixed one?  MAML on sinusoids.

    python -m experiments.learned_rates --out results/learned_rates

A 1-40-40-1 network, 10 points a task, three inner steps; the same starts, minibatches, outer steps
and tasks for five fixed rates and for rates that are learned from the middle of the grid.  What is
judged is the mean squared error on tasks that nobody has seen; a difference is to the fixed rate
that is best on these very tasks, in the mean over seeds.
"""

from __future__ import annotations

import argparse
import csv
import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import varmeta as vm
from varmeta.verbs.report import interval

GRID = (0.005, 0.01, 0.02, 0.04, 0.08)
STEPS, BATCH = 3, 25
LEARNED = {
    "learned, one": vm.LearnedRates(GRID[2], "model"),
    "learned by layer": vm.LearnedRates(GRID[2]),
    "learned by layer and step": vm.LearnedRates(GRID[2], per_step=True),
    "learned by weight": vm.LearnedRates(GRID[2], "weight"),
}


def strategies() -> dict[str, vm.Strategy]:
    """By name; a rate is on the mean of a task's squared errors, as the field's."""
    fixed: dict[str, float | vm.LearnedRates] = {f"{rate:g}": rate for rate in GRID}
    rates = fixed | LEARNED
    return {
        name: vm.Unrolled("delta", "query", STEPS, vm.GradientDescent(rate, per_point=True))
        for name, rate in rates.items()
    }


def model() -> vm.TaskModel:
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    # half a squared error for a loss would halve the rates: 2 s^2 is 1 here
    noise = vm.likelihoods.Gaussian(math.sqrt(0.5), learn_scale=False)
    return vm.TaskModel(net, noise, vm.GaussianPrior(precision=0.01))


def adam(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-3)


def errors(seeds: int, num_steps: int, num_train: int, num_test: int) -> dict[str, np.ndarray]:
    """The mean squared error of every method on each unseen task, `(seeds, tasks)`."""
    train = vm.datasets.sinusoids(num_train, num_support=10, num_query=10, seed=1)
    test = vm.datasets.sinusoids(num_test, num_support=10, num_query=50, seed=2)
    share = min(1.0, BATCH / num_train)
    with warnings.catch_warnings():
        # of rates that are too large: what they lead to stands in the table
        warnings.simplefilter("ignore", RuntimeWarning)
        report = vm.compare(
            strategies(),
            model(),
            train,
            test,
            seeds,
            budget=num_steps * share * (3.0 * STEPS + 1.5),
            optimizer=adam,
            batch_size=BATCH,
            baselines=False,
            num_samples=1,
            compile=False,
        )
    tables = report.scores.assign(mse=report.scores["rmse"] ** 2)
    found = {}
    for name in strategies():
        own = tables[tables["method"] == name]
        cells = np.full((seeds, num_test), math.nan)
        for seed, rows in own.groupby("seed"):
            cells[int(str(seed))] = rows["mse"].to_numpy()
        found[name] = cells
    return found


def rows(found: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
    """One for each method; nan where a run came to no finite number."""
    fixed = {name: cells for name, cells in found.items() if name not in LEARNED}
    usable = {name: cells.mean() for name, cells in fixed.items() if np.isfinite(cells).all()}
    best = min(usable, key=lambda name: usable[name])
    made = []
    for name, cells in found.items():
        low, high = interval(cells)
        row = {"rate": name, "mse": f"{cells.mean():.3f}", "interval": f"{low:.3f} to {high:.3f}"}
        less, more = interval(cells - found[best])
        by_seed = cells.mean(1)
        # against the best fixed rate of each seed by itself, which nobody knows beforehand
        lowest = np.nanmin(np.stack([one.mean(1) for one in fixed.values()]), 0)
        learned = name in LEARNED
        row |= {
            f"less {best}": f"{(cells - found[best]).mean():+.3f}" if learned else "",
            "its interval": f"{less:+.3f} to {more:+.3f}" if learned else "",
            "seeds won": f"{int((by_seed < lowest).sum())} of {len(by_seed)}" if learned else "",
        }
        made.append(row)
    return made


SIZES = {"smoke": (20, 30, 5), "full": (400, 1000, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results/learned_rates"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="full")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other
    found = rows(errors(options.seeds, *SIZES[options.size]))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "learned_rates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)
    widths = {key: max(len(key), *(len(row[key]) for row in found)) for key in found[0]}
    for row in ({key: key for key in found[0]}, *found):
        print("  ".join(f"{row[key]:<{width}}" for key, width in widths.items()).rstrip())


if __name__ == "__main__":
    main()
