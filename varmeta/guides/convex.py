"""Where f_i is convex by construction, the prior bounds the inner Hessian from below."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from varmeta.guides.delta import Delta
from varmeta.guides.guide import Guide
from varmeta.guides.laplace import Laplace
from varmeta.guides.prior_parts import prior_parts
from varmeta.likelihoods.continuous import Gaussian, LogNormal
from varmeta.likelihoods.discrete import Bernoulli, Binomial, Categorical, NegativeBinomial, Poisson
from varmeta.likelihoods.least_squares import LeastSquaresClasses
from varmeta.models.model import TaskModel
from varmeta.numerics.adjoint import Quadratic
from varmeta.numerics.tree import Tree, detach, flatten

# Their log densities are concave in the network's output.  Exact classes: a subclass may be
# anything.
LOG_CONCAVE = (
    Gaussian,
    LeastSquaresClasses,
    LogNormal,
    Bernoulli,
    Binomial,
    Categorical,
    Poisson,
    NegativeBinomial,
)


def inverse_ceiling(model: TaskModel, guide: Guide, eta: Mapping[str, Tensor]) -> Quadratic | None:
    """v -> v' Lambda^-1 v, which v' H^-1 v is nowhere above, H the inner problem's Hessian.

    None where that is not known.

    At a point theta the inner loss is 1/2 (theta - theta0)' Lambda (theta - theta0) + f_i(theta),
    and f_i is convex where the output is affine in theta and the likelihood log-concave, so that H
    >= Lambda.
    """
    convex = model.is_linear and type(model.likelihood) in LOG_CONCAVE
    if not convex or not isinstance(guide, (Delta, Laplace)):
        return None
    _, root = prior_parts(model, detach(dict(eta)))

    def ceiling(v: Tree) -> Tensor:
        return root.transposed(flatten(v)).square().sum(-1)

    return ceiling
