"""Tasks by the chunk: memory does not grow with their number, and work stays in cache.

Given eta, tasks have nothing to do with each other, and their noise follows their names.  So values
and gradients of chunks add up, to rounding, to those of all tasks, and everything with a task axis
is put together again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.graphs.capture import CaptureError, graph_bytes
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.models.check import Counted
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree, take
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch, Data

# Bytes that a step or an adaptation may hold at once, of what grows with the number of tasks.  It
# is a constant, and nobody asks the machine, so that the last digits of a fit are the same
# everywhere.
MEMORY = 2**30
# Bytes of phi in a chunk of a compiled step, some dozen copies of which are at work at once
# (docs/speed.md).
CACHE = 2**21
# Where phi is stored, noisy objectives are reported as the mean over this many steps' draws.
VALUE_DRAWS = 32
# Bytes of the largest tensor that an operation of a network makes.  What is larger the C library
# takes from the system and gives back every time, which cost a step on images half of its time
# (docs/speed.md); below, memory that has been used is used again.
ALLOCATED = 2**25
# What a network computes on the way is kept for the way back, with gradients of the same size.
KEPT = 3
# What a gradient writes for each number that the network does on the way, and for each weight:
# within a factor of two what its traced graph says, of perceptrons and convolutions.
OUTPUTS, WEIGHTS = 4, 10
# Fewer numbers in all fit into MEMORY whatever is done with them, so nobody counts.
FEW = 10**6


class Outcome(NamedTuple):
    """What one step gives: the outer objective, and its gradient in eta by name.

    With them goes what `Strategy.loss` returns beside its scalar.
    """

    value: Tensor
    gradient: dict[str, Tensor]
    state: State
    stats: Stats


def check(size: object, problem: Problem) -> None:
    """Raise where `size` is no chunk size, or the guide's module is made for all tasks at once."""
    if size is None:
        return
    whole_number("task_chunk_size", size)
    if isinstance(problem.guide, PyroGuide):
        raise ValueError(
            "a guide of one's own makes its module for all tasks at once: leave task_chunk_size "
            "out, or use batch_size"
        )


