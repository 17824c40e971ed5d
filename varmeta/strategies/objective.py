"""The objectives of a task, pure: `fn(phi, eta, batch, noise) -> loss of each task`.

    F_i = KL[q_i || p] + E_q f_i    "elbo": the inner problem, and the post's variational objective
    KL[q_i || p] + E_q g_i          "query_elbo": with a separate validation loss g
    E_q g_i                         "query": MAML, iMAML
    -log E_q p(query_i | theta)           "query_predictive": Chen et al. (2019)

f_i and g_i are summed over a task's observations, never averaged.  With a delta guide the first two
are penalised losses (MAP); they are *not* bounds on the evidence.  With Laplace's guide "elbo" is
-log of Laplace's evidence, no bound either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.guides.guide import Guide
from varmeta.guides.kl import kl, move
from varmeta.guides.laplace import Laplace
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.numerics.tree import Tree
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Batch, Data

ObjectiveFunction = Callable[[Tree, Mapping[str, Tensor], Batch, Tensor], Tensor]
OUTER = ("elbo", "query_elbo", "query", "query_predictive")


class Objective:
    """The four objectives of one model under one guide.

    `objective(phi, eta, batch, noise)` is the negative ELBO F_i on the support data (the inner
    problem); `objective.outer(name)` gives any of the four with the same signature.  phi: the
    guide's parameters, task axis first;
    eta: everything shared; noise: standardised points `(points, tasks or 1, D)` from an
    `Expectation`, and weights theirs, where they are not equal. Each returns nats per task,
    `(tasks,)`.
    """

    def __init__(
        self, model: TaskModel, guide: Guide, weights: tuple[float, ...] | None = None
    ) -> None:
        self.model = model
        self.guide = guide
        self.weights = weights

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], batch: Batch, noise: Tensor) -> Tensor:
        if isinstance(self.guide, Laplace):
            return self.guide.evidence(phi, eta, batch.support)
        divergence, nll = self.terms(phi, eta, batch.support, noise)
        return divergence + self.mean(nll)

    def inner(self, phi: Tree, eta: Mapping[str, Tensor], batch: Batch, noise: Tensor) -> Tensor:
        """What phi minimises: F_i.

        Under Laplace's guide the penalised loss, whose minimum is the mode.
        """
        if isinstance(self.guide, Laplace):
            return self.guide.penalised(phi, eta, batch.support)
        return self(phi, eta, batch, noise)

    def query_elbo(
        self, phi: Tree, eta: Mapping[str, Tensor], batch: Batch, noise: Tensor
    ) -> Tensor:
        divergence, nll = self.terms(phi, eta, batch.require_query(), noise, batch.support)
        return divergence + self.mean(nll)

    def query(self, phi: Tree, eta: Mapping[str, Tensor], batch: Batch, noise: Tensor) -> Tensor:
        return self.mean(self.terms(phi, eta, batch.require_query(), noise, batch.support)[1])

    def query_predictive(
        self, phi: Tree, eta: Mapping[str, Tensor], batch: Batch, noise: Tensor
    ) -> Tensor:
        nll = self.terms(phi, eta, batch.require_query(), noise, batch.support)[1]
        return math.log(len(nll)) - (-nll).logsumexp(0)

    def mean(self, nll: Tensor) -> Tensor:
        """The expectation of losses at the points of the rule, `(points, tasks)`."""
        if self.weights is None or len(nll) == 1:  # all points of a point guide are one
            return nll.mean(0)
        return (
            torch.tensor(self.weights, dtype=nll.dtype, device=nll.device).unsqueeze(-1) * nll
        ).sum(0)

    def outer(self, name: str) -> ObjectiveFunction:
        if name == "inner":
            return self.inner
        if name not in OUTER:
            raise ValueError(f"unknown outer objective {name!r}: choose one of {OUTER}")
        return self if name == "elbo" else getattr(self, name)

    def terms(
        self,
        phi: Tree,
        eta: Mapping[str, Tensor],
        data: Data,
        noise: Tensor,
        seen: Data | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KL[q_i || p] `(tasks,)` and -log p(data_i | theta) at every point, `(points, tasks)`,
        from the two Pyro traces.

        seen: the data that the guide is shown (by default the same): never the query that it is
            judged on.
        """
        # validation is data-dependent control flow on the hot path; TaskModel.check has run with it
        # once
        with validation_enabled(False):
            q = self.guide.distribution(phi, eta, data if seen is None else seen)
            if isinstance(q, dist.Delta):
                noise = noise[:1]  # all points of a rule are the same one
            theta = move(q, noise.unsqueeze(-2))
            prior, nll = negative_log_likelihood(self.model, theta, eta, data)
            return kl(q, prior).squeeze(-1), nll
