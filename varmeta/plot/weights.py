"""Figures of the weights: the prior with the tasks' means; gaps of a `Reachability`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta.plot.style import BAND, INK, MUTED, axes_for, centre_of, tidy

if TYPE_CHECKING:
    from varmeta.results.result import Fit

INTERVALS = (("prior, 90 %", 1.645, 5, "#c9d9ee"), ("prior, 50 %", 0.674, 11, BAND))
# A few weights get an axis each, since their units differ.
MAX_AXES = 6


def plot_prior(fit: Fit, limit: int = 30) -> Any:
    """theta0, the prior's 50 % and 90 % intervals, and the tasks' posterior means.

    For every weight (at most `limit`).

    A few weights get an axis each, since their units differ; more share one.  The dots' heights
    mean nothing.  Where features move the prior, it is drawn for a task whose features are at their
    mean.  Returns the axes, `(weights or 1, 1)`.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> plot_prior(fit).shape
    (2, 1)
    >>> plt.close("all")
    """
    import matplotlib.pyplot as plt

    prior, weights = fit.prior, fit.model.weights
    labels = prior.labels[:limit]
    loc = centre_of(fit).cpu().numpy()
    sd = weights.flatten(prior.sd).cpu().numpy()
    means = weights.flatten(fit.posterior().mean).cpu().numpy()
    few = len(labels) <= MAX_AXES
    size = (6.5, 0.85 * len(labels) + 0.7) if few else (6.5, 0.3 * len(labels) + 1.2)
    figure, axes = plt.subplots(
        len(labels) if few else 1, 1, figsize=size, squeeze=False, layout="constrained"
    )
    spread = 0.45 if few else 0.25
    heights = np.random.default_rng(0).uniform(-spread, spread, len(means))
    for row, label in enumerate(labels):
        ax, height = (axes[row, 0], 0) if few else (axes[0, 0], row)
        _draw_weight(ax, height, loc[row], sd[row], means[:, row], heights, large=few)
        if few:
            ax.set_yticks([0], [label])
            ax.set_ylim(-0.8, 0.8)
    if not few:
        axes[0, 0].set_yticks(np.arange(len(labels)), labels, fontsize=8)
        axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    for ax in axes[:, 0]:
        tidy(ax)
    _explain(figure, axes[0, 0])
    return axes


def _draw_weight(
    ax: Any,
    height: int,
    loc: float,
    sd: float,
    means: np.ndarray,
    heights: np.ndarray,
    large: bool,
) -> None:
    """One weight's prior around `loc`, at a height, and the tasks' means about it."""
    for name, z, width, colour in INTERVALS:
        left, right = loc - z * sd, loc + z * sd
        ax.hlines(height, left, right, color=colour, lw=width, zorder=1, label=name)
    ax.scatter(
        means,
        height + heights,
        s=14 if large else 8,
        fc=INK,
        ec="white",
        lw=0.4,
        alpha=0.8,
        zorder=2,
        label="tasks' posterior means",
    )
    ax.scatter(
        loc,
        height,
        marker="|",
        s=420 if large else 160,
        lw=2,
        color="black",
        zorder=3,
        label="theta0",
    )


def _explain(figure: Any, ax: Any) -> None:
    """A legend of what was drawn on one of the axes, which is on all of them."""
    handles, names = ax.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))
    legend = figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    for handle in legend.legend_handles:
        set_sizes = getattr(handle, "set_sizes", None)
        if set_sizes is not None:  # as large as on the axes, theta0 would fill the legend
            set_sizes([60])


def plot_gaps(gap: Any, ax: Any = None) -> Any:
    """Gaps of a `Reachability` in nats, one bar per task, sorted; returns the axes.

    gap: `(tasks,)`.

    >>> import matplotlib.pyplot as plt
    >>> plot_gaps([0.1, 0.5]).get_xlabel()
    'tasks, sorted'
    >>> plt.close("all")
    """
    ax = axes_for(ax, figsize=(6.5, 3.0))
    gap = np.sort(np.asarray(gap))
    ax.bar(np.arange(1, len(gap) + 1), gap, color=np.where(gap > 0, BAND, MUTED), width=0.9)
    ax.axhline(0.0, color=INK, lw=1)
    ax.set_xlabel("tasks, sorted")
    ax.set_ylabel("F reached from the prior - F stored (nats)")
    tidy(ax)
    return ax
