"""The likelihoods under the name that users type: `vm.likelihoods.Gaussian(scale=0.1)`."""

from varmeta.bayes.likelihood import Bernoulli, Binomial, Categorical, Gaussian, Likelihood, Poisson, StudentT

__all__ = ["Bernoulli", "Binomial", "Categorical", "Gaussian", "Likelihood", "Poisson", "StudentT"]