def in_memory(strategy: Strategy, problem: Problem, batch: Batch, eta: Eta) -> int:
    """How many tasks at a time, so that about `MEMORY` is held."""
    size = problem.model.weights.size
    traits = strategy.traits(problem)
    if traits.closed_form:
        # the design of a task in float64, by output, its triangle, and what derivatives keep
        rows = batch.support.width
        rows += 1 if batch.query is None else batch.query.width
        outputs = max(1, math.prod(batch.support.y_shape))
        held = 64 * size * (outputs * rows + size) * traits.copies
        return max(1, min(len(batch), MEMORY // max(1, held)))
    if isinstance(problem.guide, PyroGuide):
        return len(batch)
    if problem.model.net is not None:
        return _in_memory_of_a_network(traits.memory, problem, batch, eta)
    numbers = size + batch.support.width * math.prod(batch.support.x_shape)
    if numbers * len(batch) < FEW:
        return len(batch)
    try:
        gradient = graph_bytes(problem.gradient_graph("inner", batch.part(0, 1), eta))
    except CaptureError:
        gradient = 64 * numbers * batch.support.like.element_size()
    return max(1, min(len(batch), MEMORY // (traits.memory * gradient)))


def _in_memory_of_a_network(gradients: int, problem: Problem, batch: Batch, eta: Eta) -> int:
    """From what it computes on the way for one task, and from how large its tensors are.

    gradients: in how many inner gradients' worth of memory a step finds room.
    """
    size, like, one = problem.model.weights.size, batch.support.like, batch.part(0, 1)
    own = batch.support.width * math.prod(batch.support.x_shape)
    counts = [
        _on_the_way(problem, data, one, eta)
        for data in (one.support, one.query)
        if data is not None
    ]
    run = sum(count.total for count in counts)
    if (size + own + run) * len(batch) < FEW:
        return len(batch)
    inner = _on_the_way(problem.ahead(one, eta), one.support, one, eta).total
    width = like.element_size()
    held = max(gradients * (OUTPUTS * inner + WEIGHTS * size), KEPT * run)
    most = [MEMORY // (width * held)]
    largest = max(count.largest for count in counts)
    if like.device.type == "cpu" and largest:
        most.append(ALLOCATED // (width * largest))
    return max(1, min(len(batch), *most))


def _on_the_way(problem: Problem, data: Data, one: Batch, eta: Eta) -> Counted:
    """What the network computes for the data of one task, at all points of the expectation."""
    model = problem.model
    theta = model.weights.flatten(eta).detach().reshape(1, 1, -1)
    points = 1 if problem.guide.at_mode else len(problem.noise("inner", one, 0))
    known = Counted()
    if data.width:
        x = data.filled[0]
        model.features(eta, x)  # are not counted where they are known
        with torch.no_grad(), known:
            model.output(theta, eta, x)
    known.total, known.largest = points * known.total, points * known.largest
    return known


def in_cache(strategy: Strategy, problem: Problem, batch: Batch, eta: Eta) -> int:
    """How many tasks at a time of a compiled step: about `CACHE`.

    If possible all chunks are alike, or two graphs are compiled.
    """
    like = batch.support.like
    own = batch.support.width * math.prod(batch.support.x_shape)
    if like.device.type != "cpu" or isinstance(problem.guide, PyroGuide):
        return len(batch)  # elsewhere large kernels are what is fast
    wanted = held = in_memory(strategy, problem, batch, eta)
    if not strategy.traits(problem).stored:
        wanted = min(held, CACHE // (like.element_size() * max(problem.model.weights.size, own)))
    elif wanted == len(
        batch
    ):  # a step that takes one gradient reads nothing often enough for a cache to matter
        return wanted
    if wanted == 0:
        return 1
    largest = min(2 * wanted, held)
    if len(batch) <= largest:
        return len(batch)
    alike = [size for size in range(wanted // 2 + 1, largest + 1) if len(batch) % size == 0]
    return min(alike, key=lambda size: abs(math.log(size / wanted)), default=wanted)


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Chunks of at most `size` tasks, as equal as they can be."""
    number = math.ceil(len(batch) / size)
    edges = [len(batch) * k // number for k in range(number + 1)]
    return (batch.part(begin, end) for begin, end in pairwise(edges))


class Piece(NamedTuple):
    """Some tasks of a batch, and where they stand in it, int64 `(n,)` or a slice."""

    positions: Tensor | slice
    batch: Batch


def pieces(
    problem: Problem, batch: Batch, size: int | Callable[[Batch], int], worth: int | None = None
) -> list[Piece]:
    """The batch in groups of alike size, each of these in chunks of at most `size` tasks.

    size: or a function of a group.  worth: see `by_size`.
    The batch as it is, where it is one of each, and where a guide of one's own makes its module for
    all tasks at once.
    """
    if isinstance(problem.guide, PyroGuide):
        return [Piece(slice(None), batch)]
    groups = batch.by_size(worth)
    found = []
    for positions, group in groups:
        most, begin = size(group) if callable(size) else size, 0
        if most >= len(group):
            found.append(Piece(slice(None) if len(groups) == 1 else positions, group))
            continue
        for part in split(group, most):
            here = slice(begin, begin + len(part))
            found.append(Piece(here if len(groups) == 1 else positions[here], part))
            begin += len(part)
    return found


def pieces_in_memory(
    strategy: Strategy, problem: Problem, batch: Batch, eta: Eta, size: int | None = None
) -> list[Piece]:
    """`pieces` of `size` tasks; None: of as many as memory holds."""
    return pieces(
        problem,
        batch,
        (lambda group: in_memory(strategy, problem, group, eta)) if size is None else size,
    )


def heaviest(cut: Sequence[Piece]) -> tuple[int, float]:
    """Which piece is most work, and how many times its work all of them are."""
    work = [len(part) * max(1, part.support.width) for _, part in cut]
    return work.index(max(work)), sum(work) / max(1, *work)


def in_place(parts: Sequence[Tensor], cut: Sequence[Piece], dim: int = 0) -> Tensor:
    """What was found for each piece, with a task axis `dim`, in the order of their batch."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.cat(list(parts), dim)
    back = _back(cut)
    return whole if back is None else whole.index_select(dim, back)


def _back(cut: Sequence[Piece]) -> Tensor | None:
    """Where each task of the batch stands among the pieces' one after another; None: in place."""
    if isinstance(cut[0].positions, slice):
        return None
    return torch.cat([p.positions for p in cut if isinstance(p.positions, Tensor)]).argsort()


def states(state: State, batch: Batch, cut: Sequence[Piece]) -> Iterator[State]:
    """The state for each piece: its rows of what is stored."""
    phi = None if state.phi is None else batch.of(state.phi)
    inner = None if state.inner is None else batch.of(state.inner)
    for positions, _ in cut:
        yield replace(
            state,
            phi=None if phi is None else take(phi, positions),
            inner=None if inner is None else take(inner, positions),
        )


def step(
    one: Callable[[Problem, Batch, Eta, State], Outcome],
    problem: Problem,
    batch: Batch,
    eta: Eta,
    state: State,
    cut: Sequence[Piece],
) -> Outcome:
    """`one` for each piece, put together."""
    if len(cut) == 1:
        return one(problem, cut[0].batch, eta, state)
    value: Any = 0.0
    gradient: dict[str, Tensor] = {}
    found: list[tuple[State, Stats]] = []
    for (_, part), own in zip(cut, states(state, batch, cut), strict=True):
        here = one(problem, part, eta, own)
        value = value + here.value
        gradient = {
            name: gradient[name] + g if gradient else g for name, g in here.gradient.items()
        }
        found.append((here.state, here.stats))
    after = replace(
        found[0][0],
        phi=_into(state.phi, batch, [own.phi for own, _ in found], cut),
        inner=_into(state.inner, batch, [own.inner for own, _ in found], cut),
    )
    return Outcome(value, gradient, after, _joined([stats for _, stats in found], cut))


def value(
    strategy: Strategy,
    problem: Problem,
    batch: Batch,
    eta: Eta,
    state: State,
    cut: Sequence[Piece] | None = None,
) -> float:
    """The outer objective at eta and the state, for the record (nats), piece by piece.

    Of a noisy one a mean over draws.  cut: the pieces; None: as `pieces` of all tasks at once.
    """
    known = {name: value.detach() for name, value in eta.items()}
    traits = strategy.traits(problem)
    if cut is None:
        cut = pieces(problem, batch, len(batch))

    def one(part: Batch, own: State) -> float:
        here = problem.ahead(part, known)
        if not traits.stored:
            return float(strategy.loss(here, part, known, replace(own, certify=False))[0].detach())
        assert own.phi is not None
        draws = VALUE_DRAWS if traits.noisy else 1
        with torch.no_grad():  # phi is given, so that neither a gradient nor a step is needed
            losses = [
                here.losses(strategy.outer, part, own.step + k)(own.phi, known)
                for k in range(draws)
            ]
            return float(strategy.total(problem, part, known, torch.stack(losses).mean(0)))

    if len(cut) == 1:
        return one(cut[0].batch, state)
    return math.fsum(map(one, [part for _, part in cut], states(state, batch, cut)))


def solution(one: Callable[[Batch], Solution], cut: Sequence[Piece]) -> Solution:
    """`one` for each piece, put together."""
    if len(cut) == 1:
        return one(cut[0].batch)
    found = [one(part) for _, part in cut]
    return Solution(*_joined([tuple(x) for x in found], cut))


def _into(
    stored: Tree | None, batch: Batch, rows: list[Tree | None], cut: Sequence[Piece]
) -> Tree | None:
    if stored is None:
        return None
    trees = [tree for tree in rows if tree is not None]
    return batch.into(stored, {n: in_place([tree[n] for tree in trees], cut) for n in stored})


def _joined(found: Sequence[Any], cut: Sequence[Piece]) -> Any:
    return joined(found, [len(part) for _, part in cut], _back(cut))


def joined(found: Sequence[Any], sizes: Sequence[int], back: Tensor | None = None) -> Any:
    """Of every piece the same tree of stats as one of all tasks.

    What has a task axis is put together, the others, means over tasks, are averaged.
    back: where each task stands among those of the pieces one after another; None: in place.
    """
    first = found[0]
    if first is None:
        return None

    def of(parts: Sequence[Any]) -> Any:
        return joined(parts, sizes, back)

    if isinstance(first, Stats):
        return Stats(**{f.name: of([getattr(x, f.name) for x in found]) for f in fields(Stats)})
    if isinstance(first, dict):
        return {key: of([x[key] for x in found]) for key in first}
    if isinstance(first, Solution):
        return Solution(*of([tuple(x) for x in found]))
    if isinstance(first, tuple):
        return tuple(of(x) for x in zip(*found, strict=True))
    if isinstance(first, Tensor) and first.dim():
        # draws of an algorithm stand one whole batch after another
        draws = len(first) // sizes[0]
        apart = [x.reshape(draws, size, *x.shape[1:]) for x, size in zip(found, sizes, strict=True)]
        whole = torch.cat(apart, 1)
        return (whole if back is None else whole.index_select(1, back)).flatten(0, 1)
    total = sum(sizes)
    return sum(x * (size / total) for x, size in zip(found, sizes, strict=True))
