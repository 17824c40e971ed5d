"""Is the jointly optimised solution reachable from theta0, and does reinitialising every k steps
help?

The post: "the final values of theta_i which we reach by jointly optimizing over everything may not
be reachable by doing SGD from theta0 from scratch", and "every once in a while reinitialize theta_i
to be theta0".

For k from 1 to infinity (`Joint`), on sinusoids and on life expectancy in 142 countries: how much
worse F_i is where the inner loop from the prior ends than at the stored phi_i (`vm.reachability`),
and the score on tasks never seen.

    python -m experiments.reachability --out results/reachability --seeds 5 --size full
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import varmeta as vm
from experiments.demo import tasks_of
from varmeta.guides.make import GuideName
from varmeta.plot import BAND, INK, MUTED
from varmeta.verbs.report import interval

Periods = tuple[int | None, ...]
PERIODS: dict[str, Periods] = {
    "full": (1, 2, 5, 20, 100, 500, None),
    "smoke": (1, 20, None),
}  # None: never (Joint)
SIZES: dict[str, dict[str, int]] = {
    "full": {"steps": 2000, "seeds": 5},
    "smoke": {"steps": 40, "seeds": 2},
}
PANELS: tuple[tuple[str, GuideName], ...] = (
    ("sinusoids", "delta"),
    ("life expectancy", "delta"),
    ("life expectancy", "normal"),
)


def sinusoids(seed: int) -> tuple[vm.TaskModel, vm.TaskSet, vm.TaskSet]:
    """50 training and 50 test sinusoids, 10 points each, a 1-20-20-1 tanh network."""
    noise = 0.1
    train = vm.datasets.sinusoids(50, 10, seed=100 + seed, noise=noise)
    test = vm.datasets.sinusoids(50, 10, 40, seed=200 + seed, noise=noise)
    net = initialised(
        nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)),
        seed,
    )
    likelihood = vm.likelihoods.Gaussian(scale=0.3, learn_scale=False)
    return vm.TaskModel(net, likelihood, vm.GaussianPrior(10.0)), train, test


def countries(seed: int) -> tuple[vm.TaskModel, vm.TaskSet, vm.TaskSet]:
    """Life expectancy: 85 training countries with all years, 28 unseen ones adapted to 1952-1977
    and scored on 1982-2007.
    """
    table = vm.datasets.gapminder(as_frame=True)
    train, test = (tasks_of(table[table["task_split"] == part]) for part in ("train", "test"))
    train, scaling = train.standardized()
    net = initialised(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), seed)
    likelihood = vm.likelihoods.Gaussian(scale=0.15, learn_scale=False)
    return (
        vm.TaskModel(net, likelihood, vm.GaussianPrior(10.0)),
        train.merged(),
        scaling.apply(test),
    )


DATA: dict[str, Callable[[int], tuple[vm.TaskModel, vm.TaskSet, vm.TaskSet]]] = {
    "sinusoids": sinusoids,
    "life expectancy": countries,
}


def initialised(net: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return net


def strategy(guide: GuideName, every: int | None) -> vm.Joint:
    options: dict[str, Any] = {"minimizer": vm.Adam(lr=3e-2), "adapt_steps": 400}
    return vm.Joint(guide, **options) if every is None else vm.Reinit(guide, every=every, **options)


def run(
    data: str, guide: GuideName, every: int | None, seed: int, steps: int
) -> tuple[dict[str, Any], vm.Reachability, pd.Series]:
    model, train, test = DATA[data](seed)
    # the last period ends with the run, so that the stored posteriors are at the end of theirs
    fit = vm.fit(
        model,
        train,
        strategy(guide, every),
        steps,
        lambda params: torch.optim.Adam(params, 1e-2),
        seed=seed,
        progress=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # a task whose Newton steps stall is scored as it is
        scores = fit.adapt(test).score(num_samples=200, seed=seed).iloc[:-1]
    # the best that an inner loop from the prior can do, and a plain one
    reached = vm.reachability(fit)
    plain = vm.reachability(fit, vm.Adam(lr=3e-2), 200)
    gap = reached.gap
    row = {
        "data": data,
        "guide": guide,
        "every": every or 0,
        "seed": seed,
        "loss": fit.loss,
        "gap_median": float(gap.median()),
        "gap_90": float(gap.quantile(0.9)),
        "gap_above_1": float((gap > 1).double().mean()),
        "gap_adam_median": float(plain.gap.median()),
        "gap_adam_above_1": float((plain.gap > 1).double().mean()),
        "rmse": float(scores["rmse"].mean()),
        "log_density": float(scores["log_density"].mean()),
        "seconds": fit.run.seconds,
    }
    return row, reached, scores["rmse"]


def figures(
    cells: dict[tuple[str, GuideName, int], np.ndarray],
    gaps: pd.DataFrame,
    periods: Periods,
    out: Path,
) -> None:
    import matplotlib.pyplot as plt

    labels = [str(every) if every else r"$\infty$" for every in periods]
    figure, axes = plt.subplots(
        2, len(PANELS), figsize=(3.4 * len(PANELS), 5.4), layout="constrained", squeeze=False
    )
    for column, (data, guide) in enumerate(PANELS):
        top, bottom = axes[:, column]
        means, ends = [], []
        for every in periods:
            part = cells[data, guide, every or 0]
            means.append(part.mean())
            ends.append(interval(part))
        low, high = np.array(ends).T
        x = np.arange(len(periods))
        top.errorbar(
            x,
            means,
            yerr=[means - low, high - means],
            fmt="o-",
            color=INK,
            ecolor=BAND,
            elinewidth=3,
            ms=4,
        )
        top.set_title(f"{data}, guide {guide!r}", fontsize=9)
        top.set_ylabel("test RMSE" if column == 0 else "")
        for position, every in enumerate(periods):
            here = (
                (gaps["data"] == data) & (gaps["guide"] == guide) & (gaps["every"] == (every or 0))
            )
            quantiles = np.quantile(gaps.loc[here, "gap"], [0.1, 0.5, 0.9])
            bottom.vlines(position, quantiles[0], quantiles[2], color=BAND, lw=3)
            bottom.scatter(position, quantiles[1], color=INK, s=16, zorder=3)
        bottom.axhline(0.0, color=MUTED, lw=1, ls="--")
        bottom.set_yscale("symlog", linthresh=1.0)
        bottom.set_ylabel("F from the prior - F stored (nats)" if column == 0 else "")
        for ax in (top, bottom):
            ax.set_xticks(x, labels)
            ax.spines[["top", "right"]].set_visible(False)
        bottom.set_xlabel("reinitialised every k steps")
    figure.savefig(out / "reinitialisation.png", dpi=150)
    plt.close("all")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/reachability"))
    parser.add_argument("--seeds", type=int, help="by default 5 (full) or 2 (smoke)")
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    seeds = arguments.seeds or size["seeds"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    periods = PERIODS[arguments.size]
    begin = perf_counter()
    rows, gaps, cells = [], [], {}
    for data, guide in PANELS:
        for every in periods:
            scores = []
            for seed in range(seeds):
                row, reached, rmse = run(data, guide, every, seed, size["steps"])
                rows.append(row)
                gaps += [
                    {**{k: row[k] for k in ("data", "guide", "every", "seed")}, "gap": g}
                    for g in reached.gap.tolist()
                ]
                scores.append(rmse.to_numpy())
            # sinusoids are drawn anew for each seed, so tasks are not crossed with seeds there; the
            # interval is then wide
            cells[data, guide, every or 0] = np.stack(scores)
            part = pd.DataFrame(rows[-seeds:]).mean(numeric_only=True)
            print(
                f"{data}, {guide}, k = {every or 'infinity'}: loss {part['loss']:.1f}, gap "
                f"{part['gap_median']:.2g} nats (median; after 200 Adam steps "
                f"{part['gap_adam_median']:.2g}), above 1 nat in {part['gap_above_1']:.0%}; test "
                f"RMSE {part['rmse']:.3f}",
                flush=True,
            )
    table = pd.DataFrame(rows)
    table.to_csv(arguments.out / "reinitialisation.csv", index=False)
    frame = pd.DataFrame(gaps)
    frame.to_csv(arguments.out / "gaps.csv", index=False)
    figures(cells, frame, periods, arguments.out)
    summary = table.drop(columns=["seed", "seconds"]).groupby(
        ["data", "guide", "every"], sort=False
    )
    (arguments.out / "reachability.json").write_text(
        json.dumps(summary.mean().reset_index().to_dict("records"), indent=1) + "\n"
    )
    print(f"written to {arguments.out}/ in {perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
