"""The figure of a `Reachability`: how far from the stored solutions an inner loop ends."""

from __future__ import annotations

from typing import Any

import numpy as np

from varmeta.plot.style import BAND, INK, MUTED, axes_for, tidy, titled


def plot_gaps(gap: Any, ax: Any = None) -> Any:
    """Gaps of a `Reachability` in nats, one bar per task, sorted; returns the axes.

    gap: `(tasks,)`.

    >>> import matplotlib.pyplot as plt
    >>> plot_gaps([0.1, 0.5]).get_xlabel()
    'tasks, sorted'
    >>> plt.close("all")
    """
    ax = axes_for(ax, figsize=(6.5, 3.0))
    gap = np.sort(np.asarray(gap))
    ax.bar(np.arange(1, len(gap) + 1), gap, color=np.where(gap > 0, BAND, MUTED), width=0.9)
    ax.axhline(0.0, color=INK, lw=1)
    ax.set_xlabel("tasks, sorted")
    ax.set_ylabel("F reached\n- F stored (nats)")
    ax.set_xlim(0.3, len(gap) + 0.7)
    ax.xaxis.get_major_locator().set_params(integer=True)
    tidy(ax)
    titled(
        ax, f"largest gap {gap[-1]:.3g} nats; above 1 nat in {int((gap > 1).sum())} of {len(gap)}"
    )
    return ax
