"""The one figure of a fit and of a posterior that a user would want, by the kind of model."""

from __future__ import annotations

from typing import Any

import numpy as np

from varmeta.display.drawn import draw
from varmeta.plot.curves import plot_curves
from varmeta.plot.observations import grid_over
from varmeta.plot.posteriors import plot_weights
from varmeta.plot.prior_curves import plot_prior_curves
from varmeta.plot.weights import MAX_AXES, plot_prior
from varmeta.posteriors.posterior import Posterior
from varmeta.results.result import Fit


@draw.register
def draw_fit(fit: Fit, axes: Any = None, **options: Any) -> Any:
    """Curves from the prior where many weights make a curve, else the prior weight by weight."""
    if len(fit.prior.labels) > MAX_AXES and _has_curves(fit.posterior()):
        ax = None if axes is None else np.ravel(np.asarray(axes, dtype=object))[0]
        return np.array([[plot_prior_curves(fit, ax=ax, **options)]])
    return plot_prior(fit, axes=axes, **options)


@draw.register
def draw_posterior(posterior: Posterior, axes: Any = None, **options: Any) -> Any:
    """The tasks' curves where there is one predictor, else their weights."""
    if _has_curves(posterior):
        return plot_curves(posterior, axes=axes, **options)
    return plot_weights(posterior, axes=axes, **options)


def _has_curves(posterior: Posterior) -> bool:
    """Whether an observation is one number over one predictor, and its mean a curve."""
    if posterior.trained.x_shape not in ((), (1,)):
        return False
    if not any(len(task.support[0]) for task in posterior.trained if task.support):
        return False
    first = posterior.take(posterior.names[:1])
    point = grid_over(None, posterior.trained, posterior.trained)[:1]
    return first.expected(point, num_samples=1).samples.dim() == 3
