"""The figure of a comparison: one score of every method, with its interval."""

from __future__ import annotations

from collections.abc import Hashable
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta._checks import counted, nearest, probability
from varmeta.plot.style import (
    BAND,
    INK,
    MUTED,
    axes_for,
    percent,
    settle,
    size_of,
    tidy,
    titled,
    wrapped,
)

if TYPE_CHECKING:
    import pandas as pd

AXIS_NAMES = {
    "log_density": "log predictive density (nats per observation)", "rmse": "RMSE", "crps": "CRPS",
    "calibration_error": "calibration error", "error_rate": "error rate",
}  # fmt: skip
# What a score cannot be below or above; an interval by Student's t may be.
SHARE, POSITIVE = (0.0, 1.0), (0.0, np.inf)
BOUNDS = {
    "coverage": SHARE, "calibration_error": SHARE, "error_rate": SHARE,
    "rmse": POSITIVE, "crps": POSITIVE,
}  # fmt: skip
LABEL_WIDTH = 26
NARROW, NARROW_WIDTH = 4.0, 16  # inches of axes, and letters of the names beside narrower ones
# A method is off the axis when it is this many times farther from the best than the median method.
FAR = 6.0


def plot_comparison(
    table: pd.DataFrame, metric: str = "log_density", ax: Any = None, level: float = 0.9
) -> Any:
    """Mean and 95 % interval of one score of a `Report.table`; returns the matplotlib axes.

    The methods stand in the same order whatever the score, by their log density, best on top
    (without it, by the score).
    Coverage has no better end: its nominal level is drawn, and lines show how far from it a method
    is. An interval ends where the score does, a share at 0 and 1.  A method that failed by far
    stands at the edge, with its numbers.  One that has not settled has an open circle and a
    pale interval, and its name says so; one that overspent its budget says by how much.
    level: the nominal level of the coverage in the table.

    Raises ValueError for a score that the table does not have.

    >>> import matplotlib.pyplot as plt, pandas as pd
    >>> columns = {"log_density": [-1.0], "log_density_low": [-1.2], "log_density_high": [-0.8]}
    >>> plot_comparison(pd.DataFrame(columns, index=["joint"])).get_yticklabels()[0].get_text()
    'joint'
    >>> plt.close("all")
    """
    if metric not in table:
        scores = [name[: -len("_low")] for name in table if name.endswith("_low")]
        raise ValueError(
            f"unknown score {metric!r}: the table has {scores}{nearest(metric, scores)}"
        )
    level = probability("level", level)
    by = "log_density" if "log_density" in table else metric
    table = table.loc[
        _loss(table, by, level).sort_values(ascending=False, na_position="first").index
    ]
    ax = axes_for(ax, figsize=(7.0, 0.42 * len(table) + 1.4))
    wide = size_of(ax)[0] >= NARROW
    settled = table["settled"].to_numpy(bool) if "settled" in table else np.ones(len(table), bool)
    if metric == "coverage":
        ax.axvline(level, color=MUTED, lw=1, ls="--", zorder=1)
        ax.hlines(
            np.arange(len(table)), level, _interval(table, metric)[0], color=MUTED, lw=1, zorder=1
        )
    _draw_intervals(ax, table, metric, settled)
    edges = _edges(_loss(table, metric, level).to_numpy(float), table, metric)
    _limit(ax, metric, edges)
    _write_beside(ax, table, metric, edges)
    width = LABEL_WIDTH if wide else NARROW_WIDTH
    names = [_name(name, row, width) for name, row in table.iterrows()]
    ax.set_yticks(np.arange(len(table)), names)
    if not wide:
        ax.tick_params(labelsize=8)
    ax.set_ylim(-0.6, len(table) - 0.4)
    name = (
        f"coverage of the {percent(level)} interval"
        if metric == "coverage"
        else AXIS_NAMES.get(metric, metric)
    )
    order = "" if metric == by else "\n(methods in the order of their log density)"
    open_circles = "" if settled.all() else "\n(open circle: not settled at this budget)"
    tidy(ax, "x")
    settle(ax)
    inches = size_of(ax)[0]
    below = f"{name}\nmean and 95 % interval over seeds and tasks{order}{open_circles}"
    points = 10 if wide else 8
    ax.set_xlabel(wrapped(below, inches, points), fontsize=points)
    titled(ax, _finding(table, metric, level))
    return ax


