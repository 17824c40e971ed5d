"""The guides with options, as users type them: `vm.Joint(vm.guides.LowRank(rank=3))`."""

from varmeta.guides.delta import Delta
from varmeta.guides.dense import Dense
from varmeta.guides.guide import Guide
from varmeta.guides.laplace import Laplace
from varmeta.guides.mean_field import MeanField
from varmeta.guides.quadrature import Quadrature
from varmeta.guides.structured import LowRank, Structured

__all__ = ["Delta", "Dense", "Guide", "Laplace", "LowRank", "MeanField", "Quadrature", "Structured"]
