"""A strategy's step by compiled graphs.

It is the same step, traced once through Pyro, autograd and the inner loop.

As one graph where its loops have a fixed, small number of steps.  Everything that changes between
steps is then an input: eta, the rows of phi and of the inner minimiser's state, the step size, the
data of the batch, and the address (seed, step, tasks) from which the noise is made.  So one graph
serves every batch of its shapes and every seed.

Else in pieces (`graphs/pieces.py`): a loop that goes to a tolerance, or on for long, stays in
Python, and its body is a graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields, replace
from itertools import islice
from types import NoneType
from typing import Any, Literal, cast, get_args

import torch

from varmeta._checks import one_of
from varmeta.fitting import chunks
from varmeta.fitting.chunks import Outcome
from varmeta.fitting.worth import is_worth_it, may_be_worth_it
from varmeta.graphs.capture import Captured, CaptureError
from varmeta.numerics.adjoint import gradient_by_name
from varmeta.strategies.own_parts import checked_outcome
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch
from varmeta.tasks.tensors import batch_of, tensors_of

log = logging.getLogger("varmeta")


Compile = Literal["auto", True, False]
COMPILE: tuple[Compile, ...] = get_args(Compile)
# Shapes of a step's tasks for which graphs are made; a stream's may be different every time.
MAX_SHAPES = 4
# Rows of padding that one more graph is worth, whose compilation takes seconds.
GRAPH_WORTH = 200_000
# Sizes of chunks that are remembered, by the shape of a group of tasks.
REMEMBERED = 256


def check_compile(value: object) -> None:
    one_of("compile", value, COMPILE)


class Step:
    """A strategy's loss with its gradient: `step(problem, batch, eta, state) -> Outcome`.

    compile: capture and compile it: True, False, or "auto", where `num_steps` are enough work.
    num_steps: for "auto", the length of the whole run, not of what is left: a run that is resumed
        decides alike.
    task_chunk_size: how many tasks are worked on at a time; None: as many as memory, or for a
        compiled step the cache, holds.

    Where a graph cannot be made it stays eager and says so once, in the log.
    """

    def __init__(
        self,
        strategy: Strategy,
        compile: Compile,
        num_steps: float,
        task_chunk_size: int | None = None,
    ) -> None:
        self.strategy = strategy
        self.num_steps = num_steps
        auto = compile == "auto"
        # None: not yet decided
        self.compiled: bool | None = None if auto else bool(compile)
        self.given_size = task_chunk_size
        self._sizes = dict[tuple[Any, ...], int]()
        self._said = self._full = False
        self._shapes = set[tuple[Any, ...]]()

    def __call__(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> Outcome:
        if self.compiled is None:
            self.compiled = self._is_worth_compiling(problem, batch, eta, state)
        cut = self._pieces(problem, batch, eta, self.compiled)
        return chunks.step(self._one, problem, batch, eta, state, cut)

    def value(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> float:
        """The outer objective at eta and the state, for the record (nats)."""
        cut = self._pieces(problem, batch, eta, bool(self.compiled))
        return chunks.value(self.strategy, problem, batch, eta, state, cut)

    def _pieces(
        self, problem: Problem, batch: Batch, eta: Eta, compiled: bool
    ) -> list[chunks.Piece]:
        """Groups of alike size, of which a compiled step makes fewer, in chunks."""
        if not compiled:
            return chunks.pieces(problem, batch, lambda group: self._size(problem, group, eta))
        as_graph = self.strategy.traits(problem).not_captured is None
        return chunks.pieces(
            problem,
            batch.widened(),
            lambda group: self._size(problem, group, eta, as_graph),
            GRAPH_WORTH,
        )

    def _size(self, problem: Problem, group: Batch, eta: Eta, as_graph: bool = False) -> int:
        """How many of a group's tasks are worked on at a time."""
        if self.given_size is not None:
            return self.given_size
        query = None if group.query is None else group.query.width
        key = as_graph, len(group), group.support.width, query
        if key not in self._sizes:
            if len(self._sizes) >= REMEMBERED:
                self._sizes.clear()
            find = chunks.in_cache if as_graph else chunks.in_memory
            self._sizes[key] = find(self.strategy, problem, group, eta)
        return self._sizes[key]

    def _one(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> Outcome:
        if self.compiled and not self._has_graphs_for(batch):
            return eager(self.strategy, problem, batch, eta, state)
        try:
            if self.compiled and self.strategy.traits(problem).not_captured is None:
                found = self._prepared(problem, batch, state)(problem.seed, batch, eta, state)
                if math.isfinite(found.value):
                    return found
                # a graph's inner loop does not stop a task that leads nowhere finite; the eager one
                # does
                self._say_that_it_is_not_finite()
                return eager(self.strategy, problem, batch, eta, state)
            if self.compiled and self._in_pieces(problem):
                return eager(self.strategy, replace(problem, graphed=True), batch, eta, state)
        except CaptureError as error:
            self._fall_back(error)
        return eager(self.strategy, problem, batch, eta, state)

    def _has_graphs_for(self, batch: Batch) -> bool:
        """Whether tasks of this shape were met before, or there is room for theirs."""
        query = None if batch.query is None else batch.query.width
        shape = len(batch), batch.support.width, query
        if shape in self._shapes:
            return True
        if len(self._shapes) < MAX_SHAPES:
            self._shapes.add(shape)
            return True
        if not self._full:
            log.warning(
                "the steps' tasks come in more than %d shapes: others run without compilation",
                MAX_SHAPES,
            )
        self._full = True
        return False

    def _is_worth_compiling(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> bool:
        if not may_be_worth_it(problem, batch, self.num_steps):
            return False
        cut = self._pieces(problem, batch, eta, compiled=True)
        number, times = chunks.heaviest(cut)
        own = next(islice(chunks.states(state, batch, cut), number, None))
        try:
            return self._worth_it(problem, cut[number].batch, eta, own, times)
        except CaptureError as error:
            self._fall_back(error)
            return False

    def _worth_it(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, times: float
    ) -> bool:
        """times: how many such batches make a step."""
        if self.strategy.traits(problem).not_captured is None:
            graph = self._prepared(problem, batch, state).traced(problem.seed, batch, eta, state)
            return is_worth_it(graph, times * self.num_steps)
        return self._in_pieces(problem) and is_worth_it(
            problem.gradient_graph("elbo", batch, eta), times * self.num_steps, in_pieces=True
        )

    def _fall_back(self, error: CaptureError) -> None:
        fall_back(str(error))
        self.compiled = False

    def _say_that_it_is_not_finite(self) -> None:
        if not self._said:
            log.warning(
                "the compiled step is not finite: such steps are taken again without compilation"
            )
        self._said = True

    def _in_pieces(self, problem: Problem) -> bool:
        reason = self.strategy.traits(problem).not_in_pieces
        if reason is not None and self.compiled:
            raise CaptureError(reason)
        return reason is None

    def _prepared(self, problem: Problem, batch: Batch, state: State) -> _Graph:
        """The step's graphs, kept with the model: another seed, fit or start of the same model
        captures nothing anew.
        """
        key = (
            self.strategy,
            problem.expectation,
            problem.model.prior,
            batch.total,
            batch.share,
            batch.support.widest,
            state.certify,
        )
        graphs = problem.model.graphs
        if key not in graphs:
            graphs[key] = _Graph(self.strategy, problem, batch, state.certify)
        return cast("_Graph", graphs[key])


def fall_back(reason: str) -> None:
    log.warning("this model runs without compilation: %s", reason)


def eager(strategy: Strategy, problem: Problem, batch: Batch, eta: Eta, state: State) -> Outcome:
    if not problem.graphed:  # a piece's graph takes the data anew
        problem = problem.ahead(batch, eta)
    found = strategy.loss(problem, batch, eta, state)
    scalar, state, stats = checked_outcome(found, strategy)
    learned = [name for name, value in eta.items() if value.requires_grad]
    return Outcome(scalar.detach(), gradient_by_name(scalar, eta, learned), state, stats)


@dataclass
class _Graph:
    """The traced step, of nothing but tensors."""

    strategy: Strategy
    problem: Problem
    like: InitVar[Batch]
    certify: bool | None

    def __post_init__(self, like: Batch) -> None:
        self.total, self.share, self.widest = like.total, like.share, like.support.widest
        self.static: dict[str, Any] = {}  # the stats that are plain numbers, as the trace met them
        self.captured = Captured(self._traced)

    def __call__(self, seed: int, batch: Batch, eta: Eta, state: State) -> Outcome:
        out = self.captured(_inputs(seed, batch, eta, state))
        new = replace(state, step=state.step + 1)
        if out["phi"]:
            assert state.phi is not None
            new = replace(new, phi=batch.into(state.phi, out["phi"]))
        if out["inner"]:
            assert state.inner is not None
            new = replace(new, inner=batch.into(state.inner, out["inner"]))
        return Outcome(out["value"], out["gradient"], new, Stats(**self.static, **out["stats"]))

    def traced(self, seed: int, batch: Batch, eta: Eta, state: State) -> Any:
        return self.captured.traced(_inputs(seed, batch, eta, state)).graph

    def _traced(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        problem = replace(self.problem, seed=inputs["seed"], graphed=False)
        batch = batch_of(
            inputs["batch"], self.total, self.share, self.widest
        )  # rows are taken and put back outside
        learned = inputs["learned"]
        with torch.enable_grad():
            eta = {
                n: v.detach().requires_grad_() if n in learned else v.detach()
                for n, v in inputs["eta"].items()
            }
            state = State(
                inputs["phi"] or None,
                inputs["inner"] or None,
                inputs["step"],
                inputs["lr_scale"],
                self.certify,
            )
            value, gradient, new, stats = eager(self.strategy, problem, batch, eta, state)
        known = {f.name: getattr(stats, f.name) for f in fields(Stats)}
        moving = {
            name: value
            for name, value in known.items()
            if not isinstance(value, (int, float, NoneType))
        }
        self.static.update({name: value for name, value in known.items() if name not in moving})
        return {
            "value": value,
            "gradient": gradient,
            "phi": new.phi or {},
            "inner": new.inner or {},
            "stats": moving,
        }


def _inputs(seed: int, batch: Batch, eta: Eta, state: State) -> dict[str, Any]:
    like = batch.support.mask
    return {
        "eta": {name: value.detach() for name, value in eta.items()},
        "learned": {name: () for name, value in eta.items() if value.requires_grad},  # names alone
        "phi": {} if state.phi is None else batch.of(state.phi),
        "inner": {} if state.inner is None else batch.of(state.inner),
        "lr_scale": torch.tensor(
            state.lr_scale, dtype=batch.support.like.dtype, device=like.device
        ),
        "seed": torch.tensor(_signed(seed), device=like.device),
        "step": torch.tensor(state.step, device=like.device),
        "batch": tensors_of(batch),
    }


def _signed(value: int) -> int:
    """The 64 low bits of an integer as int64 reads them."""
    return (value + 2**63) % 2**64 - 2**63
