"""Figures of what pooling did: arrows, priors beside posteriors, curves from the prior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import nearest, whole_number
from varmeta.fitting import baselines
from varmeta.plot.style import BAND, INK, MUTED, axes_for, centre_of, percent, tidy
from varmeta.results.result import Fit, training_tasks
from varmeta.tasks import Task, TaskSet

# Two sds of the prior: the ellipse that holds 86 % of it.
ELLIPSE = 2.0


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


def plot_shrinkage(fit: Fit, weights: tuple[str, str] | None = None, ax: Any = None) -> Any:
    """Arrows from every task's own estimate to its posterior mean, for two weights by label.

    Returns the axes.

    The cross is theta0, the ellipse the prior's two sds.  Tasks without data have no arrow.  Where
    features move the prior, it is drawn for a task whose features are at their mean.
    weights: by default the first two of `fit.prior.labels`; for a model with one weight the tasks
        stand side by side.

    Raises ValueError for a weight that there is not.

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
    at = [_position(fit, label) for label in (weights or fit.prior.labels[:2])]
    own = no_pooling(fit).cpu().numpy()
    mean = fit.model.weights.flatten(fit.posterior().mean).cpu().numpy()
    some = fit.tasks.batch().support.mask.any(-1).cpu().numpy()
    loc = centre_of(fit).cpu().numpy()
    covariance = fit.prior.covariance.cpu().numpy()
    ax = axes_for(ax, figsize=(6.0, 4.5))
    if len(at) == 1:
        order = np.flatnonzero(some)[np.argsort(own[some, at[0]])]
        start = np.stack([np.arange(len(order)), own[order, at[0]]], -1)
        end = np.stack([np.arange(len(order)), mean[order, at[0]]], -1)
        sd = math.sqrt(covariance[at[0], at[0]])
        ax.axhspan(
            loc[at[0]] - ELLIPSE * sd,
            loc[at[0]] + ELLIPSE * sd,
            color=BAND,
            alpha=0.2,
            lw=0,
            label="prior, 2 sds",
        )
        ax.axhline(loc[at[0]], color="black", lw=1, label="theta0")
        ax.set_xlabel("tasks, sorted")
        ax.set_ylabel(fit.prior.labels[at[0]])
    else:
        start, end = own[some][:, at], mean[some][:, at]
        turn = np.linspace(0, 2 * np.pi, 200)
        # a covariance that has lost a direction, whose ellipse is a line, has no Cholesky factor
        values, vectors = np.linalg.eigh(covariance[np.ix_(at, at)])
        root = vectors * np.sqrt(values.clip(min=0.0))
        circle = loc[at] + ELLIPSE * np.stack([np.cos(turn), np.sin(turn)], -1) @ root.T
        ax.fill(*circle.T, color=BAND, alpha=0.2, lw=0, label="prior, 2 sds")
        ax.plot(*loc[at], marker="+", ms=12, mew=2, color="black", ls="", label="theta0", zorder=4)
        ax.set_xlabel(fit.prior.labels[at[0]])
        ax.set_ylabel(fit.prior.labels[at[1]])
    for a, b in zip(start, end, strict=True):
        ax.annotate(
            "",
            b,
            a,
            arrowprops={"arrowstyle": "->", "color": MUTED, "lw": 0.8, "shrinkA": 2, "shrinkB": 2},
        )
    ax.scatter(*start.T, s=16, fc="white", ec=INK, lw=1, zorder=3, label="task alone (no pooling)")
    ax.scatter(
        *end.T, s=16, fc=INK, ec="white", lw=0.4, zorder=3, label="posterior mean (partial pooling)"
    )
    ax.legend(fontsize=8, frameon=False)
    tidy(ax)
    return ax


