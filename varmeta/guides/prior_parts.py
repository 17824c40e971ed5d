"""The prior as its location and a root of its covariance: the units that tasks are put in."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from varmeta.guides.kl import location, root_of
from varmeta.models.model import TaskModel
from varmeta.numerics.roots import Root
from varmeta.priors.validation import validation_enabled


def prior_parts(model: TaskModel, eta: Mapping[str, Tensor]) -> tuple[Tensor, Root]:
    """theta0 `(D,)` and A with A A' = Lambda^-1, in eta's precision; differentiable in eta.

    Nothing is checked: that would look at numbers, which `vmap` and a graph that is being captured
    do not have.
    """
    with validation_enabled(False):
        prior = model.prior_distribution(eta)
    return location(prior), root_of(prior)