def _interval(table: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and the ends of their intervals, cut where a score can be no more."""
    mean, low, high = (
        table[name].to_numpy(float) for name in (metric, f"{metric}_low", f"{metric}_high")
    )
    least, most = BOUNDS.get(metric, (-np.inf, np.inf))
    return mean, low.clip(least, most), high.clip(least, most)


def _finding(table: pd.DataFrame, metric: str, level: float) -> str:
    """Which method is best, and how many others' means its interval holds."""
    loss = _loss(table, metric, level)
    known = table[f"{metric}_low"].notna() & loss.notna()
    if not known.any():
        return "no method has an interval of this score"
    best = loss[known].idxmin()
    words = {"coverage": f"is nearest to {percent(level)}", "log_density": "is highest"}
    moving = "" if table.loc[best].get("settled", True) else ", not settled"
    text = f"{best} {words.get(metric, 'is lowest')} ({table.loc[best, metric]:.3g}{moving})"
    low, high = table.loc[best, f"{metric}_low"], table.loc[best, f"{metric}_high"]
    near = int(table.loc[known, metric].between(low, high).sum()) - 1
    return f"{text}; its interval holds {counted(near, 'other mean')}"


def _draw_intervals(ax: Any, table: pd.DataFrame, metric: str, settled: np.ndarray) -> None:
    """Means with their intervals, which are pale where a method has not settled."""
    mean, low, high = _interval(table, metric)
    rows, errors = np.arange(len(table)), np.clip([mean - low, high - mean], 0, None)
    for some, style in (
        (settled, {"ecolor": INK, "mec": "white"}),
        (~settled, {"ecolor": BAND, "mfc": "white", "mew": 1.4}),
    ):
        if some.any():
            ax.errorbar(
                mean[some],
                rows[some],
                xerr=errors[:, some],
                fmt="o",
                color=INK,
                elinewidth=1.6,
                capsize=4,
                capthick=1.6,
                ms=5,
                **style,
            )


def _limit(ax: Any, metric: str, edges: tuple[float, float] | None) -> None:
    """Let the axis end where a score can be no more, or where methods failed by far."""
    if metric == "coverage":  # with two seeds intervals are longer than all that a share can be
        left, right = ax.get_xlim()
        ax.set_xlim(max(left, -0.02), min(right, 1.02))
    if edges is not None:
        ax.set_xlim(*sorted(edges))
    if metric in AXIS_NAMES and metric != "log_density":
        ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))  # what an interval says of less is not there


def _write_beside(
    ax: Any,
    table: pd.DataFrame,
    metric: str,
    edges: tuple[float, float] | None,
) -> None:
    """The numbers of methods off the axis, at its edge, and a word on those without a score."""
    mean, low, high = _interval(table, metric)
    for row in range(len(table)):
        if not np.isfinite(mean[row]):
            none = "solver" in table and table["solver"].iloc[row] == "none"
            text = "no such score" if none else "no score: every run failed"
            at, side = ax.get_xlim()[0], "left"
        elif edges is not None and not min(edges) <= mean[row] <= max(edges):
            at, side = (edges[1], "left") if edges[1] < edges[0] else (edges[1], "right")
            shape = "<" if side == "left" else ">"
            ax.plot(at, row, marker=shape, color=INK, ms=7, clip_on=False, zorder=4)
            text = f"{mean[row]:.2f}" + (
                f" [{low[row]:.2f}, {high[row]:.2f}]" if np.isfinite(low[row]) else ""
            )
        else:
            continue
        shift = (9 if side == "left" else -9, 0)
        # its own interval may reach into the axis, under the text
        ax.annotate(
            text,
            (at, row),
            shift,
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
            color=INK,
            zorder=5,
            bbox={"fc": "white", "ec": "none", "pad": 1.0},
        )


def _name(method: Hashable, row: pd.Series, width: int) -> str:
    """The method, and what a reader must know of its run."""
    over = row.get("overspent", np.nan)
    notes = [] if row.get("settled", True) else ["not settled"]
    notes += [] if np.isnan(over) else [f"{over:.1f} x budget"]
    notes += ["exact"] if row.get("solver") == "exact" else []
    named = fill(str(method), width)
    return f"{named}\n" + fill(f"({', '.join(notes)})", width) if notes else named


def _loss(table: pd.DataFrame, metric: str, level: float) -> pd.Series:
    """The score, so that smaller is better: coverage by its distance from the nominal level."""
    if metric == "coverage":
        return (table[metric] - level).abs()
    return -table[metric] if metric == "log_density" else table[metric]


def _edges(loss: np.ndarray, table: pd.DataFrame, metric: str) -> tuple[float, float] | None:
    """Best and worst end of the axis, where a method that failed by far would squeeze the others
    together; else None.
    """
    loss_limit = np.nanmin(loss) + FAR * (np.nanmedian(loss) - np.nanmin(loss))
    near = table[loss <= loss_limit]
    if metric == "coverage" or len(near) == np.isfinite(loss).sum():
        return None
    sign = -1.0 if metric == "log_density" else 1.0
    ends = sign * near[[f"{metric}_low", f"{metric}_high", metric]].to_numpy(float)
    best, worst = np.nanmin(ends), min(np.nanmax(ends), loss_limit)
    margin = 0.05 * (worst - best)
    return sign * (best - margin), sign * (worst + 3.0 * margin)
