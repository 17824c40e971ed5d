"""The figure of some tasks' curves, with their data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varmeta._checks import nearest
from varmeta.plot.curve_values import curves
from varmeta.plot.observations import (
    Units,
    are_binary,
    column_of,
    draw_task,
    grid_over,
    rows_at,
)
from varmeta.plot.page import Page, page_of, spread
from varmeta.plot.style import (
    BAND,
    INK,
    explain,
    explain_outside,
    panels_for,
    percent,
    size_of,
    tidy,
)

if TYPE_CHECKING:
    from varmeta.posteriors.posterior import Posterior
    from varmeta.tasks.scaling import Scaling

LEVELS = {0.9: 0.25, 0.5: 0.45}
# Tasks that are drawn where none are named.
SOME = 12
# Panels narrower than this, in inches, have small marks, names and few ticks.
SMALL = 2.0


def plot_curves(
    posterior: Posterior,
    x: Any = None,
    tasks: str | list[str] | None = None,
    axes: Any = None,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    scaling: Scaling | None = None,
    labels: tuple[str | None, str | None] = (None, None),
    over: str | None = None,
) -> Any:
    """The mean with 50 % and 90 % bands over a one-dimensional grid x, for some tasks by name.

    With their data.  Returns the axes, `(rows, columns)`.

    For numbers the bands are of single observations.  For counts and for 0 and 1 the curve is the
    rate or probability and the bands say where that is; 0 and 1 are drawn a little apart, successes
    out of trials as shares.
    x: None for a hundred steps over the tasks' own rows.  tasks: None for twelve of them, from the
        first to the last.  However many are named, the page stays as large as a sheet of paper.
    axes: of your own, one for each task; by default of a new figure.
    scaling: the `Scaling` of standardised tasks; the figure is then in the data's own units.
    labels: of the x and the y axis; x by default as its column is called.
    over: of several columns of x, the one that the curve runs over, by its name in
        `tasks.x_names`; the others stay at their mean over the task's rows.

    Raises ValueError for a task that the posterior does not have, too few axes, an x of several
    columns where `over` names none of them, and observations of several numbers.

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
    number = len(posterior.names)
    tasks = spread(posterior.names, SOME) if tasks is None else tasks
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    _check_names(posterior, tasks)
    column = column_of(over, posterior.trained, "over=, or posterior.expected")
    page, own = page_of(len(tasks)), axes is None
    is_cut = own and len(tasks) == SOME < number
    posterior = posterior.take(tasks)
    grid = grid_over(x, posterior.tasks, posterior.trained, column)
    rows = [rows_at(grid, column, task, posterior.trained) for task in posterior.tasks]
    # a task at a time: the draws of many at once may not fit into memory
    panels = [
        _panel(posterior.take([name]), own_rows, num_samples, seed)
        for name, own_rows in zip(tasks, rows, strict=True)
    ]
    axes = panels_for(
        axes, len(tasks), page.rows, page.columns, figsize=page.size, sharex=True, sharey=True
    )
    units = Units(scaling, column)
    is_binary = panels[0].of_mean and are_binary(posterior.tasks)
    for index, (ax, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        width = page.width if own else size_of(ax)[0]
        thin = min(1.0, width / SMALL)  # where panels are small, marks are
        panel.draw(ax, units, rows[index], thin)
        draw_task(ax, posterior.tasks[index], units, index if is_binary else None, thin)
        _name(ax, tasks[index], width)
        tidy(ax)
    names = (labels[0] or over or _column(posterior), labels[1])
    if own:
        of = f"{SOME} of {number} tasks" if is_cut else None
        _explain_page(axes, page, len(tasks), names, of)
    else:
        explain(axes.flat[0])
        for ax in axes.flat[: len(tasks)]:
            ax.set(xlabel=names[0], ylabel=names[1])
    return axes


@dataclass(frozen=True)
class _Panel:
    """One task's mean and bands over the grid, `(points,)` each."""

    mean: Tensor
    bands: dict[float, tuple[Tensor, Tensor]]
    of_mean: bool

    def draw(self, ax: Any, units: Units, grid: Tensor, thin: float) -> None:
        what = "of the mean" if self.of_mean else "of observations"
        x = units.x(grid)
        for level, (low, high) in self.bands.items():
            label = f"{percent(level)} {what}"
            ends = units.y(low), units.y(high)
            ax.fill_between(x, *ends, color=BAND, alpha=LEVELS[level], lw=0, label=label)
        ax.plot(x, units.y(self.mean), color=INK, lw=1.5 * thin, label="mean")


def _panel(posterior: Posterior, grid: Tensor, num_samples: int, seed: int) -> _Panel:
    """Of a single task."""
    drawn = curves(posterior, grid, num_samples, seed)
    intervals = {level: drawn.band.interval(level) for level in LEVELS}
    bands = {level: (low[0], high[0]) for level, (low, high) in intervals.items()}
    return _Panel(drawn.mean.mean[0], bands, drawn.of_mean)


def _check_names(posterior: Posterior, tasks: list[str]) -> None:
    unknown = [name for name in tasks if name not in posterior.names]
    if unknown or not tasks:
        raise ValueError(
            f"tasks must name some of {list(posterior.names[:5])}, ...; not {unknown or tasks}"
            f"{nearest(unknown, posterior.names)}"
        )


def _name(ax: Any, name: str, width: float) -> None:
    """The task's name above its panel; of one that is too long the end, by which tasks differ."""
    points = 9.0 if width >= SMALL else max(5.0, 9.0 * width / SMALL)
    longest = max(4, int(width * 72 / (0.55 * points)))
    ax.set_title(name if len(name) <= longest else f"…{name[1 - longest :]}", fontsize=points)
    if width < SMALL:
        ax.tick_params(labelsize=points)
        ax.title.set_y(1.0)


def _explain_page(
    axes: Any, page: Page, number: int, labels: tuple[str | None, str | None], of: str | None
) -> None:
    """Names of the axes, a legend of all that was drawn, and no empty panel."""
    for ax in axes.flat[number:]:
        ax.set_visible(False)
    if axes.size > number:  # what stands above an empty place is the last of its column
        for ax in axes[-2]:
            ax.tick_params(labelbottom=True)
    if page.width < SMALL:
        for ax in axes.flat[:number]:
            ax.locator_params(nbins=3)
    figure = axes[0, 0].figure
    explain_outside(axes.flat[:number], "upper", of)
    figure.supxlabel(labels[0] or "", fontsize=9)
    figure.supylabel(labels[1] or "", fontsize=9)


def _column(posterior: Posterior) -> str | None:
    names = posterior.trained.x_names
    return names[0] if names else None
