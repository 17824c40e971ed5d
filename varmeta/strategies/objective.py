"""The objectives of a task, pure: `fn(phi, eta, batch, noise) -> loss of each task`.

    F_i = KL[q_i || p] + E_q f_i    "elbo": the inner problem, and the post's variational objective
    KL[q_i || p] + E_q g_i          "query_elbo": with a separate validation loss g
    E_q g_i                         "query": MAML, iMAML
    -log E_q p(query_i | theta)           "query_predictive": Chen et al. (2019)

f_i and g_i are summed over a task's observations, never averaged.  With a delta guide the first two
are penalised losses (MAP); they are *not* bounds on the evidence.  With Laplace's guide "elbo" is
-log of Laplace's evidence, no bound either.  An outer objective of the user's own is a function
`fn(objective, phi, eta, batch, noise)`, made of what `Objective` offers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Literal, get_args

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta._checks import kind_of, nearest
from varmeta.guides.guide import Guide
from varmeta.guides.kl import kl, move
from varmeta.guides.laplace import Laplace
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.models.pyro_program import SITE, observed_site
from varmeta.numerics.tree import Tree
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Batch, Data

ObjectiveFunction = Callable[[Tree, Mapping[str, Tensor], Batch, Tensor], Tensor]
OuterName = Literal["elbo", "query_elbo", "query", "query_predictive"]
OUTER: tuple[OuterName, ...] = get_args(OuterName)


class Objective:
    """The four objectives of one model under one guide.

    `objective(phi, eta, batch, noise)` is the negative ELBO F_i on the support data (the inner
    problem); `objective.outer(name)` gives any of the four, or the user's own, with the same
    signature.  phi: the guide's parameters, task axis first; eta: everything shared; noise:
    standardised points `(points, tasks or 1, D)` from an `Expectation`, and weights theirs, where
    they are not equal. Each returns nats per task, `(tasks,)`.
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

    def outer(self, which: Outer | Literal["inner"]) -> ObjectiveFunction:
        """The objective of that name, or the user's own, with the signature of this one.

        Raises ValueError for an unknown name, TypeError for what is no name and no function.
        """
        if which == "inner":
            return self.inner
        check_outer(which)
        if callable(which):
            return partial(which, self)
        return self if which == "elbo" else getattr(self, which)

    def terms(
        self,
        phi: Tree,
        eta: Mapping[str, Tensor],
        data: Data,
        noise: Tensor,
        seen: Data | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KL[q_i || p] `(tasks,)`, and -log p(data_i | theta) at every point, `(points, tasks)`.

        From the two Pyro traces.

        seen: the data that the guide is shown (by default the same): never the query that it is
            judged on.  Beside them `data` are new observations, those of `TaskModel.predictive`.
        """
        model = self.model if seen is None else self.model.predictive
        # validation is data-dependent control flow on the hot path; TaskModel.check has run with it
        # once
        with validation_enabled(False):
            q, theta = self._moved(phi, eta, data if seen is None else seen, noise)
            prior, nll = negative_log_likelihood(model, theta, eta, data)
            return kl(q, prior).squeeze(-1), nll

    def observations(
        self, phi: Tree, eta: Mapping[str, Tensor], data: Data, noise: Tensor, seen: Data
    ) -> dist.TorchDistribution:
        """p(y | theta) of every row of `data` at every point, `(points, tasks, rows)`.

        Its `mean` is the prediction, its `log_prob(data.y)` what `terms` sums; a function of the
        user's own may ask for anything else.  Rows where `data.mask` is False mean nothing.
        """
        with validation_enabled(False):
            _, theta = self._moved(phi, eta, seen, noise)
            program = poutine.condition(self.model.predictive, {SITE: theta})
            trace = poutine.trace(program).get_trace(eta, data)
        found: dist.TorchDistribution = observed_site(trace)["fn"]
        return found

    def _moved(
        self, phi: Tree, eta: Mapping[str, Tensor], seen: Data, noise: Tensor
    ) -> tuple[dist.TorchDistribution, Tensor]:
        """q, and theta as it is sampled, at the points."""
        q = self.guide.distribution(phi, eta, seen)
        if isinstance(q, dist.Delta):
            noise = noise[:1]  # all points of a rule are the same one
        return q, move(q, noise.unsqueeze(-2))


OwnObjective = Callable[[Objective, Tree, Mapping[str, Tensor], Batch, Tensor], Tensor]
Outer = OuterName | OwnObjective


def check_outer(outer: object) -> None:
    """Raise unless it is one of the four names or a function that can stand for one.

    ValueError for an unknown name, TypeError for anything else.
    """
    if isinstance(outer, str):
        if outer not in OUTER:
            raise ValueError(
                f"unknown outer objective {outer!r}: choose one of {OUTER}, or give a function "
                f"fn(objective, phi, eta, batch, noise) of one loss per task{nearest(outer, OUTER)}"
            )
    elif not callable(outer) or not isinstance(outer, Hashable):
        raise TypeError(
            f"outer must be one of {OUTER} or a function fn(objective, phi, eta, batch, noise) of "
            f"one loss per task, not {kind_of(outer)}"
        )
