"""The figure of some tasks' curves, with their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.plot.curve_values import curves
from varmeta.plot.style import BAND, INK, percent, tidy

if TYPE_CHECKING:
    from varmeta.posteriors.posterior import Posterior
    from varmeta.tasks import Task
    from varmeta.tasks.scaling import Scaling

LEVELS = {0.9: 0.25, 0.5: 0.45}
JITTER = 0.03


def plot_curves(
    posterior: Posterior,
    x: Any,
    tasks: str | list[str],
    axes: Any = None,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    scaling: Scaling | None = None,
    labels: tuple[str | None, str | None] = (None, None),
) -> Any:
    """The mean with 50 % and 90 % bands over a one-dimensional grid x, for some tasks by name.

    With their data.  Returns the axes.

    For numbers the bands are of single observations.  For counts and for 0 and 1 the curve is the
    rate or probability and the bands say where that is; 0 and 1 are drawn a little apart, successes
    out of trials as shares.
    scaling: the `Scaling` of standardised tasks; the figure is then in the data's own units.
    labels: of the x and the y axis; x by default as its column is called.

    Raises ValueError for a task that the posterior does not have, an x of several columns, and
    observations of several numbers.

    >>> import matplotlib.pyplot as plt
    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> grid = torch.linspace(-1, 1, 9, dtype=torch.float64)
    >>> plot_curves(fit.posterior(), grid, [tasks.names[0]])[0, 0].get_title()
    'line 0.0'
    >>> plt.close("all")
    """
    tasks = [tasks] if isinstance(tasks, str) else tasks
    _check(posterior, tasks)
    posterior = posterior.take(tasks)
    grid = torch.as_tensor(x).reshape(-1, *posterior.trained.x_shape)
    drawn = curves(posterior, grid, num_samples, seed)
    bands = {level: drawn.band.interval(level) for level in LEVELS}
    own = axes is None
    axes = _grid_of_axes(len(tasks)) if own else axes
    units = _Units(scaling)
    binary = drawn.of_mean and all(
        _is_binary(task.support) and _is_binary(task.query) for task in posterior.tasks
    )
    what = "interval of the mean" if drawn.of_mean else "interval of observations"
    for index, (ax, name) in enumerate(zip(np.ravel(axes), tasks, strict=False)):
        for level, (low, high) in bands.items():
            ax.fill_between(
                units.x(grid),
                units.y(low[index]),
                units.y(high[index]),
                color=BAND,
                alpha=LEVELS[level],
                lw=0,
                label=f"{percent(level)} {what}",
            )
        ax.plot(units.x(grid), units.y(drawn.mean.mean[index]), color=INK, lw=1.5, label="mean")
        _draw_data(ax, posterior.tasks[index], units, index if binary else None)
        ax.set_title(name, fontsize=9)
        tidy(ax)
    _explain(axes, own, len(tasks), (labels[0] or _column(posterior), labels[1]))
    return axes


def _check(posterior: Posterior, tasks: list[str]) -> None:
    unknown = [name for name in tasks if name not in posterior.names]
    if unknown or not tasks:
        raise ValueError(
            f"tasks must name some of {list(posterior.names[:5])}, ...; not {unknown or tasks}"
            f"{nearest(unknown, posterior.names)}"
        )
    shape = posterior.trained.x_shape
    if shape not in ((), (1,)):
        raise ValueError(
            f"a curve is drawn over one predictor, but a row of x has shape {shape}: see "
            "posterior.expected"
        )


@dataclass(frozen=True)
class _Units:
    """The units of the figure: the data's own, where standardised tasks come with their scaling."""

    scaling: Scaling | None

    def x(self, values: Tensor) -> np.ndarray:
        values = values.cpu()
        if self.scaling is not None:
            scale, loc = self.scaling.x_scale.to(values), self.scaling.x_loc.to(values)
            values = values * scale + loc
        return np.asarray(values).reshape(-1)

    def y(self, values: Tensor) -> np.ndarray:
        values = values.cpu()
        values = values if self.scaling is None else self.scaling.y_inverse(values)
        return np.asarray(values).reshape(-1)


def _draw_data(ax: Any, task: Task, units: _Units, jitter: int | None) -> None:
    """A task's observations.

    jitter: the seed by which 0 and 1 are drawn apart, None for numbers.
    """
    for part, label, face in ((task.support, "adapted to", INK), (task.query, "held out", "white")):
        if part is not None:
            y = units.y(_shares(part[1]))
            y = y if jitter is None else _jittered(y, jitter)
            ax.scatter(units.x(part[0]), y, s=16, fc=face, ec=INK, lw=1, zorder=3, label=label)


def _grid_of_axes(number: int) -> Any:
    import matplotlib.pyplot as plt

    columns = min(3, number)
    lines = -(-number // columns)
    size = (max(5.0, 3.1 * columns), 2.4 * lines + 0.5)
    return plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )[1]


def _explain(axes: Any, own: bool, number: int, labels: tuple[str | None, str | None]) -> None:
    """Names of the axes, and a legend of all that was drawn on any of them."""
    flat = np.ravel(axes)
    for ax in flat[number:]:
        ax.set_visible(False)
    if own and len(flat) > number:  # what stands above an empty place is the last of its column
        for ax in np.atleast_2d(axes)[-2]:
            ax.tick_params(labelbottom=True)
    entries = {
        label: handle
        for ax in flat[:number]
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    if own:
        figure = flat[0].figure
        figure.legend(
            entries.values(),
            entries,
            loc="outside upper center",
            ncols=min(5, len(entries)),
            fontsize=8,
            frameon=False,
        )
        figure.supxlabel(labels[0] or "", fontsize=9)
        figure.supylabel(labels[1] or "", fontsize=9)
        return
    flat[0].legend(entries.values(), entries, fontsize=8, frameon=False)
    for ax in flat[:number]:
        ax.set(xlabel=labels[0], ylabel=labels[1])


def _column(posterior: Posterior) -> str | None:
    names = posterior.trained.x_names
    return names[0] if names else None


def _shares(y: Tensor) -> Tensor:
    """Successes out of trials as shares, `(points, 2)` to `(points,)`.

    Other observations as they are.
    """
    return y[:, 0] / y[:, 1] if y.dim() == 2 and y.shape[1] == 2 else y


def _is_binary(part: tuple[Tensor, Tensor] | None) -> bool:
    return part is None or bool(((part[1] == 0) | (part[1] == 1)).all())


def _jittered(y: np.ndarray, seed: int) -> np.ndarray:
    return y + np.random.default_rng(seed).uniform(-JITTER, JITTER, len(y))
