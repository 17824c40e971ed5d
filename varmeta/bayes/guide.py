"""Guides q(theta; phi_i): one point or Gaussian per task, with the parameters phi as explicit arguments.

A guide is a Pyro program that samples the model's site `theta` under the plate `tasks`.  phi is a tree with the task axis
first, so that rows can be taken, put back and reset to the prior.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuideList, AutoStructured
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from varmeta.bayes.divergence import location, scale
from varmeta.bayes.model import SITE, TASKS, TaskModel
from varmeta.bayes.prior import unit_lower
from varmeta.numerics.tree import Tree
from varmeta.tasks import Data


class Guide(ABC):
    """q(theta; phi_i), one factor per task."""

    name = "guide"

    @abstractmethod
    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        """phi at the prior: q = p(theta | eta), or its mean.

        Differentiable in eta (what MAML goes through), and sharing no memory with it.
        """

    @abstractmethod
    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        """The Pyro program: samples `theta`, batch shape `(tasks, 1)` and event shape `(D,)`, under the plate `tasks`."""

    def distribution(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> dist.TorchDistribution:
        """q(theta; phi), read off the program's trace: a Delta, Normal or MultivariateNormal.

        Raises ValueError where the program samples anything but one theta per task.
        """
        with pyro.settings.context(module_local_params=True):
            trace = poutine.trace(self).get_trace(phi, eta, data)
        sites: dict[str, Any] = {
            name: site["fn"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        if SITE not in sites:
            raise ValueError(f"the guide must sample the site {SITE!r}; it samples {sorted(sites)}")
        # AutoNormal draws an auxiliary Gaussian and hands it on as a Delta; theta is real, so that Gaussian is q
        random = [fn for fn in sites.values() if not isinstance(fn, dist.Delta)]
        if len(random) > 1:
            raise ValueError(f"the guide must have one random site per task, theta; it has {sorted(sites)}")
        q = random[0] if random else sites[SITE]
        scale(q)  # raises for a family without a closed-form KL
        return q

    def __repr__(self) -> str:
        return self.name


class Delta(Guide):
    """q_i = delta(theta_i): MAP.  Its objective is *not* a bound on the evidence."""

    name = "delta"

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        return {"loc": _copies(location(model.prior_distribution(eta)), data)}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        return _sample(dist.Delta(phi["loc"].unsqueeze(-2), event_dim=1))


class MeanField(Guide):
    """q_i = N(loc_i, diag(exp(log_scale_i))^2)."""

    name = "normal"

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        prior = model.prior_distribution(eta)
        return {"loc": _copies(location(prior), data), "log_scale": _copies(prior.stddev.log(), data)}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        return _sample(dist.Normal(phi["loc"].unsqueeze(-2), phi["log_scale"].exp().unsqueeze(-2)).to_event(1))


class Dense(Guide):
    """q_i = N(loc_i, L_i L_i') with L_i = diag(exp(log_scale_i)) U_i, U_i unit lower triangular: one block per task."""

    name = "multivariate_normal"

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        prior = model.prior_distribution(eta)
        factor = scale(prior)
        assert factor is not None  # the prior is a Gaussian
        if factor.dim() == 1:
            factor = torch.diag_embed(factor)
        spread = factor.diagonal()
        phi = {"loc": _copies(location(prior), data), "log_scale": _copies(spread.log(), data)}
        if len(spread) > 1:
            rows, columns = torch.tril_indices(len(spread), len(spread), -1)
            phi["tril"] = _copies((factor / spread.unsqueeze(-1))[rows, columns], data)
        return phi

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        factor = torch.diag_embed(phi["log_scale"].exp())
        if "tril" in phi:
            factor = factor @ unit_lower(phi["tril"], phi["loc"].shape[-1])
        return _sample(dist.MultivariateNormal(phi["loc"].unsqueeze(-2), scale_tril=factor.unsqueeze(-3)))


class PyroGuide(Guide):
    """A user's own Pyro guide, made by `factory(model)`: an `AutoNormal`, `AutoDelta`, or a `PyroModule` of one's own.

    It samples the site `theta`, event shape `(D,)`, under `pyro.plate("tasks", ..., dim=-2)`; every one of its parameters
    has the task axis first.  One auxiliary Gaussian site is allowed (what `AutoNormal` does).

    Raises ValueError for a guide that mixes the tasks: the flattening autoguides, or parameters without the task axis.
    """

    def __init__(self, factory: Callable[[Callable[..., Any]], Any]) -> None:
        self.factory = factory
        self.name = getattr(factory, "__name__", type(factory).__name__)
        # one module per number of tasks: an autoguide remembers the plate size of its first call
        self._modules: dict[int, tuple[TaskModel, torch.nn.Module]] = {}

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        phi = {name: value.detach().clone() for name, value in self._module(model, eta, data).named_parameters()}
        wrong = [name for name, value in phi.items() if value.dim() == 0 or len(value) != len(data)]
        if wrong or not phi:
            raise ValueError(
                f"the guide's parameters {wrong} do not have the task axis ({len(data)} tasks) first, so it is not a "
                "guide per task: give every parameter one row per task"
            )
        return phi

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        if len(data) not in self._modules:
            raise RuntimeError(f"call init for {len(data)} tasks before this guide is run on them")
        return torch.func.functional_call(self._modules[len(data)][1], phi, (eta, data))

    def _module(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> torch.nn.Module:
        cached = self._modules.get(len(data))
        if cached is not None and cached[0] is model:
            return cached[1]
        with pyro.settings.context(module_local_params=True), torch.random.fork_rng():
            module = self.factory(model)
            if isinstance(module, (AutoContinuous, AutoStructured, AutoGuideList)):
                raise ValueError(
                    f"{type(module).__name__} makes one vector of all tasks and so mixes them: use 'normal' or "
                    "'multivariate_normal', AutoNormal, AutoDelta, or a PyroModule with one row per task"
                )
            if not isinstance(module, torch.nn.Module):
                raise TypeError(f"the guide must be a Pyro guide (an nn.Module), not {type(module).__name__}")
            detached = {name: value.detach() for name, value in eta.items()}
            module(detached, data)
        self._modules[len(data)] = (model, module)
        return module


GUIDES: dict[str, type[Guide]] = {guide.name: guide for guide in (Delta, MeanField, Dense)}


def make_guide(guide: str | Callable[..., Any] | Guide) -> Guide:
    """The guide behind a name, or around a factory of Pyro guides.

    Raises ValueError for an unknown name.
    """
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, str):
        if guide not in GUIDES:
            raise ValueError(
                f"unknown guide {guide!r}: choose one of {sorted(GUIDES)}, or pass a factory of a Pyro guide"
            )
        return GUIDES[guide]()
    if not callable(guide):
        raise TypeError(f"guide must be a name or a callable that makes a Pyro guide, not {type(guide).__name__}")
    return PyroGuide(guide)


def _sample(q: dist.TorchDistribution) -> Tensor:
    with pyro.plate(TASKS, q.batch_shape[0], dim=-2):
        return pyro.sample(SITE, q)


def _copies(row: Tensor, data: Data) -> Tensor:
    # clone: an expanded view would share memory with theta0, and a step on a guide would move the prior
    return row.expand(len(data), *row.shape).clone()
