"""The figure of the prior predictive: what tasks may be like before any of their data are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import probability, whole_number
from varmeta.guides.kl import moved_by
from varmeta.plot.observations import Units, are_binary, column_of, dots_of, grid_over
from varmeta.plot.style import BAND, INK, MUTED, axes_for, explain, percent, tidy, titled
from varmeta.posteriors.draws import GuideDraws
from varmeta.posteriors.posterior import Posterior
from varmeta.results.result import Fit, absent_tasks_of, training_tasks
from varmeta.tasks import Task, TaskSet

if TYPE_CHECKING:
    from varmeta.posteriors.prediction import Prediction
    from varmeta.tasks.scaling import Scaling

CURVE = "#4f7fb8"
# Dots of the data: as many as this at full strength, more ever paler.
DOTS = 150


def plot_prior_curves(
    fit: Fit,
    x: Any = None,
    num_draws: int = 20,
    seed: int = 0,
    ax: Any = None,
    level: float = 0.9,
    *,
    data: bool = True,
    scaling: Scaling | None = None,
    labels: tuple[str | None, str | None] = (None, None),
) -> Any:
    """What the prior learned, as functions: curves of tasks drawn from it over a grid x.

    The grid is one-dimensional.  Returns the axes.

    A curve is the mean of an observation (a probability, a rate); the bands hold `level` and 50 %
    of 1,000 such curves at each x; behind them stand the training tasks' data, which also have
    noise. Where features move the prior, the new tasks' are at their mean.
    x: None for a hundred steps over the training tasks' rows.
    data: whether the data are drawn; those that the fit does not keep (a stream, a file without
        data) are not.
    scaling, labels: as of `plot_curves`.

    Raises ValueError for an x of several columns and an observation of several numbers, as
    `plot_curves` does, for a level outside (0, 1), and for no x where the tasks are not kept.

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
    num_draws, level = whole_number("num_draws", num_draws), probability("level", level)
    column_of(None, fit.tasks, "adapt and expected")
    is_kept = fit.run.streamed is None and absent_tasks_of(fit) is None
    known = fit.tasks if is_kept or x is not None else training_tasks(fit)
    grid = grid_over(x, known, known)
    drawn = _of_new_task(fit, grid, max(1000, num_draws), seed)
    ax, units = axes_for(ax, figsize=(6.5, 3.9)), Units(scaling)
    if data and is_kept:
        binary = are_binary(fit.tasks)
        _draw_data(ax, *dots_of(fit.tasks, units, binary))
    at = units.x(grid)
    _draw_bands(ax, at, drawn, units, level)
    for number, curve in enumerate(drawn.samples[:num_draws, 0]):
        name = None if number else "some of them"
        ax.plot(at, units.y(curve), color=CURVE, lw=0.8, alpha=0.8, label=name)
    ax.plot(at, units.y(drawn.mean[0]), color=INK, lw=2, label="mean")
    name = labels[0] or (fit.tasks.x_names[0] if fit.tasks.x_names else "x")
    ax.set(xlabel=name, ylabel=labels[1])
    tidy(ax)
    titled(ax, _finding(at, drawn, units, level, name))
    explain(ax)
    return ax


class _PriorDraws(GuideDraws):
    """Draws from the prior itself, which a guide may not be able to be: a point, or independent."""

    @property
    def distribution(self) -> dist.TorchDistribution:
        with torch.no_grad():
            by = self.offset(self.eta)
            if by is None:
                by = torch.zeros((), dtype=self.batch.support.x.dtype)
                by = by.expand(len(self.batch.names), 1, self.model.weights.size)
            return moved_by(self.model.prior_distribution(self.eta), by)


def _of_new_task(fit: Fit, grid: Tensor, num_samples: int, seed: int) -> Prediction:
    """Curves of one task without data, whose features are at the training tasks' mean."""
    known = training_tasks(fit) if fit.model.coefficients else fit.tasks
    features = {name: float(value.mean()) for name, value in known.features.items()}
    new = TaskSet([Task(name="new task", features=features)])
    posterior = fit.adapt(new)
    if isinstance(q := posterior.q, GuideDraws):
        prior = _PriorDraws(q.problem, q.phi, q.eta, q.batch)
        posterior = Posterior(prior, posterior.tasks, posterior.trained)
    drawn = posterior.expected(grid, num_samples=num_samples, seed=seed)
    if drawn.samples.dim() > 3:
        raise ValueError(
            "a curve is of one number, but an observation's mean has shape "
            f"{tuple(drawn.samples.shape[3:])}"
        )
    return drawn


def _draw_data(ax: Any, x: np.ndarray, y: np.ndarray) -> None:
    if len(x):
        strength = float(np.clip(DOTS / len(x), 0.25, 0.8))
        ax.scatter(x, y, s=7, color=MUTED, alpha=strength, lw=0, zorder=0.8, label="data")


def _draw_bands(ax: Any, at: np.ndarray, drawn: Prediction, units: Units, level: float) -> None:
    named = f"{percent(level)} of new tasks"
    for share, strength, label in ((level, 0.25, named), (0.5, 0.35, "50 %")):
        low, high = drawn.interval(share)
        ax.fill_between(
            at,
            units.y(low[0]),
            units.y(high[0]),
            color=BAND,
            alpha=strength,
            lw=0,
            label=label,
        )


def _finding(at: np.ndarray, drawn: Prediction, units: Units, level: float, name: str) -> str:
    """Where new tasks differ most, and between which numbers they are there."""
    low, high = (units.y(end[0]) for end in drawn.interval(level))
    widest = int(np.argmax(high - low))
    return (
        f"new tasks differ most at {name} = {at[widest]:.4g}: {percent(level)} of them between "
        f"{low[widest]:.3g} and {high[widest]:.3g}"
    )
