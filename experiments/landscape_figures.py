"""The figures of `experiments.landscape` that show one task: the post's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import varmeta as vm
from varmeta.landscape.landscape import ROUTES
from varmeta.plot import BAND, INK, MUTED, WARM
from varmeta.plot.landscape import with_gaps

STAR = "#c1272d"  # the minimum
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "savefig.dpi": 150,
}
ANCHOR, MINIMUM = r"anchor $\theta_0$", r"$\theta^*(\theta_0)$"
IMAML, VARIATIONAL = (
    r"iMAML: $f(\theta^*)$",
    r"variational: $f(\theta^*) + \frac{\lambda}{2}(\theta^* - \theta_0)^2$",
)
Curves = dict[str, Any]


def shades(dark: str, middle: str, light: str, count: int) -> list[Any]:
    """From light to dark."""
    ramp = LinearSegmentedColormap.from_list("ramp", [light, middle, dark])
    return [ramp(position) for position in np.linspace(0.0, 1.0, count)]


def blues(count: int) -> list[Any]:
    return shades(INK, BAND, "#b3cbe6", count)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_one_task(
    out: Path, landscapes: dict[str, vm.Landscape], numbers: Curves, curves: Curves, frames: int
) -> None:  # fmt: skip
    with plt.rc_context(STYLE):
        save(three_curves(landscapes), out / "1_anchored_loss.png")
        post = landscapes["sine"]
        animate(post, out / "2_moving_anchor.gif", frames)
        save(strip(post), out / "2_moving_anchor.png")
        save(minima(curves["minima"], numbers["minima"]), out / "3_minimum.png")
        save(derivatives(curves["minima"], numbers["minima"]), out / "4_derivative.png")
        save(objectives(curves["objectives"], numbers["objectives"]), out / "5_objectives.png")


# -- (1), (2): f, the penalty and their sum --------------------------------------------------------


class Picture:
    """The post's three curves in one axis, for an anchor that may be moved."""

    def __init__(self, ax: Axes, landscape: vm.Landscape, low: float, high: float) -> None:
        self.ax, self.landscape = ax, landscape
        self.theta = torch.linspace(low, high, 400, dtype=torch.float64)
        self.f = landscape.loss(self.theta)[:, 0]
        spread = float(self.f.max() - self.f.min())
        self.floor = float(self.f.min()) - 0.25 * spread
        ax.set_xlim(low, high)
        ax.set_ylim(self.floor, float(self.f.max()) + 0.75 * spread)
        ax.plot(self.theta, self.f, color=INK, lw=1.8, label=r"loss $f(\theta)$")
        (self.penalty,) = ax.plot(
            [], [], color=WARM, lw=1.4, label=r"penalty $\frac{\lambda}{2}(\theta - \theta_0)^2$"
        )
        (self.sum,) = ax.plot([], [], color=BAND, lw=2.6, label="their sum")
        (self.star,) = ax.plot(
            [], [], "*", color=STAR, ms=13, mec="white", mew=0.6, label=r"its minimum $\theta^*$"
        )
        (self.mark,) = ax.plot([], [], "^", color=WARM, ms=8, clip_on=False, label=ANCHOR)
        ax.set_xlabel(r"weight $\theta$")

    def move(self, anchor: float) -> float:
        penalty = self.landscape.penalty(self.theta, anchor)[:, 0]
        star = float(self.landscape.argmin(anchor))
        self.penalty.set_data(self.theta, penalty)
        self.sum.set_data(self.theta, self.f + penalty)
        self.star.set_data([star], [float(self.landscape.regularized(star, anchor))])
        self.mark.set_data([anchor], [self.floor])
        return star


