"""What all figures share: colours, a place to draw on, a title, and a legend that covers nothing.

Matplotlib is imported when one is drawn.  Nothing here touches its settings, nor axes that a
figure was not given.
"""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
from torch import Tensor

from varmeta.graphs.process import unheard
from varmeta.results.result import Fit, training_tasks

# Blues, greys and an orange, which are told apart by lightness too: in print, and by the
# colour-blind.
INK, BAND, MUTED, WARM = "#1f3a5f", "#7fa6d6", "#8a8f98", "#d9772b"
PALE = "#c9d9ee"  # the outer of two bands
TITLE = 9  # points
# How much of a width a legend may take: letters are a little wider in some files than on screen.
FULL = 0.93
# A legend's share of the axes, of which the title takes a line or two later; and its largest.
MARGIN, MOST = 1.2, 0.6


def axes_for(ax: Any, **size: Any) -> Any:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **size)[1]


def panels_for(axes: Any, number: int, rows: int, columns: int, **how: Any) -> Any:
    """The given axes, as an array of two dimensions, or those of a new figure.

    Raises ValueError where too few were given.
    """
    if axes is not None:
        given = np.atleast_2d(np.asarray(axes, dtype=object))
        if given.size < number:
            raise ValueError(
                f"axes has {given.size} places, but {number} are drawn: give {number} axes, or none"
            )
        return given
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, squeeze=False, layout="constrained", **how)[1]


def centre_of(fit: Fit) -> Tensor:
    """Where the learned prior's location is, `(D,)`: theta0.

    With covariates, at the mean of the training tasks' features.
    """
    theta0 = fit.model.weights.flatten(fit.prior.loc)
    if not fit.model.coefficients:
        return theta0
    by = fit.model.offset(fit.eta, training_tasks(fit).batch().support)
    return theta0 if by is None else theta0 + by.mean(0)


def tidy(ax: Any, grid: str | None = None) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    if grid is not None:
        ax.grid(axis=grid, color="#e3e6ea", lw=0.6)
        ax.set_axisbelow(True)


def size_of(ax: Any) -> tuple[float, float]:
    """Width and height of axes, in inches."""
    return ax.bbox.width / ax.figure.dpi, ax.bbox.height / ax.figure.dpi


def settle(ax: Any) -> None:
    """Let the figure find its layout, so that a text can be as wide as its axes will be."""
    figure = ax.figure.figure  # of a subfigure its figure
    engine = figure.get_layout_engine()
    if engine is not None:
        with unheard(category=UserWarning):  # other panels may still be too small
            engine.execute(figure)


def titled(ax: Any, finding: str) -> None:
    """What is seen, in lines as long as the axes are wide."""
    settle(ax)
    ax.set_title(wrapped(finding, size_of(ax)[0], TITLE), fontsize=TITLE)


def wrapped(text: str, inches: float, points: float) -> str:
    """A text in lines that are no longer than so many inches; its own line breaks are kept."""
    columns = max(10, int(inches * 72 / (0.52 * points)))
    return "\n".join(fill(line, columns) for line in text.split("\n"))


def explain(ax: Any) -> None:
    """A legend in room of its own: the y axis is made longer by as much as it takes."""
    settle(ax)
    entries = entries_of([ax])
    small = size_of(ax)[0] < 3.0
    for columns in range(len(entries), 0, -1):
        legend = ax.legend(
            entries.values(),
            entries,
            loc="upper left",
            ncols=columns,
            fontsize=7 if small else 8,
            frameon=False,
            borderaxespad=0.2,
            columnspacing=1.0,
            handlelength=1.5,
        )
        if legend.get_window_extent().width <= FULL * ax.bbox.width:
            break
    share = min(MOST, MARGIN * legend.get_window_extent().height / ax.bbox.height)
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.asarray(ax.get_ylim()))
    top = scale.inverted().transform(np.asarray([low + (high - low) / (1.0 - share)]))[0]
    ax.set_ylim(top=top, auto=None)
    _make_readable(legend)


def explain_outside(axes: Any, place: str, title: str | None = None) -> None:
    """One legend of all axes at an edge of their figure, in as many columns as there is width."""
    figure, entries = np.ravel(axes)[0].figure, entries_of(np.ravel(axes))
    for columns in range(len(entries), 0, -1):
        legend = figure.legend(
            entries.values(),
            entries,
            loc=f"outside {place} center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            title=title,
            title_fontsize=TITLE,
        )
        if columns == 1 or legend.get_window_extent().width <= FULL * figure.bbox.width:
            break
        legend.remove()
    _make_readable(legend)


def entries_of(axes: Any) -> dict[str, Any]:
    """What was drawn on some axes and has a label, each once."""
    return {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }


def _make_readable(legend: Any) -> None:
    """Marks as large as letters: theta0 would fill a legend, a dot among hundreds not be seen."""
    for handle in legend.legend_handles:
        if hasattr(handle, "get_sizes"):
            handle.set_sizes([min(60, max(12, *handle.get_sizes()))])
        if hasattr(handle, "get_markersize"):
            handle.set_markersize(max(3.0, handle.get_markersize()))
        if hasattr(handle, "get_linewidths"):
            handle.set_linewidths([max(0.8, *handle.get_linewidths())])


def percent(level: float) -> str:
    return f"{100 * level:g} %"
