"""What all figures share: colours, a place to draw on.

Matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from varmeta.results.result import Fit, training_tasks

INK, BAND, MUTED = "#1f3a5f", "#7fa6d6", "#8a8f98"


def axes_for(ax: Any, **size: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **size)[1]


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


def percent(level: float) -> str:
    return f"{100 * level:g} %"