def three_curves(landscapes: dict[str, vm.Landscape]) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    views = {
        "sine": (1.3, 2.6),
        "double well": (-0.4, 1.7),
        "sharp and wide": (-0.6, 2.6),
    }  # the anchor, and how far to see
    for ax, (name, landscape) in zip(axes, landscapes.items(), strict=True):
        anchor, edge = views[name]
        Picture(ax, landscape, -edge, edge).move(anchor)
        ax.set_title(name)
    axes[0].set_ylabel("loss (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def animate(landscape: vm.Landscape, path: Path, frames: int) -> None:
    """Above, the three curves; below, theta* as a function of the anchor, drawn as the anchor
    moves.
    """
    low, high = -3.0, 3.0
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(6.4, 6.4), height_ratios=(3, 2), layout="constrained"
    )
    picture = Picture(upper, landscape, low, high)
    upper.set_ylabel("loss (nats)")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    lower.plot([low, high], [low, high], color=MUTED, lw=0.8, ls="--")
    lower.text(2.2, 2.3, r"$\theta^* = \theta_0$", color=MUTED, ha="right", va="bottom", fontsize=8)
    lower.set_xlim(low, high)
    lower.set_ylim(low, high)
    lower.set_xlabel(ANCHOR)
    lower.set_ylabel(MINIMUM)
    # there and back, slower at the ends
    anchors = torch.from_numpy(-2.8 * np.cos(2 * np.pi * np.arange(frames) / frames))
    fine = torch.linspace(-2.8, 2.8, 400, dtype=torch.float64)
    jumps = landscape.jumps(-2.8, 2.8)
    x, y = with_gaps(fine, landscape.argmin(fine)[:, 0], [jump.anchor for jump in jumps])
    lower.plot(x, y, color=BAND, lw=1, alpha=0.7)
    (trail,) = lower.plot([], [], color=INK, lw=2)
    (head,) = lower.plot([], [], "*", color=STAR, ms=13, mec="white", mew=0.6)
    lines = [ax.axvline(0, color=WARM, lw=0.9, ls=":") for ax in (upper, lower)]

    def show(frame: int) -> None:
        anchor = float(anchors[frame])
        star = picture.move(anchor)
        seen = x <= anchor if frame <= frames // 2 else x >= anchor
        trail.set_data(np.where(seen, x, np.nan), y)
        head.set_data([anchor], [star])
        for line in lines:
            line.set_xdata([anchor, anchor])

    show(0)  # an empty curve has no place in a layout
    figure.canvas.draw()
    # the layout stays: to find it again for each frame takes most of the time; so does
    # FuncAnimation, which draws it thrice
    figure.set_layout_engine("none")
    writer = PillowWriter(fps=14)
    with writer.saving(figure, str(path), dpi=90):
        for frame in range(frames):
            show(frame)
            writer.grab_frame()
    plt.close(figure)


