"""The figure of the prior, weight by weight, with the tasks' means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta._checks import whole_number
from varmeta.plot.style import (
    BAND,
    INK,
    PALE,
    centre_of,
    explain,
    explain_outside,
    panels_for,
    size_of,
    tidy,
    titled,
)

if TYPE_CHECKING:
    from varmeta.results.result import Fit

INTERVALS = (("prior, 90 %", 1.645, 5, PALE), ("prior, 50 %", 0.674, 11, BAND))
# A few weights get an axis each, since their units differ.
MAX_AXES = 6
# Inches of a row where many weights share an axis, and the highest page.
ROW, PAGE = 0.3, 12.0


def plot_prior(fit: Fit, limit: int = 30, axes: Any = None) -> Any:
    """theta0, the prior's 50 % and 90 % intervals, and the tasks' posterior means.

    For every weight (at most `limit`).

    A few weights get an axis each, since their units differ; more than six share one.  The dots'
    heights mean nothing.  Where features move the prior, it is drawn for a task whose features are
    at their mean.  Returns the axes, `(weights or 1, 1)`.
    axes: of your own, one for each of a few weights, or one; by default of a new figure.

    Raises ValueError for too few axes, and for a limit that is no count.

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
    prior, weights = fit.prior, fit.model.weights
    labels = prior.labels[: whole_number("limit", limit)]
    loc = centre_of(fit).cpu().numpy()
    sd = weights.flatten(prior.sd).cpu().numpy()
    means = weights.flatten(fit.posterior().mean).cpu().numpy()
    few, own = len(labels) <= MAX_AXES, axes is None
    number = len(labels) if few else 1
    size = (6.5, 1.05 * number + 0.6) if few else (6.5, min(PAGE, ROW * len(labels) + 1.4))
    axes = panels_for(axes, number, number, 1, figsize=size)
    spread = 0.45 if few else 0.25
    heights = np.random.default_rng(0).uniform(-spread, spread, len(means))
    thin = 1.0 if few else min(1.0, size_of(axes.flat[0])[1] / (ROW * len(labels)))
    for row, label in enumerate(labels):
        ax, height = (axes.flat[row], 0) if few else (axes.flat[0], row)
        _draw_weight(ax, height, loc[row], sd[row], means[:, row], heights, thin, large=few)
        if few:
            ax.set_yticks([0], [label])
            ax.set_ylim(-0.8, 0.8)
            tidy(ax)
            titled(ax, f"theta0 = {loc[row]:.3g}, prior sd {sd[row]:.2g}")
    if not few:
        every = max(1, round(0.5 / thin))  # a name where there is room for one
        ticks = np.arange(0, len(labels), every)
        names = [labels[tick] for tick in ticks]
        axes.flat[0].set_yticks(ticks, names, fontsize=8 if thin > 0.6 else 6)
        axes.flat[0].set_ylim(len(labels) - 0.4, -0.6)
        tidy(axes.flat[0])
        titled(axes.flat[0], _finding(prior.labels, len(labels), sd))
    if own:
        explain_outside(axes, "lower")
    else:
        explain(axes.flat[0])
    return axes


def _finding(labels: tuple[str, ...], shown: int, sd: np.ndarray) -> str:
    """In which of the weights the tasks differ most and least."""
    most, least = int(sd[:shown].argmax()), int(sd[:shown].argmin())
    text = (
        f"tasks differ most in {labels[most]} (prior sd {sd[most]:.2g}), least in {labels[least]} "
        f"({sd[least]:.2g})"
    )
    if sd[most] == sd[least]:
        text = f"tasks differ alike in all weights (prior sd {sd[most]:.2g})"
    return text if shown == len(labels) else f"{text}; {shown} of {len(labels)} weights shown"


def _draw_weight(
    ax: Any,
    height: int,
    loc: float,
    sd: float,
    means: np.ndarray,
    heights: np.ndarray,
    thin: float,
    large: bool,
) -> None:
    """One weight's prior around `loc`, at a height, and the tasks' means about it.

    thin: the room that there is, as a share of what full sizes take.
    """
    for name, z, width, colour in INTERVALS:
        left, right = loc - z * sd, loc + z * sd
        ax.hlines(height, left, right, color=colour, lw=width * thin, zorder=1, label=name)
    ax.scatter(
        means,
        height + heights,
        s=14 if large else 8 * thin,
        fc=INK,
        ec="white",
        lw=0.4 * thin,
        alpha=0.8,
        zorder=2,
        label="tasks' means",
    )
    ax.scatter(
        loc,
        height,
        marker="|",
        s=420 if large else 160 * thin**2,
        lw=2 * thin,
        color="black",
        zorder=3,
        label="theta0",
    )
