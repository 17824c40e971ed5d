"""Does a stochastic Alg smooth the meta-objective, and which estimator of its gradient is worth its
cost?

One function with many minima, f(t) = sin 3t + 0.2 t^2 at lambda = 1, where every smoothed objective
is known by quadrature.

(a) The smoothed objective E f(theta), theta ~ Alg(f, theta0), for several noise levels, beside the
    deterministic one.
(b) Its gradient at twenty anchors for each kind of noise: at least 10^5 draws against central
    differences of the quadrature, and the part that the implicit function theorem alone gives.
(c) Standard error per cost of the estimators, as the walk gets longer.

    python -m experiments.stochastic --out results/stochastic --size full
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq
from torch import Tensor

import varmeta as vm
from varmeta.plot import BAND, INK, MUTED

LAMBDA, STEPS, LR, TEMPERATURE, START = 1.0, 12, 0.08, 0.5, 0.6
GRID = np.linspace(-7, 7, 1401)
SIZES: dict[str, dict[str, int]] = {
    "full": {"anchors": 20, "blocks": 50, "draws": 2000, "seeds": 20},
    "smoke": {"anchors": 3, "blocks": 5, "draws": 200, "seeds": 4},
}


# -- the function, as a model and as numpy ---------------------------------------------------------


def f(t: np.ndarray | float) -> Any:
    return np.sin(3 * t) + 0.2 * np.square(t)


def slope(t: np.ndarray | float, anchor: float) -> Any:
    """d/dt of f + lambda/2 (t - anchor)^2."""
    return 3 * np.cos(3 * t) + 0.4 * t + LAMBDA * (t - anchor)


def program(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    t = params["theta"]
    pyro.factor("f", -(torch.sin(3 * t) + 0.2 * t**2))


def one_function() -> tuple[vm.TaskModel, vm.TaskSet]:
    model = vm.TaskModel.from_pyro(
        program, {"theta": torch.zeros((), dtype=torch.float64)}, vm.GaussianPrior(LAMBDA)
    )
    point = ([[0.0]], [0.0])
    return model, vm.TaskSet([vm.Task(support=point, query=point, name="f")], dtype=torch.float64)


# -- smoothed objectives by quadrature -------------------------------------------------------------


def smoothed_by_start(anchor: float, scale: float = START, steps: int = STEPS) -> float:
    """E f(theta_K) over theta_0 ~ N(anchor, scale^2), K steps of gradient descent: quadrature over
    theta_0.
    """
    z = np.linspace(-9, 9, 200_001)
    weight = np.exp(-0.5 * z**2)
    t = anchor + scale * z
    for _ in range(steps):
        t = t - LR * slope(t, anchor)
    return float((weight * f(t)).sum() / weight.sum())


def smoothed_by_langevin(
    anchor: float,
    temperature: float = TEMPERATURE,
    steps: int = STEPS,
    start: float = 0.0,
    cooling: bool = False,
) -> float:
    """E f(theta_K) over K Langevin steps from the anchor (or N(anchor, start^2)): the value
    function, backwards over a grid.
    """
    value, mean = f(GRID), GRID - LR * slope(GRID, anchor)
    for k in reversed(range(steps)):
        scale = math.sqrt(2 * LR * temperature * (1 - k / steps if cooling else 1.0))
        kernel = np.exp(-0.5 * ((GRID[None, :] - mean[:, None]) / scale) ** 2)
        value = (kernel / kernel.sum(1, keepdims=True)) @ value
    if not start:
        return float(CubicSpline(GRID, value)(anchor))
    weight = np.exp(-0.5 * ((GRID - anchor) / start) ** 2)
    return float((weight * value).sum() / weight.sum())


def smoothed_at_minima(anchor: float) -> float:
    """sum_k P(basin k) f(minimum k) after K cooled Langevin steps from a random start: the density,
    forwards.
    """
    step = GRID[1] - GRID[0]
    density = np.exp(-0.5 * ((GRID - anchor) / START) ** 2)
    density /= density.sum() * step
    mean = GRID - LR * slope(GRID, anchor)
    for k in range(STEPS):
        scale = math.sqrt(2 * LR * TEMPERATURE * (1 - k / STEPS))
        kernel = np.exp(-0.5 * ((GRID[:, None] - mean[None, :]) / scale) ** 2) / (
            scale * math.sqrt(2 * math.pi)
        )
        density = kernel @ density * step
    values = slope(GRID, anchor)
    changes = np.flatnonzero(values[:-1] * values[1:] < 0)
    roots = [brentq(slope, GRID[i], GRID[i + 1], args=(anchor,), xtol=1e-14) for i in changes]
    minima, ridges = roots[::2], roots[1::2]
    cumulative = CubicSpline(GRID, density).antiderivative()
    edges = [GRID[0], *ridges, GRID[-1]]
    return float(
        sum(
            (cumulative(b) - cumulative(a)) * f(m)
            for a, b, m in zip(edges[:-1], edges[1:], minima, strict=True)
        )
    )


def central(objective: Callable[[float], float], anchor: float, h: float = 1e-4) -> float:
    return (objective(anchor + h) - objective(anchor - h)) / (2 * h)


# -- estimates -------------------------------------------------------------------------------------


def kinds(num_draws: int) -> dict[str, tuple[vm.Stochastic, Callable[[float], float]]]:
    """Each kind of noise with an estimator that serves it, and the exact objective."""
    langevin = vm.StochasticAlg(STEPS, LR, temperature=TEMPERATURE, num_draws=num_draws)
    return {
        "random start": (
            vm.Stochastic(
                vm.Unrolled("delta", "query"),
                vm.StochasticAlg(STEPS, LR, start_scale=START, num_draws=num_draws),
            ),
            smoothed_by_start,
        ),
        "Langevin noise": (
            vm.Stochastic(vm.Unrolled("delta", "query"), replace(langevin, cooling=False)),
            smoothed_by_langevin,
        ),
        "both, then to the minimum": (
            vm.Stochastic(
                vm.Implicit("delta", "query", on_unconverged="ignore"),
                replace(langevin, start_scale=START),
            ),
            smoothed_at_minima,
        ),
    }


def estimate(
    model: vm.TaskModel, tasks: vm.TaskSet, strategy: vm.Stochastic, anchor: float, blocks: int
) -> tuple[float, float, float]:
    """Mean and standard error of the gradient over blocks of draws, and the mean of its moving
    part.
    """
    rows = []
    for seed in range(blocks):
        result = vm.meta_gradient(
            model, tasks, strategy, seed, {"theta": torch.tensor(anchor, dtype=torch.float64)}
        )
        assert result.moving is not None  # strategy has an alg
        rows.append((float(result.grads["theta"]), float(result.moving["theta"])))
    total, moving = np.array(rows).T
    return float(total.mean()), float(total.std(ddof=1) / math.sqrt(blocks)), float(moving.mean())


def gradients(anchors: np.ndarray, blocks: int, draws: int) -> pd.DataFrame:
    model, tasks = one_function()
    rows = []
    for kind, (strategy, objective) in kinds(draws).items():
        for anchor in anchors.tolist():
            mean, error, moving = estimate(model, tasks, strategy, anchor, blocks)
            exact = central(objective, anchor)
            rows.append(
                {
                    "noise": kind,
                    "anchor": anchor,
                    "draws": blocks * draws,
                    "exact": exact,
                    "estimate": mean,
                    "standard_error": error,
                    "z": (mean - exact) / error,
                    "moving": moving,
                }
            )
        part = pd.DataFrame(rows).query("noise == @kind")
        print(
            f"{kind}: largest |z| {part['z'].abs().max():.2f} over {len(part)} anchors; the "
            f"implicit part alone is off by {(part['moving'] - part['exact']).abs().mean():.3f} "
            f"on average, of gradients of size {part['exact'].abs().mean():.3f}",
            flush=True,
        )
    return pd.DataFrame(rows)


def variance(seeds: int, draws: int, steps: list[int], anchor: float = 0.7) -> pd.DataFrame:
    """For each estimator and length of the walk: mean, standard error of one draw, and that of
    1,000 gradient evaluations.

    exact: of the objective that `Unrolled` has; `Implicit` goes on to the minimum and has another
        one.
    """
    model, tasks = one_function()
    rows = []
    for count in steps:
        exact = central(lambda a: smoothed_by_langevin(a, TEMPERATURE, count, START, True), anchor)  # noqa: B023
        for name, strategy, baseline in estimators(count, draws):
            found, cost = [], 0.0
            for seed in range(seeds):
                value, cost = one_gradient(model, tasks, strategy, seed, anchor, baseline)
                found.append(value)
            per_draw = float(np.std(found, ddof=1)) * math.sqrt(draws)
            rows.append(
                {
                    "estimator": name,
                    "steps": count,
                    "mean": float(np.mean(found)),
                    "exact": math.nan if isinstance(strategy.strategy, vm.Implicit) else exact,
                    "standard_error": per_draw / math.sqrt(seeds * draws),
                    "evaluations_per_draw": cost / draws,
                    "sd_per_draw": per_draw,
                    "error_per_1000_evaluations": per_draw / math.sqrt(1000 / (cost / draws)),
                }
            )
    return pd.DataFrame(rows)


def estimators(steps: int, draws: int) -> list[tuple[str, vm.Stochastic, bool]]:
    alg = vm.StochasticAlg(steps, LR, start_scale=START, temperature=TEMPERATURE, num_draws=draws)
    score = vm.Stochastic(vm.Unrolled("delta", "query"), alg)
    minimum = vm.Stochastic(vm.Implicit("delta", "query", on_unconverged="ignore"), alg)
    return [
        (
            "through the steps",
            vm.Stochastic(vm.Unrolled("delta", "query"), replace(alg, estimator="pathwise")),
            True,
        ),
        ("score, no baseline", score, False),
        ("score, leave one out (default)", score, True),
        ("score and minimum, leave one out (Implicit)", minimum, True),
    ]


def one_gradient(
    model: vm.TaskModel,
    tasks: vm.TaskSet,
    strategy: vm.Stochastic,
    seed: int,
    anchor: float,
    baseline: bool,
) -> tuple[float, float]:
    """The estimate of dM/dtheta0 from one block of draws, and its cost in gradient evaluations."""
    problem, batch = strategy.problem(model, tasks, seed), tasks.batch()
    eta = {"theta": torch.tensor(anchor, dtype=torch.float64, requires_grad=True)}
    scalar, state, stats = strategy.loss(problem, batch, eta, strategy.init(problem, batch, eta))
    value = float(torch.autograd.grad(scalar, eta["theta"])[0])
    if not baseline:
        # what the baseline took away: the mean loss times the mean score
        walk = strategy.alg.walk(problem, batch, eta, state.step - 1, graph=False)
        losses = problem.losses("query", batch.repeat(strategy.alg.num_draws), 0)(
            walk[-1], eta
        ).detach()
        weights = torch.full_like(losses, float(losses.mean()) / len(losses))
        score = strategy.alg.score(problem, batch, eta, state.step - 1, walk, weights)["theta"]
        value = value * (len(losses) - 1) / len(losses) + float(score)
    return value, float(stats.evaluations)


# -- figures ---------------------------------------------------------------------------------------


def figures(table: pd.DataFrame, errors: pd.DataFrame, out: Path) -> dict[str, Any]:
    import matplotlib.pyplot as plt

    anchors = np.linspace(-4, 4, 321)
    landscape = vm.Landscape.of(lambda t: torch.sin(3 * t) + 0.2 * t**2, LAMBDA)
    piecewise = landscape.meta_objective(torch.tensor(anchors))[:, 0].numpy()
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained")
    levels: dict[str, dict[float, Callable[[float], float]]] = {
        "random start, sd": {
            s: lambda a, s=s: smoothed_by_start(a, s, 60)  # type: ignore[misc]
            for s in (0.3, 0.6, 1.2)
        },
        "Langevin noise, temperature": {
            t: lambda a, t=t: smoothed_by_langevin(a, t, 60)  # type: ignore[misc]
            for t in (0.1, 0.5, 1.0)
        },
    }
    numbers: dict[str, Any] = {}
    for ax, (what, curves) in zip(axes, levels.items(), strict=True):
        ax.plot(anchors, piecewise, color=MUTED, lw=1, label="none (global argmin)")
        for shade, (level, objective) in zip((0.45, 0.7, 1.0), curves.items(), strict=True):
            values = [objective(a) for a in anchors[::4]]
            ax.plot(
                anchors[::4], values, color=INK, alpha=shade, lw=0.8 + shade, label=f"{level:g}"
            )
            numbers[f"minima of M, {what} {level:g}"] = int(
                (np.diff(np.sign(np.diff(values))) > 0).sum()
            )
        ax.set_xlabel(r"anchor $\theta_0$")
        ax.legend(title=what, fontsize=8, title_fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    numbers["minima of M, no noise"] = int((np.diff(np.sign(np.diff(piecewise))) > 0).sum())
    axes[0].set_ylabel(r"$M(\theta_0) = E\, f(\theta),\ \theta \sim$ Alg$(f, \theta_0)$")
    figure.savefig(out / "smoothed_objective.png", dpi=150)

    kinds_shown = list(dict.fromkeys(table["noise"]))
    figure, axes = plt.subplots(
        1, len(kinds_shown), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    for ax, kind in zip(axes, kinds_shown, strict=True):
        part = table[table["noise"] == kind]
        ax.axhline(0, color="#e3e6ea", lw=0.8)
        ax.plot(
            part["anchor"],
            part["exact"],
            color=BAND,
            lw=3,
            label="central differences of the quadrature",
        )
        ax.errorbar(
            part["anchor"],
            part["estimate"],
            yerr=3 * part["standard_error"],
            fmt="o",
            ms=3,
            color=INK,
            lw=1,
            label="estimate, 3 standard errors",
        )
        ax.plot(
            part["anchor"], part["moving"], color=MUTED, ls="--", lw=1.2, label="moving minima only"
        )
        ax.set_title(kind, fontsize=9)
        ax.set_xlabel(r"anchor $\theta_0$")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(r"$dM/d\theta_0$")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(out / "stochastic_gradient.png", dpi=150)

    figure, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    styles = [(MUTED, "-"), (BAND, ":"), (INK, "-"), (INK, "--")]
    for (color, style), (name, part) in zip(
        styles, errors.groupby("estimator", sort=False), strict=True
    ):
        # a mean that is many of its own standard errors off has missed the rare draws that carry it
        missed = ((part["mean"] - part["exact"]).abs() > 5 * part["standard_error"]).to_numpy()
        x, y = part["steps"].to_numpy(), part["error_per_1000_evaluations"].to_numpy()
        ax.plot(x[~missed], y[~missed], style, marker="o", ms=4, color=color, label=name)
        ax.plot(x[missed], y[missed], "o", ms=5, mfc="white", color=color)
        for at, value in zip(x[missed], y[missed], strict=True):
            ax.annotate(
                "an estimate of 0: every draw that matters was missed",
                (at, value),
                (-8, -3),
                fontsize=7,
                color=color,
                textcoords="offset points",
                ha="right",
            )
    ax.set_yscale("log")
    ax.set_xlabel("noisy steps K")
    ax.set_ylabel("standard error per\n1,000 gradient evaluations")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "estimator_variance.png", dpi=150)
    plt.close("all")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/stochastic"))
    parser.add_argument(
        "--seeds", type=int, help="blocks of draws behind each standard error of part (c)"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    begin = perf_counter()
    table = gradients(np.linspace(-2.4, 2.3, size["anchors"]), size["blocks"], size["draws"])
    table.to_csv(arguments.out / "stochastic_gradient.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # short walks end on ridges
        errors = variance(arguments.seeds or size["seeds"], 500, [3, 6, 12, 24, 48])
    errors.to_csv(arguments.out / "estimator_variance.csv", index=False)
    print(errors.round(4).to_string(index=False))
    numbers = figures(table, errors, arguments.out)
    numbers["largest |z|"] = {
        kind: float(part["z"].abs().max()) for kind, part in table.groupby("noise", sort=False)
    }
    (arguments.out / "stochastic.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(json.dumps(numbers, indent=1))
    print(f"written to {arguments.out}/ in {perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
