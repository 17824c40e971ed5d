"""Where f_i is convex by construction, so that the prior bounds the curvature of the inner problem from below."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from varmeta.bayes.guide import Delta, Guide
from varmeta.bayes.laplace import Laplace
from varmeta.bayes.likelihood import Bernoulli, Binomial, Categorical, Gaussian, Poisson
from varmeta.bayes.likelihood_more import LogNormal, NegativeBinomial
from varmeta.bayes.model import TaskModel
from varmeta.bayes.validation import validation_enabled

# Their log densities are concave in the network's output.  Exact classes: a subclass may be anything.
LOG_CONCAVE = (Gaussian, LogNormal, Bernoulli, Binomial, Categorical, Poisson, NegativeBinomial)


def least_curvature(model: TaskModel, guide: Guide, eta: Mapping[str, Tensor]) -> Tensor | None:
    """The prior's smallest precision, a number that no curvature of the inner problem is below; None where that is not known.

    At a point theta the inner loss is 1/2 (theta - theta0)' Lambda (theta - theta0) + f_i(theta), and f_i is convex where the
    output is affine in theta and the likelihood log-concave.
    """
    convex = model.is_linear and type(model.likelihood) in LOG_CONCAVE
    if not convex or not isinstance(guide, (Delta, Laplace)):
        return None
    # validation looks at numbers, which a graph that is being captured does not have yet
    with validation_enabled(False):
        prior = model.prior_distribution(eta)
    if not model.prior.dense:
        return prior.variance.amax().reciprocal().detach()
    # the largest variance of any direction is at most the trace
    return prior.variance.sum().reciprocal().detach()
