"""The tasks' posteriors of a weight: densities of a few, intervals of many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varmeta.plot.labels import position
from varmeta.plot.style import (
    BAND,
    INK,
    MUTED,
    PALE,
    axes_for,
    centre_of,
    explain,
    panels_for,
    size_of,
    tidy,
    titled,
)

if TYPE_CHECKING:
    from varmeta.posteriors.posterior import Posterior
    from varmeta.results.result import Fit

# More densities than this cover each other.
MAX_DENSITIES = 30
# Half the width of the intervals that hold 90 % and 50 % of a normal, in sds.
Z90, Z50 = 1.645, 0.674
# Weights that differ by less than this share of their size are the same.
SAME = 1e-6
# A task's name is written where its row is as high as this, in inches.
MIN_ROW, ROW = 0.11, 0.16
MAX_PANELS = 6


def plot_posteriors(fit: Fit, weight: str, ax: Any = None) -> Any:
    """The prior of one weight, by label, and each training task's posterior of it.

    Returns the axes.

    Of at most thirty tasks the densities are drawn; of more, which would cover each other, the 90 %
    intervals and means, sorted, on the prior's 50 % and 90 %. Where features move the prior, it is
    drawn for a task whose features are at their mean.

    Raises ValueError for a weight that there is not, and for a delta guide, whose posteriors have
    no density.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> plot_posteriors(fit, "x").get_xlabel()
    'x'
    >>> plt.close("all")
    """
    posterior, index = fit.posterior(), position(fit.prior.labels, weight)
    if posterior.is_point:
        raise ValueError(
            "a delta guide's posteriors are points without a density: see plot_prior(fit)"
        )
    mean, sd = (values[:, index] for values in _moments(posterior))
    centre = float(centre_of(fit)[index])
    spread = float(fit.prior.covariance[index, index].sqrt())
    ax = axes_for(ax, figsize=(6.5, 3.5) if len(mean) <= MAX_DENSITIES else (6.5, 4.5))
    if len(mean) <= MAX_DENSITIES:
        _draw_densities(ax, mean, sd, centre, spread)
    else:
        for z, colour, name in ((Z90, PALE, "prior, 90 %"), (Z50, BAND, "prior, 50 %")):
            span = centre - z * spread, centre + z * spread
            ax.axvspan(*span, color=colour, alpha=0.5, lw=0, label=name)
        ax.axvline(centre, color="black", lw=1, label="theta0")
        _draw_intervals(ax, posterior.names, mean, sd, np.argsort(mean))
    ax.set_xlabel(weight)
    tidy(ax)
    out = int((np.abs(mean - centre) > Z90 * sd).sum())
    titled(ax, f"prior sd {spread:.2g}; {out} of {len(mean)} tasks leave theta0 out of their 90 %")
    explain(ax)
    return ax


def plot_weights(posterior: Posterior, weights: list[str] | None = None, axes: Any = None) -> Any:
    """Every task's posterior mean and 90 % interval of some weights, by label.

    One panel for each weight.  The tasks stand in the order of the first; of a delta guide only the
    means are drawn.  Returns the axes, `(1, weights)`.

    weights: None for all, of a model that has at most six.
    axes: of your own, one for each weight; by default of a new figure.

    Raises ValueError for a weight that there is not, for more than six that are not named, and for
    too few axes.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> axes = plot_weights(vm.fit(model, tasks).posterior())
    >>> [ax.get_xlabel() for ax in axes.flat]
    ['intercept', 'x']
    >>> plt.close("all")
    """
    labels = posterior.labels
    if weights is None and len(labels) > MAX_PANELS:
        raise ValueError(
            f"each task has {len(labels)} weights, of which one by one little is seen: name some "
            f"of them, weights={list(labels[:2])}, or look at posterior.predict and score"
        )
    weights = list(labels if weights is None else weights)
    at = [position(labels, label) for label in weights]
    if not at:
        raise ValueError(f"weights must name some of {list(labels[:8])}, not none")
    number = len(posterior.names)
    height = min(9.0, max(2.5, ROW * number + 1.2)) if number <= MAX_DENSITIES * 2 else 4.5
    size = (max(4.5, min(10.0, 3.0 * len(at))), height)
    axes = panels_for(axes, len(at), 1, len(at), figsize=size, sharey=True)
    mean, sd = _moments(posterior)
    order = np.argsort(mean[:, at[0]])
    for ax, index, label in zip(axes.flat, at, weights, strict=False):
        _draw_intervals(ax, posterior.names, mean[:, index], sd[:, index], order)
        ax.set_xlabel(label)
        tidy(ax)
    for ax in axes.flat[1 : len(at)]:  # the rows are named once
        ax.set_ylabel("")
        ax.tick_params(labelleft=False)
    for ax, index in zip(axes.flat, at, strict=False):
        titled(ax, _extremes(posterior.names, mean[:, index]))
    explain(axes.flat[0])
    for ax in axes.flat[1 : len(at)]:  # given axes may not share theirs
        ax.set_ylim(axes.flat[0].get_ylim(), auto=None)
    return axes


def _moments(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and sds, `(tasks, D)` each."""
    flatten = posterior.model.weights.flatten
    mean, sd = (flatten(part).cpu().numpy() for part in (posterior.mean, posterior.sd))
    return mean, sd