def strip(landscape: vm.Landscape) -> Figure:
    """Five anchors, the middle three around a jump."""
    (jump,) = landscape.jumps(0.0, 1.0)
    anchors = (-0.9, 0.2, jump.anchor - 0.05, jump.anchor + 0.05, 1.6)
    figure, axes = plt.subplots(1, 5, figsize=(12, 3.1), sharey=True, layout="constrained")
    for ax, anchor in zip(axes, anchors, strict=True):
        picture = Picture(ax, landscape, -2.6, 2.6)
        star = picture.move(anchor)
        ax.axvline(anchor, color=WARM, lw=0.8, ls=":")
        ax.set_title(rf"$\theta_0 = {anchor:.2f}$,  $\theta^* = {star:.2f}$")
    axes[0].set_ylabel("loss (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# -- (3), (4): theta* and its derivative -----------------------------------------------------------


def minima(curves: Curves, numbers: Curves) -> Figure:
    """theta*(theta0) for every function (a panel) and precision (a shade); dots are the two ends of
    each jump.
    """
    keys = [key for key in curves if key != "anchors"]
    names = list(dict.fromkeys(key.rpartition(",")[0] for key in keys))
    figure, axes = plt.subplots(
        1, len(names), figsize=(10, 4.3), sharex=True, sharey=True, layout="constrained"
    )
    for ax, name in zip(axes, names, strict=True):
        mine = [key for key in keys if key.startswith(f"{name},")]
        ax.plot([-3, 3], [-3, 3], color=MUTED, lw=0.8, ls="--", label=r"$\theta^* = \theta_0$")
        for key, colour in zip(mine, blues(len(mine)), strict=True):
            jumps = numbers[key]["jumps"]
            x, y = with_gaps(
                curves["anchors"], curves[key]["theta"], [jump["anchor"] for jump in jumps]
            )
            ax.plot(x, y, color=colour, lw=1.8, label=rf"$\lambda = {key.rpartition('= ')[2]}$")
            for jump in jumps:
                ends = [jump["left"], jump["right"]]
                ax.plot([jump["anchor"]] * 2, ends, color=colour, lw=0.9, ls=":")
                ax.plot([jump["anchor"]] * 2, ends, "o", color=colour, ms=3.5)
        ax.set_title(name)
        ax.set_xlabel(ANCHOR)
        ax.set_aspect("equal")
        if name == "sharp and wide":
            ax.text(0.0, -1.2, "sharp well: flat", color="#555555", fontsize=8.5, va="center")
            ax.text(
                2.95,
                0.45,
                "wide well: steep",
                color="#555555",
                fontsize=8.5,
                va="center",
                ha="right",
            )
    axes[0].set_ylabel(MINIMUM)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def derivatives(curves: Curves, numbers: Curves, precision: str = "1") -> Figure:
    """Four routes on one axis, and below what lies between them."""
    names = [key for key in curves if key.endswith(f"lambda = {precision}")]
    figure, axes = plt.subplots(
        2, len(names), figsize=(10, 5.4), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    anchors = np.asarray(curves["anchors"])
    marks = {
        "implicit": ("o", 5.5, BAND),
        "unrolled": ("x", 4.5, WARM),
        "central differences": ("+", 5.5, STAR),
    }
    for column, key in enumerate(names):
        at = [jump["anchor"] for jump in numbers[key]["jumps"]]
        routes = {route: np.asarray(values) for route, values in curves[key]["derivative"].items()}
        closed = routes[ROUTES[0]]
        upper, lower = axes[:, column]
        for position in at:
            for ax in (upper, lower):
                ax.axvline(
                    position,
                    color=MUTED,
                    lw=0.8,
                    ls=":",
                    label="jump" if position == at[0] else None,
                )
        upper.plot(
            *with_gaps(anchors, closed, at),
            color=INK,
            lw=1.6,
            label=r"closed form $\lambda/(\lambda + f'')$",
        )
        for shift, (route, (marker, size, colour)) in enumerate(marks.items()):
            some = slice(4 * shift, None, 12)  # side by side, not one upon the other
            face = "none" if marker == "o" else colour
            upper.plot(
                anchors[some],
                routes[route][some],
                marker,
                ms=size,
                color=colour,
                mfc=face,
                label=route,
            )
            gap = np.abs(routes[route] - closed).clip(1e-16)  # 0 has no logarithm
            lower.semilogy(
                *with_gaps(anchors, gap, at), color=colour, lw=1.6 if route == "implicit" else 1.1
            )
        upper.set_title(f"{key.rpartition(',')[0]}, $\\lambda = {precision}$")
        lower.set_ylim(3e-17, 1e-5)
        lower.axhline(1e-6, color=MUTED, lw=0.8)
        lower.text(anchors[-1], 7e-7, "asked for", color=MUTED, fontsize=8, va="top", ha="right")
        lower.set_yticks([1e-6, 1e-9, 1e-12, 1e-15])
        lower.set_xlabel(ANCHOR)
    axes[0, 0].set_ylabel(r"$d\theta^*/d\theta_0$")
    axes[1, 0].set_ylabel("distance from\nthe closed form")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5)
    return figure


# -- (5): the two objectives -----------------------------------------------------------------------


def objectives(curves: Curves, numbers: Curves) -> Figure:
    """Above Alg is the global minimum, below the one that gradient descent from theta0 reaches."""
    figure, axes = plt.subplots(
        2, len(numbers), figsize=(10, 5.8), sharex=True, sharey="col", layout="constrained"
    )
    anchors = np.asarray(curves["anchors"])
    titles = {
        "argmin": r"$\theta^*$ the global minimum",
        "reached": r"$\theta^*$ downhill from $\theta_0$",
    }
    for row, (alg, title) in enumerate(titles.items()):
        for column, name in enumerate(numbers):
            ax, curve = axes[row, column], curves[f"{name}, {alg}"]
            jumps = [jump["anchor"] for jump in numbers[name]]
            if alg == "reached":  # where theta* moves by more than its steepest slope allows
                steps = np.flatnonzero(np.abs(np.diff(curve["theta"])) > 0.2)
                jumps = list(0.5 * (anchors[steps] + anchors[steps + 1]))
            for position in jumps:
                ax.axvline(
                    position,
                    color=MUTED,
                    lw=0.7,
                    ls=":",
                    label="jump" if position == jumps[0] else None,
                )
            ax.plot(
                anchors,
                curve["f"],
                color="#b9bec6",
                lw=1.1,
                label=r"$f(\theta_0)$, nothing adapted",
            )
            ax.plot(
                *with_gaps(anchors, curve["variational"], jumps), color=INK, lw=2, label=VARIATIONAL
            )
            ax.plot(*with_gaps(anchors, curve["imaml"], jumps), color=WARM, lw=2, label=IMAML)
            values = np.array([curve["imaml"], curve["variational"]])
            margin = 0.08 * np.ptp(values)
            ax.set_ylim(values.min() - margin, values.max() + margin)
            ax.set_title(f"{name}, {title}")
    for ax in axes[1]:
        ax.set_xlabel(ANCHOR)
    for ax in axes[:, 0]:
        ax.set_ylabel("objective (nats)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
