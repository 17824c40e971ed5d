"""The mean-field guide: a Gaussian with independent weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.guides.guide import Guide, copies, sample
from varmeta.guides.kl import location
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import Tree
from varmeta.tasks import Data


@dataclass(frozen=True, repr=False)
class MeanField(Guide):
    """q_i = N(loc_i, diag(exp(log_scale_i))^2).

    loc_i is `(D,)`, in the weights' units.

    >>> import varmeta as vm
    >>> vm.Joint(MeanField()).describe() == vm.Joint("normal").describe()
    True
    """

    name = "normal"
    is_point = False

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        prior = model.prior_distribution(eta)
        return {"loc": copies(location(prior), data), "log_scale": copies(prior.stddev.log(), data)}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        return sample(
            dist.Normal(phi["loc"].unsqueeze(-2), phi["log_scale"].exp().unsqueeze(-2)).to_event(1)
        )

    def at_gaussian(self, loc: Tensor, factor: Tensor) -> Tree:
        # the precision's diagonal: each weight's spread given the others
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        root = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return {"loc": loc, "log_scale": -0.5 * root.square().sum(-2).log()}

    def is_any_gaussian(self, size: int) -> bool:
        return size == 1