def _draw_densities(
    ax: Any, mean: np.ndarray, sd: np.ndarray, centre: float, spread: float
) -> None:
    low = min(centre - 3.5 * spread, float((mean - 3.5 * sd).min()))
    high = max(centre + 3.5 * spread, float((mean + 3.5 * sd).max()))
    grid = torch.linspace(low, high, 600, dtype=torch.float64)
    for number, (m, s) in enumerate(zip(mean.tolist(), sd.tolist(), strict=True)):
        label = "tasks' posteriors" if not number else None
        ax.plot(grid, _normal(grid, m, s), color=MUTED, lw=0.7, alpha=0.8, label=label)
    ax.fill_between(grid, _normal(grid, centre, spread), color=BAND, alpha=0.35, lw=0)
    ax.plot(grid, _normal(grid, centre, spread), color=INK, lw=2, label="learned prior")
    ax.set_ylabel("density")


def _draw_intervals(
    ax: Any, names: tuple[str, ...], mean: np.ndarray, sd: np.ndarray, order: np.ndarray
) -> None:
    """A row for each task, from the first in the order below to the last on top."""
    rows, mean, sd = np.arange(1, len(order) + 1), mean[order], sd[order]
    high = size_of(ax)[1] / len(order)  # of a row
    points = 72 * high
    ends = mean - Z90 * sd, mean + Z90 * sd
    if sd.any():
        ax.hlines(rows, *ends, color=MUTED, lw=min(1.4, 0.35 * points), label="tasks, 90 %")
    ax.plot(mean, rows, "o", color=INK, ms=min(4.0, max(1.2, 0.6 * points)), mew=0, label="means")
    span = np.ptp(ends)
    if span < SAME * (1.0 + abs(mean[0])):  # alike in all tasks: no digits of what is rounding
        ax.set_xlim(mean[0] - 0.1 * (1.0 + abs(mean[0])), mean[0] + 0.1 * (1.0 + abs(mean[0])))
    if size_of(ax)[0] < 1.6:
        ax.xaxis.get_major_locator().set_params(nbins=3)
    if high >= MIN_ROW:
        ax.set_yticks(rows, [names[index] for index in order], fontsize=min(8, 0.8 * points))
    else:
        ax.set_ylabel("tasks, sorted")
        ax.set_yticks([])
    ax.set_ylim(0.2, len(order) + 0.8)


def _extremes(names: tuple[str, ...], mean: np.ndarray) -> str:
    """The tasks at both ends."""
    first, last = int(mean.argmin()), int(mean.argmax())
    return f"from {mean[first]:.3g} ({names[first]}) to {mean[last]:.3g} ({names[last]})"


def _normal(x: Tensor, mean: float, sd: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
