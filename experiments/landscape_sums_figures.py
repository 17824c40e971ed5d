"""The figures of `experiments.landscape` that show many tasks, and networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.landscape_figures import ANCHOR, STYLE, blues, save, shades
from experiments.landscape_networks import OBJECTIVES
from varmeta.plot import INK, MUTED, WARM

COLOURS = {"imaml": WARM, "variational": INK}
LABELS = {"imaml": "iMAML", "variational": "variational"}


def ramp(name: str, count: int) -> list[Any]:
    return blues(count) if name == "variational" else shades("#7a3b0c", WARM, "#f6d9bd", count)


def draw_sums(out: Path, numbers: dict[str, Any], curves: dict[str, Any]) -> None:
    with plt.rc_context(STYLE):
        save(sums(numbers, curves), out / "6_sums.png")


def draw_networks(out: Path, numbers: dict[str, Any], curves: dict[str, Any]) -> None:
    with plt.rc_context(STYLE):
        save(networks(numbers, curves), out / "6_networks.png")


def sums(numbers: dict[str, Any], curves: dict[str, Any]) -> Figure:
    """The objectives as tasks are added; what their gradients see; where descent ends."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.04)  # type: ignore[union-attr, call-arg]
    anchors = np.asarray(curves["anchors"])
    counts = list(numbers["imaml"])
    for row, name in enumerate(COLOURS):
        ax = axes[row, 0]
        for count, colour in zip(counts, ramp(name, len(counts)), strict=True):
            ax.plot(anchors, curves[f"{name} {count}"], color=colour, lw=1.5, label=f"{count}")
        ax.set_title(f"{LABELS[name]} objective per task")
        ax.set_xlabel(ANCHOR)
        ax.set_ylabel("nats per task")
        ax.legend(title="tasks", loc="best", fontsize=8, title_fontsize=8)
        ax = axes[row, 1]
        half = (len(anchors) - len(curves[f"{name} {counts[-1]} slope"])) // 2
        inner = anchors[half:-half]
        ax.plot(
            inner,
            curves[f"{name} {counts[-1]} slope"],
            color=MUTED,
            lw=3,
            alpha=0.7,
            label="slope of the objective",
        )
        told = curves[f"{name} {counts[-1]} mean gradient"]
        ax.plot(inner, told, color=COLOURS[name], lw=1.4, label="meta-gradient")
        ax.axhline(0, color="#cccccc", lw=0.7, zorder=0)
        ax.set_title(f"{LABELS[name]}, {counts[-1]} tasks: slope and gradient")
        ax.set_xlabel(ANCHOR)
        ax.set_ylabel("nats per task and unit")
        ax.legend(loc="best")
    shares(axes[0, 2], numbers, "share of starts that end within 1 %", "share of starts")
    axes[0, 2].set_title("descents that end within 1 % of the best")
    axes[0, 2].set_ylim(-0.03, 1.03)
    shares(
        axes[1, 2],
        numbers,
        "excess at the end, by the iMAML objective",
        r"excess of $M$ / (median $-$ best)",
    )
    axes[1, 2].set_title("where it ends, by the iMAML objective")
    axes[1, 2].set_yscale("log")
    return figure


def shares(ax: Axes, numbers: dict[str, Any], what: str, label: str) -> None:
    """A number against the count of tasks, with its interval over families."""
    for name, colour in COLOURS.items():
        counts = np.array([int(count) for count in numbers[name]])
        cells = [row[what] for row in numbers[name].values()]
        mean, low, high = (
            np.array([cell[key] for cell in cells]) for key in ("mean", "low", "high")
        )
        ax.fill_between(counts, low, high, color=colour, alpha=0.18, lw=0)
        ax.plot(counts, mean, "o-", color=colour, ms=4, lw=1.6, label=LABELS[name])
    ax.set_xscale("log", base=4)
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    ax.set_xlabel("tasks in the sum")
    ax.set_ylabel(label)
    ax.legend(loc="best")


def networks(numbers: dict[str, Any], curves: dict[str, Any]) -> Figure:
    """Both objectives on a line through two starts; the descents; how well unseen tasks are
    fitted.
    """
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    figure.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr, call-arg]
    line, descents = curves["line"], curves["descents"]
    for name, colour in COLOURS.items():
        values = np.asarray(line[name])
        axes[0].plot(line["share"], values - values.min(), color=colour, lw=1.8, label=LABELS[name])
        best, median = numbers[name]["best value"], numbers[name]["median value of the starts"]
        for key, curve in descents.items():
            if key.startswith(name):
                excess = (np.asarray(curve["loss"]) - best) / (median - best)
                axes[1].plot(
                    curve["evaluations"],
                    excess,
                    color=colour,
                    lw=1.2,
                    alpha=0.8,
                    label=LABELS[name],
                )
        ends = [row for row in numbers["ends"] if row["objective"] == name]
        place = list(OBJECTIVES).index(name)
        jitter = np.linspace(-0.12, 0.12, len(ends))
        axes[2].plot(
            place + jitter,
            [row["rmse of unseen tasks"] for row in ends],
            "o",
            color=colour,
            ms=6,
            alpha=0.85,
        )
    axes[0].set_title(r"on a line through two starts $\theta_0$")
    axes[0].set_xlabel("from one start (0) to the other (1)")
    axes[0].set_ylabel("nats per task above the lowest")
    axes[1].set_title("descent from each start")
    axes[1].set_xlabel("gradient evaluations per task")
    axes[1].set_ylabel("excess / (median start $-$ best)")
    axes[1].set_yscale("symlog", linthresh=0.01)
    axes[2].set_title("unseen tasks, adapted from 10 points")
    axes[2].set_xticks(range(len(OBJECTIVES)), [LABELS[name] for name in OBJECTIVES])
    axes[2].set_xlim(-0.6, len(OBJECTIVES) - 0.4)
    axes[2].set_ylabel("RMSE")
    axes[2].set_ylim(0, 1.3 * max(row["rmse of unseen tasks"] for row in numbers["ends"]))
    for ax in axes[:2]:
        handles, labels = ax.get_legend_handles_labels()
        first = dict(zip(labels[::-1], handles[::-1], strict=True))
        ax.legend(first.values(), first.keys())
    return figure
