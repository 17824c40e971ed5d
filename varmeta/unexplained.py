"""Whether the learned noise is larger than the data: the weights then explain less than nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from varmeta.bayes.likelihood import SCALE, Gaussian, StudentT

if TYPE_CHECKING:
    from varmeta.result import Fit

# A noise scale may exceed the sd of a few rows by chance, and by its degrees of freedom.
EXCESS = 1.1


def unexplained(fit: Fit) -> str | None:
    """A sentence where the noise scale, learned and not just where it started, exceeds the sd of all support rows."""
    scale, likelihood, data = fit.prior.scale, fit.model.likelihood, fit.tasks.batch().support
    if SCALE not in fit.eta or not isinstance(likelihood, (Gaussian, StudentT)) or scale is None:
        return None
    y = data.y[data.mask].double()
    if scale.numel() != 1 or len(y) < 2:
        return None
    sd, found = float(y.std()), float(scale)
    start = float(fit.model.init(data.x.new_zeros(()))[SCALE].exp())
    if not found > EXCESS * sd or not (fit.converged or found > start):
        return None
    return (
        f"the learned noise scale, {found:.3g}, exceeds the sd of the data, {sd:.3g}: the weights "
        "explain nothing, and predictions are wider than the data.  In a network the prior drowns the "
        "signal: start its precision at the layers' fan-in (leave precision out), share the layers that "
        "need not vary (shared=), or take more steps"
    )
