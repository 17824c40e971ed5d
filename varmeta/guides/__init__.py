"""The guides with options, under the name that users type: `vm.Joint(vm.guides.LowRank(rank=3))`."""

from varmeta.guides.guide import Delta, Dense, Guide, MeanField
from varmeta.guides.laplace import Laplace
from varmeta.guides.quadrature import Quadrature
from varmeta.guides.structured import LowRank, Structured

__all__ = ["Delta", "Dense", "Guide", "Laplace", "LowRank", "MeanField", "Quadrature", "Structured"]
