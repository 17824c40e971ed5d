"""One meta-gradient with its certificate: d/d eta of a strategy's outer objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta._checks import counted, nearest
from varmeta.display.shown import ROWS, Shown
from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import Compile, Step, check_compile
from varmeta.models.check import check_model
from varmeta.models.model import TaskModel
from varmeta.numerics.adjoint import gradient_by_name
from varmeta.strategies.certificate import Certificate
from varmeta.strategies.check import check_kinds, check_strategy
from varmeta.strategies.inner_rates import initial_eta
from varmeta.strategies.own_parts import no_state
from varmeta.strategies.stochastic import Stochastic
from varmeta.strategies.strategy import State, Strategy
from varmeta.strategies.warnings import certificate, warning
from varmeta.tasks import TaskSet

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class MetaGradient(Shown):
    """value: sum_i G_i in nats, and -log hyperprior where there is one.

    grads: d value / d eta by name: theta0 and shared parameters by parameter name, then
        "log_precision...", "log_scale", and learned rates of inner steps, "inner_lr...".
    certificate: for `Implicit`, what the gradient rests on; else None.
    moving, selecting: of a `Stochastic` strategy, the two parts of grads by name: how each minimum
        moves, and how the probability of reaching it changes; else None.

    grads, moving and selecting have eta's shapes, `(*shape,)`, in nats per unit of eta.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> found = meta_gradient(model, tasks, vm.Implicit("delta", "query"))
    >>> found.frame().index.tolist()
    ['intercept', 'x', 'log_scale']
    """

    value: float
    grads: dict[str, Tensor]
    certificate: Certificate | None
    moving: dict[str, Tensor] | None = None
    selecting: dict[str, Tensor] | None = None

    def frame(self) -> pd.DataFrame:
        """One row for every tensor of eta, by its name.

        Columns: shape; numbers, how many; norm, |d value / d eta|, and largest, the size of its
        largest entry, both in nats per unit of eta.
        """
        import pandas as pd

        columns = {
            "shape": [str(tuple(g.shape)) for g in self.grads.values()],
            "numbers": [g.numel() for g in self.grads.values()],
            "norm": [float(g.norm()) for g in self.grads.values()],
            "largest": [float(g.abs().max()) for g in self.grads.values()],
        }
        return pd.DataFrame(columns, index=pd.Index(list(self.grads), name="name"))

    def _headline(self) -> str:
        said = "" if self.certificate is None else f"\n{self.certificate}"
        return f"{self!r}{said}"

    def __repr__(self) -> str:
        norm = math.sqrt(sum(float(g.square().sum()) for g in self.grads.values()))
        of = counted(sum(g.numel() for g in self.grads.values()), "number")
        known = "" if self.certificate is None else f", {self.certificate!r}"
        return f"<MetaGradient: value {self.value:.6g} nats, |gradient| {norm:.4g} of {of}{known}>"

    def __str__(self) -> str:
        rows = [f"{name:24s} |gradient| = {float(g.norm()):.6g}" for name, g in self.grads.items()]
        more = [f"... and {len(rows) - ROWS} more"] if len(rows) > ROWS else []
        tail = [] if self.certificate is None else [str(self.certificate)]
        return "\n".join([f"value {self.value:.6g}", *rows[:ROWS], *more, *tail])


def meta_gradient(
    model: TaskModel,
    tasks: TaskSet,
    strategy: Strategy,
    seed: int = 0,
    eta: Mapping[str, Tensor] | None = None,
    *,
    compile: Compile = "auto",
    task_chunk_size: int | None = None,
) -> MetaGradient:
    """The gradient of `strategy`'s outer objective, summed over all tasks, at eta.

    By default where the model starts.

    compile: True captures and compiles it, for those who ask for many; "auto" and False do not,
        since one gradient is not worth it.  The graphs are kept with the model.
    task_chunk_size: as in `fit`.

    Raises ValueError for tasks or an eta that do not fit the model, TypeError for arguments of the
    wrong kind, RuntimeError for an uncertified implicit gradient under `on_unconverged="raise"`.

    >>> import varmeta as vm
    >>> net = torch.nn.Linear(1, 1).double()
    >>> model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(2.0))
    >>> tasks = vm.datasets.lines(5, num_query=5)
    >>> result = vm.meta_gradient(model, tasks, vm.Implicit(outer="query"))
    >>> sorted(result.grads), result.certificate.ok
    (['bias', 'log_scale', 'weight'], True)

    eta: by name, in the shapes of the gradients, `(*shape,)`.
    """
    check_kinds(model, tasks, strategy)
    check_compile(compile)
    check_model(model, tasks)
    problem = strategy.problem(model, tasks, seed)
    traits = check_strategy(strategy, problem, tasks, for_fit=False)
    chunks.check(task_chunk_size, problem)
    batch = tasks.batch()
    start = initial_eta(strategy, model, batch.support.like)
    if eta is not None:
        if set(eta) != set(start):
            raise ValueError(
                f"eta must have the names {sorted(start)}, not {sorted(eta)}"
                f"{nearest(sorted(set(eta) - set(start)), set(start) - set(eta))}"
            )
        given = {
            name: torch.as_tensor(eta[name]).detach().to(value) for name, value in start.items()
        }
        wrong = [name for name, value in start.items() if given[name].shape != value.shape]
        if wrong:
            raise ValueError(
                f"eta[{wrong[0]!r}] has shape {tuple(given[wrong[0]].shape)}, expected "
                f"{tuple(start[wrong[0]].shape)}"
            )
        lost = [name for name, value in given.items() if not bool(torch.isfinite(value).all())]
        if lost:
            raise ValueError(
                f"eta[{lost[0]!r}] is not finite: a gradient is taken at finite numbers, such as "
                "those of fit.eta"
            )
        start = given
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    state = strategy.init(problem, batch, leaves)
    if not isinstance(state, State):
        raise no_state(state, strategy)
    state = replace(state, certify=True)
    scalar, found, _, stats = Step(strategy, compile, 1, task_chunk_size)(
        problem, batch, leaves, state
    )
    doubt = warning(traits, batch, stats)
    if doubt is not None:
        warnings.warn(doubt[1], RuntimeWarning, stacklevel=2)
    grads = {name: found[name] for name in leaves}
    moving = (
        strategy.moving(problem, batch, leaves, state, stats)
        if isinstance(strategy, Stochastic)
        else None
    )
    value, rests_on = float(scalar), certificate(batch, stats)
    if moving is None:
        return MetaGradient(value, grads, rests_on)
    part = gradient_by_name(moving, leaves, leaves)
    return MetaGradient(
        value, grads, rests_on, part, {name: grads[name] - part[name] for name in grads}
    )
