"""The dense guide: a Gaussian with all correlations of a task's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.guides.guide import Guide, copies, sample
from varmeta.guides.kl import location, scale
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import Tree
from varmeta.priors.factors import unit_lower
from varmeta.tasks import Data


@dataclass(frozen=True, repr=False)
class Dense(Guide):
    """q_i = N(loc_i, L_i L_i'): one dense block per task.

    L_i = diag(exp(log_scale_i)) U_i, U_i unit lower triangular.

    loc_i is `(D,)`, in the weights' units.

    >>> import varmeta as vm
    >>> vm.Joint(Dense()).describe() == vm.Joint("multivariate_normal").describe()
    True
    """

    name = "multivariate_normal"
    is_point = False

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        prior = model.prior_distribution(eta)
        factor = scale(prior)
        assert factor is not None  # the prior is a Gaussian
        if factor.dim() == 1:
            factor = torch.diag_embed(factor)
        phi = self.at_gaussian(location(prior), factor)
        return {name: copies(value, data) for name, value in phi.items()}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        factor = torch.diag_embed(phi["log_scale"].exp())
        if "tril" in phi:
            factor = factor @ unit_lower(phi["tril"], phi["loc"].shape[-1])
        return sample(
            dist.MultivariateNormal(phi["loc"].unsqueeze(-2), scale_tril=factor.unsqueeze(-3))
        )

    def at_gaussian(self, loc: Tensor, factor: Tensor) -> Tree:
        spread = factor.diagonal(dim1=-2, dim2=-1)
        phi = {"loc": loc, "log_scale": spread.log()}
        size = spread.shape[-1]
        if size > 1:
            rows, columns = torch.tril_indices(size, size, -1)
            phi["tril"] = (factor / spread.unsqueeze(-1))[..., rows, columns]
        return phi

    def is_any_gaussian(self, size: int) -> bool:
        return True
