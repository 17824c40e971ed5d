"""Evidence and posterior moments of a task with few weights, by Gauss-Hermite quadrature.

With theta* the mode, H the curvature there, L L' = H^-1, and nodes z_j of weight w_j for N(0, I),

    p(y_i | eta) = |L| (2 pi)^(D/2) sum_j w_j exp(z_j'z_j / 2) p(y_i, theta* + L z_j | eta),

what lme4's glmer maximises with nAGQ = the number of nodes.  With one node it is Laplace's
approximation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta._checks import counted, whole_number
from varmeta.guides.guide import sample
from varmeta.guides.laplace import Laplace
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.numerics.quadrature import EVIDENCE, nodes, placed
from varmeta.numerics.tree import Tree
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data


@dataclass(frozen=True, repr=False)
class Quadrature(Laplace):
    """q_i is the Gaussian with the mean and covariance of the posterior of task i.

    "elbo" is -log p(y_i | eta) itself.

    Both by adaptive Gauss-Hermite quadrature around the mode, see the head of this module.  For up
    to three weights per task and `Implicit`; it is neither a bound nor an approximation that must
    be trusted where a posterior is skewed, as Laplace's is.  A posterior of several modes far apart
    is missed but for one.

    num_nodes: for each weight; None: 51 for one weight, 15 for two, 7 for three.
    Source: Pinheiro and Bates, J. Computational and Graphical Statistics 4 (1995).

    Raises ValueError for more than three weights per task.

    >>> import torch, varmeta as vm
    >>> votes = vm.TaskSet([vm.Task((torch.zeros(3, 0), torch.tensor([0, 1, i]))) for i in (0, 1)])
    >>> model = vm.TaskModel(vm.LinearPredictor([]), vm.likelihoods.Bernoulli())
    >>> vm.fit(model, votes, vm.Implicit(Quadrature(num_nodes=21))).loss_name
    'negative log evidence by quadrature'
    """

    num_nodes: int | None = None

    name = "quadrature"
    evidence_name = "evidence by quadrature"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_nodes is not None:
            whole_number("num_nodes", self.num_nodes)

    def __repr__(self) -> str:
        return self.name if self.num_nodes is None else f"{self.name}(num_nodes={self.num_nodes})"

    def bound(self, model: TaskModel) -> Quadrature:
        size = model.weights.size
        if size not in EVIDENCE:
            raise ValueError(
                f"quadrature serves up to {max(EVIDENCE)} weights per task, and this model has "
                f"{counted(size, 'weight')}: use guide='multivariate_normal' or 'laplace', or let "
                "fewer weights vary (shared=)"
            )
        bound = super().bound(model)
        assert isinstance(bound, Quadrature)
        return bound

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        share = self.at_nodes(phi, eta, data)[1].softmax(0).unsqueeze(-1)
        # in units of the Gaussian at the mode, in which no covariance is nearly singular
        z = nodes(phi["loc"].shape[-1], self._number(phi))[0].to(phi["loc"]).unsqueeze(1)
        mean = (share * z).sum(0)
        offset = z - mean
        covariance = ((share * offset).unsqueeze(-1) * offset.unsqueeze(-2)).sum(0)
        # away from the mode one node may have all the mass, and the nodes no covariance: the
        # Hessian's is left
        lost = (torch.linalg.cholesky_ex(covariance.detach()).info != 0).reshape(-1, 1, 1)
        identity = torch.eye(z.shape[-1]).to(z)
        around = self._factor(phi, eta, data)[0]
        factor = around @ torch.linalg.cholesky_ex(torch.where(lost, identity, covariance)).L
        mean = phi["loc"] + (around @ mean.unsqueeze(-1)).squeeze(-1)
        return sample(dist.MultivariateNormal(mean.unsqueeze(-2), scale_tril=factor.unsqueeze(-3)))

    def _number(self, phi: Tree) -> int:
        return self.num_nodes or EVIDENCE[phi["loc"].shape[-1]]

    def evidence(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """-log p(y_i | eta) around phi, `(tasks,)`, in nats."""
        return -self.at_nodes(phi, eta, data)[1].logsumexp(0)

    def at_nodes(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> tuple[Tensor, Tensor]:
        """theta at the nodes, and the log joint density with the nodes' log weights there.

        theta `(J, tasks, D)`; log p(y, theta) + log w, `(J, tasks)`.
        """
        number = self._number(phi)
        factor, _ = self._factor(phi, eta, data)
        # block: the guide's own trace must not see the model run
        with validation_enabled(False), poutine.block():
            theta, log_weight = placed(phi["loc"], factor, number)
            prior, nll = negative_log_likelihood(self.model, theta.unsqueeze(-2), eta, data)
            log_p = prior.log_prob(theta.unsqueeze(-2)).squeeze(-1) - nll
        return theta, log_p + log_weight
