"""The point: q_i = delta(theta_i)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor

from varmeta.guides.guide import Guide, copies, sample
from varmeta.guides.kl import location
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import Tree
from varmeta.tasks import Data


@dataclass(frozen=True, repr=False)
class Delta(Guide):
    """q_i = delta(theta_i): MAP.  Its objective is *not* a bound on the evidence.

    >>> import varmeta as vm
    >>> vm.Joint(Delta()).describe() == vm.Joint("delta").describe()
    True
    """

    name = "delta"
    is_point = True
    phi_is_loc = True

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        return {"loc": copies(location(model.prior_distribution(eta)), data)}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        return sample(dist.Delta(phi["loc"].unsqueeze(-2), event_dim=1))

    def at_gaussian(self, loc: Tensor, factor: Tensor) -> Tree:
        return {"loc": loc}  # the mode
