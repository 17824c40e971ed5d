"""Figures of what was learned, as users type them: `from varmeta.plot import plot_curves`."""

from varmeta.plot.comparison import plot_comparison
from varmeta.plot.curves import plot_curves
from varmeta.plot.shrinkage import no_pooling, plot_posteriors, plot_prior_curves, plot_shrinkage
from varmeta.plot.style import BAND, INK, MUTED
from varmeta.plot.weights import plot_gaps, plot_prior

__all__ = [
    "BAND",
    "INK",
    "MUTED",
    "no_pooling",
    "plot_comparison",
    "plot_curves",
    "plot_gaps",
    "plot_posteriors",
    "plot_prior",
    "plot_prior_curves",
    "plot_shrinkage",
]
