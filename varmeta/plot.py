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
    ax.set_yticks(rows, table.index)
    ax.set_xlabel(AXIS_NAMES.get(metric, metric))
    if metric == "coverage":
        ax.set_xlabel(f"coverage of the {level:.0%} interval")
        ax.axvline(level, color=MUTED, lw=1, ls="--")
    ax.grid(axis="x", color="#e3e6ea", lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


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


def plot_prior(fit: Fit, ax: Any = None, limit: int = 30) -> Any:
    """theta0 and the prior's 50 % and 90 % intervals of every weight, the tasks' posterior means as dots."""
    prior = fit.prior
    labels = prior.labels[:limit]
    ax = _axes(ax, figsize=(6.5, 0.26 * len(labels) + 1.2))
    weights = fit.model.weights
    loc = weights.flatten(prior.loc).cpu().numpy()[:limit]
    sd = weights.flatten(prior.sd).cpu().numpy()[:limit]
    means = weights.flatten(fit.posterior().mean).cpu().numpy()[:, :limit]
    rows = np.arange(len(labels))
    for z, width in ((1.645, 2), (0.674, 6)):
        ax.hlines(rows, loc - z * sd, loc + z * sd, color=BAND, lw=width, zorder=1)
    ax.scatter(
        means.T, np.repeat(rows[:, None], len(means), 1) + 0.0, s=5, color=INK, alpha=0.35, zorder=2, linewidths=0
    )
    ax.scatter(loc, rows, marker="|", s=120, color="black", zorder=3)
    ax.set_yticks(rows, labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("weight: prior intervals (50 %, 90 %) and tasks' posterior means")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