def plot_posteriors(fit: Fit, weight: str, ax: Any = None) -> Any:
    """Densities of one weight, by label: of the prior, and of each training task's posterior.

    Returns the axes.

    Where features move the prior, it is drawn for a task whose features are at their mean. Raises
    ValueError for a weight that there is not, and for a delta guide, whose posteriors have no
    density.

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
    posterior, index = fit.posterior(), _position(fit, weight)
    if posterior.is_point:
        raise ValueError(
            "a delta guide's posteriors are points without a density: see plot_prior(fit)"
        )
    mean, sd = (
        fit.model.weights.flatten(part).cpu()[:, index] for part in (posterior.mean, posterior.sd)
    )
    centre = float(centre_of(fit)[index])
    spread = float(fit.prior.covariance[index, index].sqrt())
    low = min(centre - 3.5 * spread, float((mean - 3.5 * sd).min()))
    high = max(centre + 3.5 * spread, float((mean + 3.5 * sd).max()))
    grid = torch.linspace(low, high, 600, dtype=torch.float64)
    ax = axes_for(ax, figsize=(6.5, 3.5))
    for number, (m, s) in enumerate(zip(mean.tolist(), sd.tolist(), strict=True)):
        label = "tasks' posteriors" if not number else None
        ax.plot(grid, _normal(grid, m, s), color=MUTED, lw=0.7, alpha=0.6, label=label)
    ax.fill_between(grid, _normal(grid, centre, spread), color=BAND, alpha=0.35, lw=0)
    ax.plot(grid, _normal(grid, centre, spread), color=INK, lw=2, label="learned prior")
    ax.set_xlabel(weight)
    ax.set_ylabel("density")
    ax.legend(fontsize=8, frameon=False)
    tidy(ax)
    return ax


def plot_prior_curves(
    fit: Fit, x: Any, num_draws: int = 20, seed: int = 0, ax: Any = None, level: float = 0.9
) -> Any:
    """What the prior learned, as functions: curves of tasks drawn from it over a grid x.

    The grid is one-dimensional.  Returns the axes.

    The curve is the mean of an observation (a probability, a rate); the band holds `level` of 1,000
    such curves at each x. Where features move the prior, the new tasks' are at their mean.

    Raises ValueError for an x of several columns, as `plot_curves` does.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> plot_prior_curves(fit, torch.linspace(-1, 1, 9, dtype=torch.float64)).get_xlabel()
    'x'
    >>> plt.close("all")
    """
    num_draws = whole_number("num_draws", num_draws)
    shape = fit.tasks.x_shape
    if shape not in ((), (1,)):
        raise ValueError(
            f"a curve is drawn over one predictor, but a row of x has shape {shape}: see adapt and "
            "expected"
        )
    grid = torch.as_tensor(x).reshape(-1, *shape)
    known = training_tasks(fit) if fit.model.coefficients else fit.tasks
    features = {name: float(value.mean()) for name, value in known.features.items()}
    new = TaskSet([Task(name="new task", features=features)])
    drawn = fit.adapt(new).expected(grid, num_samples=max(1000, num_draws), seed=seed)
    if drawn.samples.dim() > 3:
        raise ValueError(
            "a curve is of one number, but an observation's mean has shape "
            f"{tuple(drawn.samples.shape[3:])}"
        )
    ax = axes_for(ax, figsize=(6.5, 3.5))
    at = grid.reshape(-1).cpu()
    low, high = (end[0].cpu() for end in drawn.interval(level))
    ax.fill_between(
        at, low, high, color=BAND, alpha=0.3, lw=0, label=f"{percent(level)} of new tasks"
    )
    for number, curve in enumerate(drawn.samples[:num_draws, 0].cpu()):
        ax.plot(
            at,
            curve,
            color=MUTED,
            lw=0.8,
            alpha=0.8,
            label=None if number else "tasks drawn from the prior",
        )
    ax.plot(at, drawn.mean[0].cpu(), color=INK, lw=2, label="mean")
    ax.set_xlabel(fit.tasks.x_names[0] if fit.tasks.x_names else "x")
    ax.legend(fontsize=8, frameon=False)
    tidy(ax)
    return ax


def _position(fit: Fit, label: str) -> int:
    if label not in fit.prior.labels:
        raise ValueError(
            f"no weight is called {label!r}; the labels are {list(fit.prior.labels[:8])}"
            f"{nearest(label, fit.prior.labels)}"
        )
    return fit.prior.labels.index(label)


def _normal(x: Tensor, mean: float, sd: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
