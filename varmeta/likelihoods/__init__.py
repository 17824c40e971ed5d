"""The likelihoods under the name that users type: `vm.likelihoods.Gaussian(scale=0.1)`."""

from varmeta.likelihoods.base import Likelihood
from varmeta.likelihoods.continuous import Gaussian, LogNormal, StudentT
from varmeta.likelihoods.discrete import (
    Bernoulli,
    Binomial,
    Categorical,
    NegativeBinomial,
    Ordinal,
    Poisson,
)
from varmeta.likelihoods.least_squares import LeastSquaresClasses
from varmeta.likelihoods.weighted import Weighted

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Gaussian",
    "LeastSquaresClasses",
    "Likelihood",
    "LogNormal",
    "NegativeBinomial",
    "Ordinal",
    "Poisson",
    "StudentT",
    "Weighted",
]
