"""The guides with options, under the name that users type: `vm.Joint(vm.guides.LowRank(rank=3))`."""

from varmeta.bayes.guide import Delta, Dense, Guide, MeanField
from varmeta.bayes.laplace import Laplace
from varmeta.bayes.quadrature import Quadrature
from varmeta.bayes.structured import LowRank, Structured

__all__ = ["Delta", "Dense", "Guide", "Laplace", "LowRank", "MeanField", "Quadrature", "Structured"]
