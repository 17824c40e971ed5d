"""Whether the learned noise is larger than the data: the weights then explain less than nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.fitting.pooled_start import is_regression
from varmeta.likelihoods.base import SCALE
from varmeta.likelihoods.continuous import Gaussian, StudentT

if TYPE_CHECKING:
    from varmeta.results.result import Fit

# A noise scale may exceed the sd of a few rows by chance, and by its degrees of freedom.
EXCESS = 1.1
# A spread of so many roundings of the largest number is none.
ROUNDINGS = 100.0
# After fewer steps, and short of convergence, it is still on its way from where it started.
LONG = 500


def unexplained(fit: Fit) -> str | None:
    """A sentence where the noise scale, learned in earnest, exceeds the sd of all support rows."""
    scale, likelihood = fit.prior.scale, fit.model.likelihood
    if SCALE not in fit.eta or not isinstance(likelihood, (Gaussian, StudentT)) or scale is None:
        return None
    if likelihood.has_hyperprior:  # which may hold it there
        return None
    if likelihood.predictive is not likelihood and fit.strategy.outer != "elbo":
        return None  # a penalty that classes were judged by, no estimate of a noise
    y = likelihood.observed(fit.tasks.support_rows.y).double()
    if scale.numel() != 1 or len(y) < 2 or not spread(y):
        return None
    sd, found = float(y.std()), float(scale)
    if not found > EXCESS * sd or not (fit.converged or fit.run.step >= LONG):
        return None
    why = (
        "The prior holds them away from the data: let theta0 be learned (learn_loc), lower the "
        "precision, or learn it"
        if is_regression(fit.model, fit.tasks, fit.eta)
        else "In a network the prior drowns the signal: start its precision at the layers' fan-in "
        "(leave precision out), "
        "share the layers that need not vary (shared=), or take more steps"
    )
    return (
        f"the learned noise scale, {found:.3g}, exceeds the sd of the data, {sd:.3g}: the weights "
        f"explain nothing, and predictions are wider than the data.  {why}"
    )


def spread(y: Tensor) -> float:
    """How far the rows `(n, ...)`, n > 0, lie from their mean; 0 where that is rounding.

    >>> spread(torch.tensor([1e8, 1e8 + 16])), spread(torch.full((7,), 0.1))
    (8.0, 0.0)
    """
    y = y.double()
    found = float((y - y.mean(0)).abs().max())
    return found if found > ROUNDINGS * torch.finfo(y.dtype).eps * float(y.abs().max()) else 0.0
