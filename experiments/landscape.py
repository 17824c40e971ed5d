"""The pictures of "Notes on iMAML" (Huszar, 2019) and the two that it announces, from the package's
own solvers.

(1) f, the anchored quadratic and their sum.  (2) The moving anchor.  (3) theta*(theta0) and its
jumps.  (4) d theta*/d theta0 by four routes.  (5) The meta-objective of iMAML beside the
variational one.  (6) Sums over many random tasks, and networks: what the meta-gradient sees of a
landscape that smooths.

    python -m experiments.landscape --out results/landscape --seeds 8 --size full

Writes figures (PNG, GIF), every number (landscape.json) and every curve (curves.json).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import varmeta as vm
from experiments import (
    landscape_figures,
    landscape_networks,
    landscape_sums,
    landscape_sums_figures,
)
from varmeta.landscape.landscape import ROUTES

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sine": lambda t: torch.sin(3 * t) + 0.2 * t**2,
    "double well": lambda t: 0.5 * (t**2 - 1) ** 2 + 0.1 * t,
    "sharp and wide": lambda t: (
        -1.2 * torch.exp(-0.5 * ((t + 1.2) / 0.15) ** 2)
        - 1.5 * torch.exp(-0.5 * ((t - 1.2) / 0.8) ** 2)
    ),
}
LOW, HIGH = -3.0, 3.0
PRECISIONS = (0.3, 1.0, 3.0, 10.0)
SIZES: dict[str, dict[str, int]] = {
    "full": {"anchors": 401, "frames": 40, "seeds": 8, "starts": 4, "budget": 6000, "points": 61},
    "smoke": {"anchors": 101, "frames": 12, "seeds": 2, "starts": 2, "budget": 300, "points": 7},
}


def minima(num_anchors: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(3) theta*(theta0) and its jumps, (4) its derivative by four routes, for every function and
    precision.
    """
    numbers: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    anchors = torch.linspace(LOW, HIGH, num_anchors, dtype=torch.float64)
    for name, f in FUNCTIONS.items():
        for precision in PRECISIONS:
            landscape = vm.Landscape.of(f, precision)
            jumps = landscape.jumps(LOW, HIGH, 61)
            away = torch.ones_like(anchors, dtype=torch.bool)
            for jump in jumps:
                away &= (anchors - jump.anchor).abs() > 1e-3
            theta = landscape.argmin(anchors)
            routes = {route: landscape.derivative(anchors, route)[:, 0] for route in ROUTES}
            closed = routes[ROUTES[0]]
            key = f"{name}, lambda = {precision:g}"
            numbers[key] = {
                "jumps": [{"anchor": j.anchor, "left": j.left, "right": j.right} for j in jumps],
                "largest difference from the closed form": {
                    route: float((values - closed)[away].abs().max())
                    for route, values in routes.items()
                },
                "flattest": _at(anchors, theta, closed, int(closed.argmin())),
                "steepest": _at(anchors, theta, closed, int(closed.argmax())),
            }
            curves[key] = {
                "theta": theta[:, 0].tolist(),
                "derivative": {route: values.tolist() for route, values in routes.items()},
            }
    return numbers, {"anchors": anchors.tolist(), **curves}


def _at(anchors: Tensor, theta: Tensor, derivative: Tensor, index: int) -> dict[str, float]:
    values = {"anchor": anchors[index], "theta": theta[index, 0], "derivative": derivative[index]}
    return {name: float(value) for name, value in values.items()}


def objectives(num_anchors: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(5) Both objectives at lambda = 1, for the global minimum and for the one that gradient
    descent from theta0 reaches.
    """
    numbers: dict[str, Any] = {}
    anchors = torch.linspace(LOW, HIGH, num_anchors, dtype=torch.float64)
    curves: dict[str, Any] = {"anchors": anchors.tolist()}
    for name, f in FUNCTIONS.items():
        landscape = vm.Landscape.of(f)
        # 1 / curvature is at least 0.018 here, and larger steps get there sooner
        algs = {
            "argmin": landscape.argmin(anchors),
            "reached": landscape.reached(anchors, vm.GradientDescent(0.018)),
        }
        for alg, theta in algs.items():
            curves[f"{name}, {alg}"] = {
                "f": landscape.loss(anchors)[:, 0].tolist(),
                "theta": theta[:, 0].tolist(),
                "imaml": landscape.meta_objective(anchors, theta)[:, 0].tolist(),
                "variational": landscape.variational_objective(anchors, theta)[:, 0].tolist(),
            }
        numbers[name] = [
            {
                "anchor": jump.anchor,
                "imaml jumps by": float(landscape.loss(jump.right) - landscape.loss(jump.left)),
                "variational jumps by": float(
                    landscape.regularized(jump.right, jump.anchor)
                    - landscape.regularized(jump.left, jump.anchor)
                ),
            }
            for jump in landscape.jumps(LOW, HIGH, 61)
        ]
    return numbers, curves


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/landscape"))
    parser.add_argument(
        "--seeds", type=int, help="families of random tasks; by default 8 (full) or 2 (smoke)"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    arguments = parser.parse_args()
    out, size = arguments.out, SIZES[arguments.size]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small matrices: the second core serves the networks
    begin = perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        networks = pool.submit(
            landscape_networks.run, size["starts"], size["budget"], size["points"]
        )
        numbers: dict[str, Any] = {}
        curves: dict[str, Any] = {}
        numbers["minima"], curves["minima"] = minima(size["anchors"])
        numbers["objectives"], curves["objectives"] = objectives(size["anchors"])
        landscapes = {name: vm.Landscape.of(f) for name, f in FUNCTIONS.items()}
        landscape_figures.draw_one_task(out, landscapes, numbers, curves, size["frames"])
        numbers["sums"], curves["sums"] = landscape_sums.study(arguments.seeds or size["seeds"])
        landscape_sums_figures.draw_sums(out, numbers["sums"], curves["sums"])
        numbers["networks"], curves["networks"] = networks.result()
    landscape_sums_figures.draw_networks(out, numbers["networks"], curves["networks"])
    numbers["seconds"] = perf_counter() - begin
    (out / "landscape.json").write_text(json.dumps(numbers, indent=1))
    (out / "curves.json").write_text(json.dumps(curves))
    report(numbers)
    print(f"\nwritten to {out}/ in {numbers['seconds']:.0f} s")


def report(numbers: dict[str, Any]) -> None:
    """The numbers in a page."""
    print(
        "jumps of theta*(theta0), and the largest difference of any route to its derivative from "
        "the closed form"
    )
    for key, row in numbers["minima"].items():
        jumps = ", ".join(f"{jump['anchor']:.6f}" for jump in row["jumps"]) or "none"
        worst = max(row["largest difference from the closed form"].values())
        print(f"  {key:30s} {worst:.1e}   {jumps}")
    print("\nsums of random tasks")
    landscape_sums.report(numbers["sums"])
    print("\nnetworks")
    for name in landscape_networks.OBJECTIVES:
        print(f"  {name:12s} {json.dumps(numbers['networks'][name])}")


if __name__ == "__main__":
    main()
