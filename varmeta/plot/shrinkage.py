"""The figure of what pooling did: arrows from every task's own estimate to its posterior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from varmeta.fitting import baselines
from varmeta.plot.labels import position
from varmeta.plot.style import BAND, INK, MUTED, axes_for, centre_of, explain, tidy, titled
from varmeta.results.result import Fit

# Two sds of the prior: the ellipse that holds 86 % of it.
ELLIPSE = 2.0
# Tasks whose dots have their full size; more have ever smaller ones.
LARGE = 40


def no_pooling(fit: Fit) -> Tensor:
    """Every training task fitted on its own, `(tasks, D)`.

    That is its mode under a prior that weighs 1 % of one observation.

    Shared parameters and the noise scale are the fit's.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> no_pooling(vm.fit(model, tasks)).shape
    torch.Size([9, 2])
    """
    return baselines.no_pooling(fit.model, fit.tasks, fit.eta, fit.seed)


def plot_shrinkage(fit: Fit, weights: str | tuple[str, ...] | None = None, ax: Any = None) -> Any:
    """Arrows from every task's own estimate to its posterior mean, of one weight or two.

    Returns the axes.

    The cross is theta0, the ellipse the prior's two sds.  Tasks without data have no arrow.  Where
    features move the prior, it is drawn for a task whose features are at their mean.
    weights: labels, by default the first two of `fit.prior.labels`; of one weight alone the tasks
        stand side by side, sorted.

    Raises ValueError for a weight that there is not, and for more than two.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> plot_shrinkage(fit, ("intercept", "x")).get_xlabel()
    'intercept'
    >>> plt.close("all")
    """
    asked = (weights,) if isinstance(weights, str) else weights or fit.prior.labels[:2]
    if len(asked) > 2:
        raise ValueError(f"one weight or two are drawn, not {list(asked)}")
    at = [position(fit.prior.labels, label) for label in asked]
    own = no_pooling(fit).cpu().numpy()
    mean = fit.model.weights.flatten(fit.posterior().mean).cpu().numpy()
    some = fit.tasks.batch().support.mask.any(-1).cpu().numpy()
    loc = centre_of(fit).cpu().numpy()[at]
    covariance = fit.prior.covariance.cpu().numpy()[np.ix_(at, at)]
    names = [fit.prior.labels[index] for index in at]
    start, end = own[some][:, at], mean[some][:, at]
    ax = axes_for(ax, figsize=(6.0, 4.5))
    finding = _finding(start, end, names)
    if len(at) == 1:
        order = np.argsort(start[:, 0])
        rank = np.arange(1, len(order) + 1)
        start, end = (np.stack([rank, ends[order, 0]], -1) for ends in (start, end))
        _draw_line(ax, float(loc[0]), math.sqrt(covariance[0, 0]))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="tasks, sorted", ylabel=names[0])
    else:
        _draw_ellipse(ax, loc, covariance)
        ax.set(xlabel=names[0], ylabel=names[1])
    _draw_arrows(ax, start, end)
    tidy(ax)
    titled(ax, finding)
    explain(ax)
    return ax


def _draw_line(ax: Any, loc: float, sd: float) -> None:
    ends = loc - ELLIPSE * sd, loc + ELLIPSE * sd
    ax.axhspan(*ends, color=BAND, alpha=0.2, lw=0, label="prior, 2 sds")
    ax.axhline(loc, color="black", lw=1, label="theta0")


def _draw_ellipse(ax: Any, loc: np.ndarray, covariance: np.ndarray) -> None:
    turn = np.linspace(0, 2 * np.pi, 200)
    # a covariance that has lost a direction, whose ellipse is a line, has no Cholesky factor
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(min=0.0))
    circle = loc + ELLIPSE * np.stack([np.cos(turn), np.sin(turn)], -1) @ root.T
    # its edge is seen where it is a line
    ax.fill(*circle.T, fc=(BAND, 0.2), ec=(BAND, 0.6), lw=1, label="prior, 2 sds")
    ax.plot(*loc, marker="+", ms=12, mew=2, color="black", ls="", label="theta0", zorder=4)


def _draw_arrows(ax: Any, start: np.ndarray, end: np.ndarray) -> None:
    shrunk = min(1.0, math.sqrt(LARGE / max(1, len(start))))
    how = {"arrowstyle": "->", "color": MUTED, "lw": 0.8 * shrunk, "mutation_scale": 10 * shrunk}
    for a, b in zip(start, end, strict=True):
        ax.annotate("", b, a, arrowprops=how | {"shrinkA": 2 * shrunk, "shrinkB": 2 * shrunk})
    size = 16 * shrunk
    ax.scatter(*start.T, s=size, fc="white", ec=INK, lw=shrunk, zorder=3, label="task alone")
    ax.scatter(*end.T, s=size, fc=INK, ec="white", lw=0.4, zorder=3, label="posterior mean")


def _finding(own: np.ndarray, pooled: np.ndarray, names: list[str]) -> str:
    """How much of the spread of the tasks' own estimates is left by pooling, for each weight."""
    if len(own) < 2 or not (own.std(0) > 0).all():
        return "pooling of the tasks' own estimates"
    kept = pooled.std(0) / own.std(0)
    shares = (f"{100 * share:.0f} % in {name}" for share, name in zip(kept, names, strict=True))
    return f"pooling leaves, of the spread between tasks, {' and '.join(shares)}"
