"""Guides q(theta; phi_i): a point or Gaussian per task, with phi as explicit arguments.

A guide is a Pyro program that samples the model's site `theta` under the plate `tasks`.  phi is a
tree with the task axis first, so that rows can be taken, put back and reset to the prior.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from varmeta.graphs.process import ALONE
from varmeta.guides.kl import has_closed_form, location, require_closed_form
from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import SITE, TASKS
from varmeta.numerics.tree import Tree
from varmeta.tasks import Data


class Guide(ABC):
    """q(theta; phi_i), one factor per task.

    phi is a tree of tensors `(tasks, ...)`; theta is `(tasks, 1, D)`.  A whole one stands in
    docs/extend.md.

    >>> import varmeta as vm
    >>> isinstance(vm.guides.Dense(), Guide), vm.guides.Dense().is_any_gaussian(3)
    (True, True)
    """

    name = "guide"

    @property
    def key(self) -> Hashable:
        """Equal for guides that make the same distribution of the same phi."""
        return type(self)

    # phi is a mode, and "elbo" means Laplace's evidence there instead of F_i
    at_mode = False
    # whether q is a point, of every phi; None: its distribution tells
    is_point: ClassVar[bool | None] = None
    # phi is {"loc": (tasks, D)} alone, at a Gaussian its mean
    phi_is_loc = False

    def bound(self, model: TaskModel) -> Guide:
        """The guide as it serves this model; the same one where it does not look at the model.

        Raises ValueError where the guide does not suit the model.
        """
        return self

    def at_gaussian(self, loc: Tensor, factor: Tensor) -> Tree | None:
        """phi where KL[q || N(loc_i, L_i L_i')] is least; None where that is not known.

        loc `(tasks, D)`, factor L `(tasks, D, D)`, lower triangular.
        """
        return None

    def is_any_gaussian(self, size: int) -> bool:
        """Whether the family has every Gaussian over `size` weights."""
        return False

    def doubt(
        self, phi: Tree, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]
    ) -> str | None:
        """What should make one doubt these posteriors of the tasks called `names`.

        phi: `(tasks, ...)` each.
        """
        return None

    @abstractmethod
    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        """phi at the prior: q = p(theta | eta), or its mean.

        Differentiable in eta (what MAML goes through), and sharing no memory with it.

        eta: by name, without an axis of tasks.  Returns phi, `(tasks, ...)` each.
        """

    @abstractmethod
    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        """The Pyro program: samples `theta`, batch shape `(tasks, 1)` and event shape `(D,)`, under
        the plate `tasks`.
        """

    def distribution(
        self, phi: Tree, eta: Mapping[str, Tensor], data: Data
    ) -> dist.TorchDistribution:
        """q(theta; phi), read off the program's trace: a Delta, Normal or MultivariateNormal.

        Raises ValueError where the program samples anything but one theta per task.

        Its batch shape is `(tasks, 1)`, its event shape `(D,)`.
        """
        with ALONE, pyro.settings.context(module_local_params=True), _AtLocation():
            trace = poutine.trace(self).get_trace(phi, eta, data)
        sites: dict[str, Any] = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        if SITE not in sites:
            raise ValueError(f"the guide must sample the site {SITE!r}; it samples {sorted(sites)}")
        random = [site for site in sites.values() if not isinstance(site["fn"], dist.Delta)]
        if len(random) > 1:
            raise ValueError(
                f"the guide must have one random site per task, theta; it has {sorted(sites)}"
            )
        # AutoNormal draws an auxiliary Gaussian and hands it on as a Delta; theta is real, so that
        # Gaussian is q
        q: dist.TorchDistribution = random[0]["fn"] if random else sites[SITE]["fn"]
        require_closed_form(q)
        if q.batch_shape != (len(data), 1) or len(q.event_shape) != 1:
            raise ValueError(
                f"the guide's theta has batch shape {tuple(q.batch_shape)} and event shape "
                f"{tuple(q.event_shape)}: expected ({len(data)}, 1), one row for each task, and "
                "(D,), as from Normal(...).to_event(1)"
            )
        return q

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class BoundGuide(Guide):
    """A guide that looks at its model: what `bound` returns is the one that can be run."""

    _model: TaskModel | None = field(default=None, init=False, compare=False)

    def bound(self, model: TaskModel) -> Self:
        new = copy.copy(self)
        object.__setattr__(new, "_model", model)  # frozen, but this one has just been made
        return new

    @property
    def key(self) -> Hashable:
        return self  # with its options

    @property
    def model(self) -> TaskModel:
        if self._model is None:
            raise RuntimeError(
                f"the guide {self.name!r} must be bound to a model first: guide.bound(model)"
            )
        return self._model


class _AtLocation(Messenger):
    """Let Gaussian sites take their location (plus `offset`) as value: q is read off, so no random
    number is drawn.
    """

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg) and has_closed_form(msg["fn"]):
            at = location(msg["fn"])
            msg["value"] = (
                at + self.offset if self.offset and not isinstance(msg["fn"], dist.Delta) else at
            )


def sample(q: dist.TorchDistribution) -> Tensor:
    with pyro.plate(TASKS, q.batch_shape[0], dim=-2):
        return pyro.sample(SITE, q)


def copies(row: Tensor, data: Data) -> Tensor:
    # clone: an expanded view would share memory with theta0, and a step on a guide would move the
    # prior
    return row.expand(len(data), *row.shape).clone()
