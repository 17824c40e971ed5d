"""Figures of a `Landscape`: the post's anchored loss, its minimum, and the two meta-objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import counted, no_task, whole_number
from varmeta.landscape.landscape import Landscape
from varmeta.plot.page import spread
from varmeta.plot.style import BAND, INK, MUTED, WARM, axes_for, explain, tidy, titled

ANCHOR = r"anchor $\theta_0$"
POINTS = 401
# More tasks, or jumps, have curves without marks.
FEW = 12


def plot_anchored_loss(
    landscape: Landscape,
    anchor: float,
    low: float,
    high: float,
    task: str | None = None,
    ax: Any = None,
) -> Any:
    """A task's loss f, the penalty that draws theta to the anchor, their sum and its minimum.

    Returns the axes.

    low, high: of theta.  task: by name; None for the first.

    Raises ValueError for a range that is none, KeyError for a task that there is not.

    >>> import matplotlib.pyplot as plt
    >>> import varmeta as vm
    >>> landscape = vm.Landscape.of(lambda theta: torch.sin(3 * theta) + 0.2 * theta**2)
    >>> plot_anchored_loss(landscape, 1.3, -2.6, 2.6).get_title()
    'the minimum for the anchor 1.3 is at 1.48'
    >>> plt.close("all")
    """
    names = landscape.tasks.names
    if task is not None and task not in names:
        raise no_task(task, names)
    index = 0 if task is None else names.index(task)
    theta = _line(low, high, POINTS)
    loss, penalty = landscape.loss(theta)[:, index], landscape.penalty(theta, anchor)[:, 0]
    star = float(landscape.argmin(anchor)[0, index])
    lowest = float(landscape.regularized(star, anchor)[0, index])
    # far from the anchor the penalty is large, and would press the loss into a line
    height = max(float(loss.max() - loss.min()), lowest - float(loss.min()), 1e-12)
    top = float(loss.min()) + 1.6 * height
    ax = axes_for(ax, figsize=(5.0, 3.8))
    ax.plot(theta, loss, color=INK, lw=1.8, label=r"loss $f(\theta)$")
    penalty_name = r"penalty $\frac{\lambda}{2}(\theta - \theta_0)^2$"
    ax.plot(theta, _below(top, penalty), color=WARM, lw=1.4, ls="--", label=penalty_name)
    ax.plot(theta, _below(top, loss + penalty), color=BAND, lw=2.6, label="their sum")
    ax.plot(star, lowest, "*", color="black", ms=11, mec="white", label=r"its minimum $\theta^*$")
    ax.axvline(anchor, color=WARM, lw=0.9, ls=":", label=ANCHOR)
    ax.set(xlim=(low, high), xlabel=r"weight $\theta$", ylabel="loss (nats)")
    tidy(ax)
    titled(ax, f"the minimum for the anchor {anchor:.3g} is at {star:.3g}")
    explain(ax)
    return ax


def plot_minima(
    landscape: Landscape, low: float, high: float, ax: Any = None, num_anchors: int = POINTS
) -> Any:
    """Where every task's weight is found, theta*(theta0), over the anchors from low to high.

    Returns the axes.

    A curve ends where the minimum jumps, which is marked.  Of more than twelve tasks twelve are
    drawn; all their jumps are counted.

    Raises ValueError for a range that is none, and where `Landscape.argmin` does.

    >>> import matplotlib.pyplot as plt
    >>> import varmeta as vm
    >>> landscape = vm.Landscape.of(lambda theta: torch.sin(3 * theta) + 0.2 * theta**2)
    >>> plot_minima(landscape, -3.0, 3.0).get_title()
    'the minimum jumps at 2 anchors'
    >>> plt.close("all")
    """
    anchors = _line(low, high, whole_number("num_anchors", num_anchors, 2))
    theta, names = landscape.argmin(anchors), landscape.tasks.names
    jumps = landscape.jumps(low, high, num_anchors)
    ax = axes_for(ax, figsize=(5.0, 4.2))
    ax.plot([low, high], [low, high], color=MUTED, lw=0.8, ls="--", label=r"$\theta^* = \theta_0$")
    drawn = spread(names, FEW)
    part = f" of {len(drawn)} of {len(names)} tasks" if len(drawn) < len(names) else ""
    thin = 1.0 if len(drawn) < 4 else 0.55
    for name in drawn:
        own = [jump for jump in jumps if jump.task == name]
        at = [jump.anchor for jump in own]
        x, y = with_gaps(anchors, theta[:, names.index(name)], at)
        ax.plot(x, y, color=INK, lw=1.8 * thin, label=rf"$\theta^*(\theta_0)${part}")
        for jump in own:
            sides, ends = [jump.anchor] * 2, [jump.left, jump.right]
            ax.plot(
                sides, ends, color=WARM, lw=0.9, ls=":", marker="o", ms=3.5 * thin, label="jump"
            )
    ax.set(xlim=(low, high), xlabel=ANCHOR, ylabel=r"minimum $\theta^*$")
    of = "" if len(names) == 1 else f" of {counted(len(names), 'task')}"
    where = f"at {counted(len(jumps), 'anchor')}" if jumps else "nowhere"
    tidy(ax)
    titled(ax, f"the minimum{of} jumps {where}")
    explain(ax)
    return ax


def plot_objectives(
    landscape: Landscape, low: float, high: float, ax: Any = None, num_anchors: int = POINTS
) -> Any:
    """What an anchor is judged by, from low to high, as sums over the tasks.

    Returns the axes.

    Three curves: the loss at the anchor itself, to which nothing was adapted; iMAML's objective
    g(theta*); the variational one, f(theta*) and the penalty.  iMAML's ends where it jumps.

    Raises ValueError for a range that is none, and where `Landscape.argmin` does.

    >>> import matplotlib.pyplot as plt
    >>> import varmeta as vm
    >>> landscape = vm.Landscape.of(lambda theta: torch.sin(3 * theta) + 0.2 * theta**2)
    >>> plot_objectives(landscape, -3.0, 3.0).get_title().partition(",")[0]
    "iMAML's objective jumps at 2 anchors"
    >>> plt.close("all")
    """
    anchors = _line(low, high, whole_number("num_anchors", num_anchors, 2))
    theta = landscape.argmin(anchors)
    jumps = landscape.jumps(low, high, num_anchors)
    imaml = landscape.meta_objective(anchors, theta).sum(1)
    variational = landscape.variational_objective(anchors, theta).sum(1)
    ax = axes_for(ax, figsize=(5.0, 3.8))
    for jump in jumps if len(jumps) <= FEW else ():
        ax.axvline(jump.anchor, color=MUTED, lw=0.7, ls=":", label="jump")
    both = torch.stack([imaml, variational])
    margin = 0.08 * float(both.max() - both.min())
    ax.plot(
        anchors,
        _below(float(both.max()) + margin, landscape.loss(anchors).sum(1)),
        color=MUTED,
        lw=1.1,
        ls="--",
        label=r"$f(\theta_0)$, nothing adapted",
    )
    ax.plot(anchors, variational, color=INK, lw=2, label="variational")
    ax.plot(
        *with_gaps(anchors, imaml, [jump.anchor for jump in jumps]),
        color=WARM,
        lw=1.6,
        label="iMAML",
    )
    ax.set(xlim=(low, high), xlabel=ANCHOR, ylabel="objective (nats)")
    at = f"iMAML's objective jumps at {counted(len(jumps), 'anchor')}, the variational one at none"
    tidy(ax)
    titled(ax, at if jumps else "no minimum jumps, so both objectives are continuous")
    explain(ax)
    return ax


def with_gaps(x: Any, y: Any, at: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """A curve that is broken at some x: nothing is drawn from one side to the other.

    >>> with_gaps([0.0, 1.0, 2.0], [5.0, 5.0, 7.0], [1.5])
    (array([0. , 1. , 1.5, 2. ]), array([ 5.,  5., nan,  7.]))
    """
    x, y = np.asarray(x), np.asarray(y)
    places = np.searchsorted(x, at)
    return np.insert(x, places, at), np.insert(y, places, np.nan)


def _below(top: float, values: Tensor) -> np.ndarray:
    """A curve as far as it stays below; what leaves the figure would run through its legend."""
    return np.where(values.numpy() <= top, values.numpy(), np.nan)


def _line(low: float, high: float, points: int) -> Tensor:
    if not low < high:
        raise ValueError(f"expected a range, low < high, not {low} and {high}")
    return torch.linspace(low, high, points, dtype=torch.float64)
