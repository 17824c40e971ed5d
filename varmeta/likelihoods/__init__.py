"""The likelihoods under the name that users type: `vm.likelihoods.Gaussian(scale=0.1)`."""

from varmeta.likelihoods.base import Bernoulli, Binomial, Categorical, Gaussian, Likelihood, Poisson, StudentT
from varmeta.likelihoods.more import LogNormal, NegativeBinomial, Ordinal
from varmeta.likelihoods.weighted import Weighted

__all__ = [
    "Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "LogNormal", "NegativeBinomial", "Ordinal", "Poisson",
    "StudentT", "Weighted",
]  # fmt: skip
