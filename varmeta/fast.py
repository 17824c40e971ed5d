"""A strategy's step as one compiled graph: the same step, traced once through Pyro, autograd and the inner loop.

Everything that changes between steps is an input of the graph: eta, the rows of phi and of the inner minimiser's state, the
step size, the data of the batch, the noise.  So a graph serves every batch of its shapes, every seed, and adaptation too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from varmeta.numerics.capture import Captured, CaptureError, compile_cost
from varmeta.numerics.tree import put, take
from varmeta.problem import Problem
from varmeta.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch, Data

log = logging.getLogger("varmeta")
Loss = Callable[[Problem, Batch, Eta, State], tuple[Tensor, State, Stats]]
COMPILE = ("auto", True, False)
# "auto" compiles where the work ahead, at the speed of the first eager steps, is worth this many times what it costs: then
# a graph that brought nothing would cost a tenth.
WORTH = 10.0
EAGER_STEPS = 5


def check_compile(value: object) -> None:
    if value not in COMPILE:
        raise ValueError(f"compile must be 'auto', True or False, not {value!r}")


class FastLoss:
    """`strategy.loss` with the same contract, captured and compiled; eager for as long as that is the better choice.

    compile: True at once; False never; "auto" once the work that is left is worth it.
    steps_left: for "auto", how many steps the caller has before it, as far as it knows.

    Where a graph cannot be made it stays eager and says so once, in the log.
    """

    def __init__(self, strategy: Strategy, compile: str | bool = "auto") -> None:
        self.strategy = strategy
        self.mode = compile
        self.steps_left = 0.0
        self._step: _Step | None = None
        self._seconds: list[float] = []

    def __call__(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        if self._ready(problem):
            try:
                return self._fast(problem, batch, eta, state)
            except CaptureError as error:
                log.warning("this model runs without compilation: %s", error)
                self.mode = False
        begin = perf_counter()
        found = self.strategy.loss(problem, batch, eta, state)
        self._seconds.append(perf_counter() - begin)
        return found

    def _ready(self, problem: Problem) -> bool:
        if self.mode is False:
            return False
        if self._step is not None or self.mode is True:
            return True
        if len(self._seconds) < EAGER_STEPS:
            return False
        typical = sorted(self._seconds[-EAGER_STEPS:])[EAGER_STEPS // 2]
        return typical * self.steps_left > WORTH * compile_cost()

    def _fast(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        reason = self.strategy.not_captured(problem)
        if reason is not None:
            raise CaptureError(reason)
        rows = _rows(batch)
        names = {"elbo", self.strategy.outer}
        inputs = {
            "eta": {name: value.detach() for name, value in eta.items()},
            "learned": {name: value.new_zeros(0) for name, value in eta.items() if value.requires_grad},
            "phi": {} if state.phi is None else _some(state.phi, rows),
            "inner": {} if state.inner is None else _some(state.inner, rows),
            "lr_scale": torch.tensor(state.lr_scale, dtype=batch.support.x.dtype, device=batch.support.x.device),
            "support": (*batch.support.filled, batch.support.mask),
            "query": () if batch.query is None else (*batch.query.filled, batch.query.mask),
            "noise": problem.noises(sorted(names), batch, state.step),
        }
        if self._step is None:
            self._step = _step(self.strategy, problem, batch.total, state.certify)
        out = self._step.captured(inputs)
        new = replace(state, step=state.step + 1)
        if out["phi"]:
            assert state.phi is not None
            new = replace(new, phi=_back(state.phi, rows, out["phi"]))
        if out["inner"]:
            assert state.inner is not None
            new = replace(new, inner=_back(state.inner, rows, out["inner"]))
        total = _Given.apply(out["total"], list(out["grads"].values()), *(eta[name] for name in out["grads"]))
        return total, new, {**self._step.static, **out["stats"]}


def _step(strategy: Strategy, problem: Problem, total: int, certify: bool) -> _Step:
    """The step's graphs, kept with the model: another seed, fit or start of the same model captures nothing anew."""
    key = (strategy, problem.expectation, problem.model.prior, total, certify)
    graphs = problem.model.graphs
    if key not in graphs:
        graphs[key] = _Step(strategy, problem, total, certify)
    return cast("_Step", graphs[key])


class _Step:
    """The traced function: a strategy's loss and its gradient in eta, of nothing but tensors.

    static: the stats that are plain numbers, as the trace met them.
    """

    def __init__(self, strategy: Strategy, problem: Problem, total: int, certify: bool) -> None:
        self.strategy, self.problem, self.total, self.certify = strategy, problem, total, certify
        self.static: dict[str, Any] = {}
        self.captured = Captured(self._traced)

    def _traced(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        problem = replace(self.problem, given=inputs["noise"])
        support = _data(*inputs["support"])
        tasks = len(support)
        everyone = torch.arange(tasks, device=support.mask.device)
        query = _data(*inputs["query"]) if inputs["query"] else None
        # the batch as a set of its own: rows are taken and put back outside
        batch = Batch(support, query, everyone, ("",) * tasks, everyone, self.total)
        learned = inputs["learned"]
        with torch.enable_grad():
            eta = {n: v.detach().requires_grad_() if n in learned else v.detach() for n, v in inputs["eta"].items()}
            state = State(inputs["phi"] or None, inputs["inner"] or None, 0, inputs["lr_scale"], self.certify)
            scalar, new, stats = self.strategy.loss(problem, batch, eta, state)
            grads = torch.autograd.grad(
                scalar, [eta[name] for name in learned], allow_unused=True, materialize_grads=True
            )
        moving = {name: value for name, value in stats.items() if not isinstance(value, (int, float, str))}
        self.static.update({name: value for name, value in stats.items() if name not in moving})
        return {
            "total": scalar.detach(),
            "grads": dict(zip(learned, grads, strict=True)),
            "phi": {} if new.phi is None else new.phi,
            "inner": {} if new.inner is None else new.inner,
            "stats": moving,
        }


class _Given(torch.autograd.Function):
    """A value whose gradient with respect to eta is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *eta: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return (None, None, *(outputs[0] * gradient for gradient in ctx.gradients))


def _data(x: Tensor, y: Tensor, mask: Tensor) -> Data:
    data = Data(x, y, mask)
    data.__dict__["filled"] = (x, y)  # filled before it came in: where to is for the numbers to say
    return data


def _rows(batch: Batch) -> Tensor | None:
    """The rows of the stored state that belong to the batch; None for all of them, which need no copy."""
    return None if len(batch) == batch.total else batch.rows


def _some(tree: dict[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
    return tree if rows is None else take(tree, rows)


def _back(tree: dict[str, Tensor], rows: Tensor | None, new: dict[str, Tensor]) -> dict[str, Tensor]:
    return new if rows is None else put(tree, rows, new)
