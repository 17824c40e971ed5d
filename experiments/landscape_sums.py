"""Does the sum over tasks smooth the meta-objective, and does the meta-gradient know?  One scalar
weight, random tasks.

Task i has f_i(t) = a sin(w t + b) + 0.1 (t - c)^2 with a ~ U(0.5, 1.5), w ~ U(2, 4), b ~ U(-pi,
pi), c ~ U(-2, 2); lambda = 1 and theta* is the global minimum.  A seed is one family of tasks; its
first 1, 4, 16, 64, 256 are the sums.

    python -m experiments.landscape_sums --seeds 20 --precision 3 --phase 0.5  # b ~ U(-0.5, 0.5)
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import varmeta as vm

TASKS = (1, 4, 16, 64, 256)
OBJECTIVES = ("imaml", "variational")
LOW, HIGH, ANCHORS = -4.0, 4.0, 401
WINDOW = 12  # anchors to either side, over which slopes are taken: 0.24
COMMON = "excess at the end, by the iMAML objective"
NEAR = 0.01  # "1 %": of the distance between the median value over all starts and the best


def waves(theta: Tensor, c: Tensor) -> Tensor:
    return c[..., 0] * torch.sin(c[..., 1] * theta + c[..., 2]) + 0.1 * (theta - c[..., 3]) ** 2


def family(num_tasks: int, seed: int, phase: float = math.pi) -> Tensor:
    """Coefficients a, w, b, c, `(tasks, 4)`; phases b in [-phase, phase]."""
    u = torch.rand(num_tasks, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = torch.tensor([0.5, 2.0, -phase, -2.0], dtype=torch.float64)
    high = torch.tensor([1.5, 4.0, phase, 2.0], dtype=torch.float64)
    return low + (high - low) * u


def ends_of_descent(slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where gradient descent with vanishing steps ends from every anchor: the two anchors between
    which it comes to rest.

    It walks against the sign of the slope that it is told, until the sign turns.  Jumps of the
    value are not in the slope: it steps over them, up or down, and rests at one where the slopes on
    both sides point to it.
    """
    rises = slope > 0
    turns = np.flatnonzero(~rises[:-1] & rises[1:])  # rest between k and k + 1
    rests = np.concatenate([[-1], turns, [len(slope) - 1]])  # or at an end of the range
    at = np.arange(len(slope))
    right = rests[np.searchsorted(rests, at)]  # the first rest at or after
    left = rests[np.searchsorted(rests, at) - 1]
    rest = np.where(rises, left, right)
    return rest.clip(0), (rest + 1).clip(max=len(slope) - 1)


def study(
    seeds: int, tasks: tuple[int, ...] = TASKS, precision: float = 1.0, phase: float = math.pi
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Numbers with intervals over seeds, and the curves of the first seed."""
    anchors = torch.linspace(LOW, HIGH, ANCHORS, dtype=torch.float64)
    rows: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {n: [] for n in tasks} for name in OBJECTIVES
    }
    curves: dict[str, Any] = {"anchors": anchors.tolist()}
    for seed in range(seeds):
        landscape = vm.Landscape.of(waves, precision, family(max(tasks), seed, phase), spacing=0.04)
        theta = landscape.argmin(anchors)
        values = {
            "imaml": landscape.meta_objective(anchors, theta),
            "variational": landscape.variational_objective(anchors, theta),
        }
        slopes = {
            "imaml": landscape.gradient(anchors, "query", theta),
            "variational": landscape.gradient(anchors, "elbo", theta),
        }
        for name in OBJECTIVES:
            for n in tasks:
                value, slope = (part[name][:, :n].mean(1).numpy() for part in (values, slopes))
                common = values["imaml"][:, :n].mean(1).numpy()
                rows[name][n].append(_numbers(value, slope, common))
                if seed == 0:
                    curves |= {f"{name} {n}": value.tolist()}
                    trend, told = _slopes(value, slope)
                    curves |= {
                        f"{name} {n} slope": trend.tolist(),
                        f"{name} {n} mean gradient": told.tolist(),
                    }
    numbers: dict[str, Any] = {
        name: {
            n: {key: _interval([row[key] for row in rows[name][n]]) for key in rows[name][n][0]}
            for n in tasks
        }
        for name in OBJECTIVES
    }
    pairs = {n: zip(rows["variational"][n], rows["imaml"][n], strict=True) for n in tasks}
    numbers["variational - imaml"] = {
        n: {COMMON: _interval([a[COMMON] - b[COMMON] for a, b in pairs[n]])} for n in tasks
    }
    return numbers, curves


def _numbers(value: np.ndarray, slope: np.ndarray, common: np.ndarray) -> dict[str, float]:
    """Of one sum: value and slope of the objective itself, and the value of the one by which both
    are compared.
    """
    left, right = ends_of_descent(slope)
    end = np.where(value[left] <= value[right], left, right)
    trend, told = _slopes(value, slope)
    excess, excess_common = ((v[end] - v.min()) / (np.median(v) - v.min()) for v in (value, common))
    return {
        "share of starts that end within 1 %": float((excess <= NEAR).mean()),
        "excess at the end": float(excess.mean()),
        COMMON: float(excess_common.mean()),
        "resting places": float(len(np.unique(end))),
        "largest step / range": float(np.abs(np.diff(value)).max() / np.ptp(value)),
        "share of the variation in jumps": _jump_share(value, slope),
        "error of the gradient": float(np.sqrt(((told - trend) ** 2).mean() / (trend**2).mean())),
    }


def _slopes(value: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How the value really changes over a window, and the mean of the gradients in it."""
    step = (HIGH - LOW) / (ANCHORS - 1)
    trend = (value[2 * WINDOW :] - value[: -2 * WINDOW]) / (2 * WINDOW * step)
    total = np.concatenate([[0.0], np.cumsum(0.5 * (slope[1:] + slope[:-1]))])
    return trend, (total[2 * WINDOW :] - total[: -2 * WINDOW]) / (2 * WINDOW)


def _jump_share(value: np.ndarray, slope: np.ndarray) -> float:
    """What of the total variation of the value is not in its slope."""
    step = (HIGH - LOW) / (ANCHORS - 1)
    smooth = 0.5 * (slope[1:] + slope[:-1]) * step
    jumps = np.abs(np.diff(value) - smooth).sum()
    return float(jumps / (jumps + np.abs(smooth).sum()))


def _interval(values: list[float]) -> dict[str, float]:
    """Mean over seeds with a bootstrap 95 % interval."""
    array = np.array(values)
    draws = array[np.random.default_rng(0).integers(len(array), size=(2000, len(array)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": float(array.mean()), "low": float(low), "high": float(high)}


def report(numbers: dict[str, Any]) -> None:
    """The numbers that matter, one line for each objective."""
    for what in ("share of starts that end within 1 %", COMMON, "error of the gradient"):
        print(f"  {what}: mean [95 % interval over families]")
        for name, sums in numbers.items():
            rows = [(n, row[what]) for n, row in sums.items() if what in row]
            if rows:
                cells = [
                    f"{n}: {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
                    for n, row in rows
                ]
                print(f"    {name:20s} {'  '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--precision", type=float, default=1.0)
    parser.add_argument("--phase", type=float, default=math.pi)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report(study(arguments.seeds, precision=arguments.precision, phase=arguments.phase)[0])


if __name__ == "__main__":
    main()
