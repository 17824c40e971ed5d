"""The likelihoods under the name that users type: `vm.likelihoods.Gaussian(scale=0.1)`."""

from varmeta.bayes.likelihood import Bernoulli, Binomial, Categorical, Gaussian, Likelihood, Poisson, StudentT
from varmeta.bayes.likelihood_more import LogNormal, NegativeBinomial, Ordinal
from varmeta.bayes.likelihood_weighted import Weighted

__all__ = [
    "Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "LogNormal", "NegativeBinomial", "Ordinal", "Poisson",
    "StudentT", "Weighted",
]  # fmt: skip
