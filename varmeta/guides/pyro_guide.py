"""A guide of the user's own: a factory of Pyro guides, made for all tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGaussian, AutoGuideList, AutoStructured
from torch import Tensor

from varmeta._checks import kind_of, name_of
from varmeta.graphs.process import ALONE
from varmeta.guides.guide import Guide, _AtLocation
from varmeta.guides.kl import location, scale
from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import SITE
from varmeta.numerics.tree import Tree
from varmeta.tasks import Data


class PyroGuide(Guide):
    """A user's own Pyro guide, made by `factory(model)`.

    An `AutoNormal`, an `AutoDelta`, or a `PyroModule` of one's own.

    It is called as `guide(eta, data)` and samples the site `theta`, event shape `(D,)`, under
    `pyro.plate("tasks", len(data), dim=-2)`; with covariates that is the weights less what the
    features add to them.  It makes its parameters in its first call, every one with the task axis
    first, and is made anew for other numbers of tasks.  One auxiliary Gaussian site is allowed
    (what `AutoNormal` does).

    phi starts where the guide itself starts (for autoguides: `init_loc_fn`), as a constant: no
    derivative with respect to eta passes through the start.

    Raises ValueError for a guide that mixes the tasks: the flattening autoguides, parameters
    without the task axis, or a task's theta that moves with another task's parameters.

    >>> class Points(pyro.nn.PyroModule):
    ...     def __init__(self, model):
    ...         super().__init__()
    ...         self.model, self.loc = model, None
    ...     def forward(self, eta, data):
    ...         if self.loc is None:
    ...             start = self.model.prior_distribution(eta).mean
    ...             self.loc = torch.nn.Parameter(start.repeat(len(data), 1, 1))
    ...         with pyro.plate("tasks", len(data), dim=-2):
    ...             return pyro.sample("theta", dist.Delta(self.loc, event_dim=1))
    >>> PyroGuide(Points)
    Points
    """

    def __init__(self, factory: Callable[[Callable[..., Any]], Any]) -> None:
        self.factory = factory
        self.name = name_of(factory)
        self._model: TaskModel | None = None
        # one module per number of tasks: an autoguide remembers the plate size of its first call
        self._modules: dict[int, torch.nn.Module] = {}

    @property
    def key(self) -> Hashable:
        return self  # it holds the modules that it made

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        if self._model is None:
            self._check(model, eta, data)
            self._model = model
        elif self._model is not model:
            raise ValueError(
                "this PyroGuide serves another model already: make a new one from its factory"
            )
        # made anew, so that the start follows eta (init_to_mean)
        module = self._modules[len(data)] = self._make(model, eta, data)
        return _rows_of(module)

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        if len(data) not in self._modules:
            raise RuntimeError(
                f"call init or distribution for {len(data)} tasks before this guide is run"
            )
        # views: Pyro hangs attributes on the tensors that it is given, which phi as it is stored
        # must not carry
        views = {name: value.view_as(value) for name, value in phi.items()}
        return torch.func.functional_call(self._modules[len(data)], views, (eta, data))

    def distribution(
        self, phi: Tree, eta: Mapping[str, Tensor], data: Data
    ) -> dist.TorchDistribution:
        if len(data) not in self._modules and self._model is not None:
            # a minibatch: of this module only the structure is used, its values come from phi
            self._modules[len(data)] = self._make(self._model, eta, data)
        return super().distribution(phi, eta, data)

    def _make(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> torch.nn.Module:
        devices = [data.like.device] if data.like.device.type == "cuda" else []
        with (
            ALONE,
            pyro.settings.context(module_local_params=True),
            pyro.get_param_store().scope(),
            torch.random.fork_rng(devices=devices),
        ):
            # a random start is the same at every call; not torch.manual_seed, which would seed
            # devices that are not forked
            torch.default_generator.manual_seed(0)
            if devices:
                torch.cuda.manual_seed(0)
            module = self.factory(model)
            if isinstance(module, (AutoContinuous, AutoGaussian, AutoStructured, AutoGuideList)):
                raise ValueError(
                    f"{type(module).__name__} makes one vector of all tasks and so mixes them: use "
                    "'normal' or 'multivariate_normal', AutoNormal, AutoDelta, or a PyroModule "
                    "with one row per task"
                )
            if not isinstance(module, torch.nn.Module):
                raise TypeError(
                    f"the guide's factory {self.name!r} must return a Pyro guide (an nn.Module), "
                    f"not {kind_of(module)}: a guide function is made a PyroModule that holds its "
                    "parameters (docs/extend.md)"
                )
            module({name: value.detach() for name, value in eta.items()}, data)
            if pyro.get_param_store():
                raise ValueError(
                    f"the guide keeps {sorted(pyro.get_param_store().keys())} in Pyro's global "
                    "parameter store: make them attributes of a PyroModule instead (PyroParam or "
                    "nn.Parameter)"
                )
        return module

    def _check(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> None:
        """Refuse a guide that is not one factor per task, by running it on one task more and moving
        one task's row.
        """
        more = data.take(torch.arange(len(data) + 1, device=data.like.device) % len(data))
        module = self._modules[len(more)] = self._make(model, eta, more)
        named = dict(module.named_parameters())
        # one task more than the caller's: a length of D that happens to be the number of tasks does
        # not pass for it
        wrong = [
            name for name, value in named.items() if value.dim() == 0 or len(value) != len(more)
        ]
        if wrong or not named:
            what = (
                f"the guide's parameters {wrong} do not"
                if named
                else "the guide has no parameters, so they do not"
            )
            raise ValueError(
                f"{what} have the task axis ({len(more)} tasks) first, so it is not a guide per "
                "task: make the parameters in its first call, with one row for each of len(data) "
                "tasks"
            )
        phi = _rows_of(module)
        with torch.no_grad():
            q = self.distribution(phi, eta, more)
            if q.event_shape != (model.weights.size,):
                raise ValueError(
                    f"the guide's theta has {q.event_shape[0]} entries, but a task "
                    f"{model.weights.size} weights"
                )
            with (
                ALONE,
                pyro.settings.context(module_local_params=True),
                _AtLocation(offset=1.0),
            ):
                trace = poutine.trace(self).get_trace(phi, eta, more)
            # of an auxiliary Gaussian only the very draw will do as theta: the density of a
            # transformed one is not read off
            draw = location(q) if isinstance(q, dist.Delta) else location(q) + 1.0
            if not torch.equal(cast("Tensor", trace.nodes[SITE]["value"]), draw):
                raise ValueError(
                    "the guide transforms an auxiliary draw into theta: sample theta itself instead"
                )
            moved = self.distribution(
                {name: _first_moved(value) for name, value in phi.items()}, eta, more
            )
            pairs = [(location(q), location(moved)), (scale(q), scale(moved))]
            if any(
                a is not None and b is not None and not torch.equal(a[1:], b[1:]) for a, b in pairs
            ):
                raise ValueError(
                    "the guide mixes the tasks: another task's theta moved with the first task's "
                    "parameters"
                )


def _rows_of(module: torch.nn.Module) -> Tree:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def _first_moved(value: Tensor) -> Tensor:
    return torch.cat([value[:1] + 0.5, value[1:]])
