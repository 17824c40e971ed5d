"""Figures of what was learned: curves of tasks, the prior, a comparison.  Matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    import pandas as pd

    from varmeta.posterior import Posterior
    from varmeta.result import Fit

INK, BAND, MUTED = "#1f3a5f", "#7fa6d6", "#8a8f98"
AXIS_NAMES = {
    "log_density": "log predictive density (nats per observation)", "rmse": "RMSE", "crps": "CRPS",
    "calibration_error": "calibration error", "error_rate": "error rate",
}  # fmt: skip


def _axes(ax: Any, **size: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **size)[1]


def plot_comparison(table: pd.DataFrame, metric: str = "log_density", ax: Any = None, level: float = 0.9) -> Any:
    """Mean and 95 % interval of one score of a `Report.table`, best method on top.

    level: the nominal level of the coverage in the table.

    Raises ValueError for a score that the table does not have.
    """
    if metric not in table:
        scores = [name[: -len("_low")] for name in table if name.endswith("_low")]
        raise ValueError(f"unknown score {metric!r}: the table has {scores}")
    ax = _axes(ax, figsize=(6.5, 0.38 * len(table) + 1.2))
    # coverage has no better end: it is sorted like a loss, and its nominal level is drawn
    table = table.dropna(subset=[metric]).sort_values(metric, ascending=metric == "log_density")
    rows = np.arange(len(table))
    errors = [table[metric] - table[f"{metric}_low"], table[f"{metric}_high"] - table[metric]]
    ax.errorbar(table[metric], rows, xerr=np.clip(errors, 0, None), fmt="o", color=INK, ecolor=BAND, elinewidth=3, ms=5)
    _zoom(ax, table, metric)
    ax.set_yticks(rows, table.index)
    ax.set_xlabel(AXIS_NAMES.get(metric, metric))
    if metric == "coverage":
        ax.set_xlabel(f"coverage of the {level:.0%} interval")
        ax.axvline(level, color=MUTED, lw=1, ls="--")
    ax.grid(axis="x", color="#e3e6ea", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _zoom(ax: Any, table: pd.DataFrame, metric: str) -> None:
    """Keep a method that failed by far from squeezing the others together: it stands at the edge, with its number."""
    sign = -1.0 if metric == "log_density" else 1.0
    loss = sign * table[metric]
    far = loss > loss.min() + 6.0 * (loss.median() - loss.min())
    if metric == "coverage" or not far.any():
        return
    near = table[~far]
    ends = sorted([sign * near[f"{metric}_low"], sign * near[f"{metric}_high"]], key=lambda part: part.max())
    best, worst = ends[0].min(), ends[1].max()
    margin = 0.15 * (worst - best)
    edges = sign * (best - 0.3 * margin), sign * (worst + 2.0 * margin)
    ax.set_xlim(min(edges), max(edges))
    for row in np.flatnonzero(far):
        text = f"off the axis: {table[metric].iloc[row]:.2f} "
        ax.text(
            edges[1], row, f" {text}" if sign < 0 else text, ha="left" if sign < 0 else "right", va="center", fontsize=8
        )


def plot_curves(
    posterior: Posterior, x: Any, tasks: list[str], axes: Any = None, *, num_samples: int = 500, seed: int = 0,
    scaling: Any = None,
) -> Any:  # fmt: skip
    """Predictive mean with 50 % and 90 % bands over a one-dimensional grid x, for some tasks by name, with their data.

    scaling: the `Scaling` of standardised tasks; the figure is then in the data's own units.

    Raises ValueError for a task that the posterior does not have.
    """
    import matplotlib.pyplot as plt

    unknown = [name for name in tasks if name not in posterior.names]
    if unknown or not tasks:
        raise ValueError(f"tasks must name some of {list(posterior.names[:5])}, ...; not {unknown or tasks}")
    if axes is None:
        columns = min(3, len(tasks))
        lines = -(-len(tasks) // columns)
        _, axes = plt.subplots(
            lines,
            columns,
            figsize=(3.1 * columns, 2.4 * lines),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
    grid = torch.as_tensor(x).reshape(-1, 1) if posterior.support.x.dim() == 3 else torch.as_tensor(x).reshape(-1)
    prediction = posterior.predict(grid, num_samples, seed)

    def in_x(values: Any) -> np.ndarray:
        values = torch.as_tensor(values)
        return np.asarray(values if scaling is None else values * scaling.x_scale + scaling.x_loc).reshape(-1)

    def in_y(values: Any) -> np.ndarray:
        return np.asarray(values if scaling is None else scaling.y_inverse(values)).reshape(-1)

    for ax, name in zip(np.ravel(axes), tasks, strict=False):
        index = posterior.names.index(name)
        for level, alpha in ((0.9, 0.25), (0.5, 0.45)):
            low, high = prediction.interval(level)
            ax.fill_between(in_x(grid), in_y(low[index]), in_y(high[index]), color=BAND, alpha=alpha, lw=0)
        ax.plot(in_x(grid), in_y(prediction.mean[index]), color=INK, lw=1.5)
        task = posterior.tasks[index]
        for part, style in (
            (task.support, {"color": INK, "s": 16}),
            (task.query, {"facecolors": "white", "edgecolors": INK, "s": 16}),
        ):
            if part is not None:
                ax.scatter(in_x(part[0]), in_y(part[1]), zorder=3, linewidths=1, **style)
        ax.set_title(name, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in np.ravel(axes)[len(tasks) :]:
        ax.set_visible(False)
    return axes


def plot_prior(fit: Fit, limit: int = 30) -> Any:
    """theta0 and the prior's 50 % and 90 % intervals of every weight, the tasks' posterior means as dots.

    A few weights get an axis each, since their units differ; more share one.  Returns the axes.
    """
    import matplotlib.pyplot as plt

    prior, weights = fit.prior, fit.model.weights
    labels = prior.labels[:limit]
    loc = weights.flatten(prior.loc).cpu().numpy()
    sd = weights.flatten(prior.sd).cpu().numpy()
    means = weights.flatten(fit.posterior().mean).cpu().numpy()
    few = len(labels) <= 6
    size = (6.5, 0.7 * len(labels) + 0.6) if few else (6.5, 0.26 * len(labels) + 1.2)
    _, axes = plt.subplots(len(labels) if few else 1, 1, figsize=size, squeeze=False, layout="constrained")
    for row, label in enumerate(labels):
        ax, height = (axes[row, 0], 0) if few else (axes[0, 0], row)
        for z, width in ((1.645, 3), (0.674, 8)):
            ax.hlines(height, loc[row] - z * sd[row], loc[row] + z * sd[row], color=BAND, lw=width, zorder=1)
        ax.scatter(means[:, row], np.full(len(means), height), s=8, color=INK, alpha=0.4, zorder=2, linewidths=0)
        ax.scatter(loc[row], height, marker="|", s=220, color="black", zorder=3)
        if few:
            ax.set_yticks([0], [label])
            ax.set_ylim(-1, 1)
    if not few:
        axes[0, 0].set_yticks(np.arange(len(labels)), labels, fontsize=8)
        axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    for ax in axes[:, 0]:
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(
        "weight: theta0 (bar), prior intervals (50 %, 90 %), tasks' posterior means (dots)", fontsize=8
    )
    return axes


def plot_gaps(gap: Any, ax: Any = None) -> Any:
    """Gaps of a `Reachability` in nats, one bar per task, sorted; returns the axes."""
    ax = _axes(ax, figsize=(6.5, 3.0))
    gap = np.sort(np.asarray(gap))
    ax.bar(np.arange(1, len(gap) + 1), gap, color=np.where(gap > 0, BAND, MUTED), width=0.9)
    ax.axhline(0.0, color=INK, lw=1)
    ax.set_xlabel("tasks, sorted")
    ax.set_ylabel("F reached from the prior - F stored (nats)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
