"""Figures of what was learned, as users type them: `from varmeta.plot import plot_curves`.

A figure in one panel takes `ax` and returns it; one with a panel for each of several things takes
`axes` and returns an array of them, `(rows, columns)`.  Without them a new figure of pyplot is
made.  Given ones may be of any figure or subfigure, of which nothing else is changed.
"""

import varmeta.plot.chosen  # noqa: F401, registers what Fit.plot and Posterior.plot draw
from varmeta.plot.comparison import plot_comparison
from varmeta.plot.curves import plot_curves
from varmeta.plot.gaps import plot_gaps
from varmeta.plot.landscape import plot_anchored_loss, plot_minima, plot_objectives
from varmeta.plot.posteriors import plot_posteriors, plot_weights
from varmeta.plot.prior_curves import plot_prior_curves
from varmeta.plot.shrinkage import no_pooling, plot_shrinkage
from varmeta.plot.style import BAND, INK, MUTED, WARM
from varmeta.plot.weights import plot_prior

__all__ = [
    "BAND",
    "INK",
    "MUTED",
    "WARM",
    "no_pooling",
    "plot_anchored_loss",
    "plot_comparison",
    "plot_curves",
    "plot_gaps",
    "plot_minima",
    "plot_objectives",
    "plot_posteriors",
    "plot_prior",
    "plot_prior_curves",
    "plot_shrinkage",
    "plot_weights",
]
