"""Each task left out of a regression whose evidence is known: fits to all others.

A task is a triangle (`ReducedTasks`), so that what all others say is a sum less one summand, and no
row is looked at again.  Newton steps from the fit to all tasks find most of these fits together;
of a task that is unlike the others, the fit to the others begins anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.fitting.profiled_evidence import OneTask, ProfiledEvidence, Sums
from varmeta.fitting.without_one import OFF, OFF_SHARE, refitted_without
from varmeta.numerics.curvature import Curvature
from varmeta.numerics.rows import rowwise
from varmeta.numerics.tree import named_parts

# Numbers of one tensor that are held at once, and of all second derivatives at most.
CELLS, MOST = 1_000_000, 1_000_000_000
# Up to so many tasks each fit begins anew: without one of them the evidence may look different.
FEW = 20
# Steps with a Hessian that is not formed anew.
SHARED_STEPS = 8
# A step with the exact Hessian leaves so many times the square of what it promises, at most.
CUBIC = 3.0
# What the others may have of what all tasks know, for a difference of the two to keep digits.
ENOUGH = 1e-6


def refitted(objective: ProfiledEvidence, best: Mapping[str, Tensor]) -> Tensor | None:
    """log p(y_i | eta) of every task at the eta of a fit to all others, `(T,)`, nats.

    best: the coordinates of the fit to all.

    NaN where the others have no maximum of their evidence; None for so many tasks with so many
    weights that their second derivatives are too many.
    """
    triangles = objective.tasks.triangles
    numbers = sum(value.numel() for value in best.values())
    if max(1, numbers) ** 2 * triangles.numel() * objective.size > MOST:
        return None
    with torch.no_grad():
        few = len(triangles) <= FEW
        found = (
            triangles.new_full((len(triangles),), math.nan) if few else _together(objective, best)
        )
        for number in found.isnan().nonzero()[:, 0].tolist():
            found[number] = refitted_without(objective, best, number)
    return found


class _LeftOut:
    """Of one task: the others' loss, and its log evidence at their best places, as functions of the
    vector of coordinates.
    """

    def __init__(self, objective: ProfiledEvidence, like: Mapping[str, Tensor]) -> None:
        self.objective, self.like = objective, like

    def _split(self, vector: Tensor, task: OneTask) -> tuple[dict[str, Tensor], Sums, Sums]:
        point = named_parts(vector, self.like)
        own = self.objective.of_one(point, task)
        return point, own, self.objective.sums(point).without(own)

    def loss(self, vector: Tensor, *task: Tensor) -> Tensor:
        point, _, others = self._split(vector, OneTask(*task))
        loss = self.objective.loss(point, others)
        return loss + self.objective.penalty(point) if self.objective.has_hyperprior else loss

    def value(self, vector: Tensor, *task: Tensor) -> Tensor:
        point, own, others = self._split(vector, OneTask(*task))
        at = self.objective.white_places(point, others)
        known = self.objective.determines(others, self.objective.sums(point), ENOUGH)
        return torch.where(known, self.objective.log_evidence(point, own, at), math.nan)


def _together(objective: ProfiledEvidence, best: Mapping[str, Tensor]) -> Tensor:
    """NaN of the tasks whose fit must begin anew."""
    tasks, fn = objective.tasks, _LeftOut(objective, best)
    each = (tasks.triangles, tasks.counts, tasks.log_weights)
    start = torch.cat([tasks.origin.new_zeros(0), *(x.reshape(-1) for x in best.values())])
    vectors, sound = start.expand(len(tasks.counts), -1), torch.ones(len(tasks.counts)).bool()
    step = max(1, CELLS // max(1, tasks.triangles.numel()))

    def in_parts(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        parts = zip(*(x.split(step) for x in arguments), strict=True)
        return torch.cat([function(*part) for part in parts])

    if len(start):
        gradients = torch.func.vmap(torch.func.grad(fn.loss))
        at_start = _Start.of(fn, start, each)
        vectors, sound = at_start.steps(start, lambda *some: in_parts(gradients, *some), each)
    values = in_parts(rowwise(fn.value), vectors, *each)
    return torch.where(sound, values, math.nan)


class _Start(NamedTuple):
    """What is known where all tasks' fit is, with each task left out.

    gradient `(T, p)` and curvature of the others' loss.  within: what the task's log evidence may
    be off.
    """

    gradient: Tensor
    curvature: Curvature
    slope: Tensor
    within: Tensor

    @classmethod
    def of(cls, fn: _LeftOut, start: Tensor, each: tuple[Tensor, ...]) -> _Start:
        # forward mode, whose derivatives of what all tasks say serve every task
        by_task, width = (None, *(0 for _ in each)), each[0].numel() * each[0].shape[-1]
        chunk = max(1, 5 * CELLS // max(1, len(start) * width))
        first = torch.func.jacfwd(fn.loss)
        gradient = torch.func.vmap(first, by_task)(start, *each)

        def second(vector: Tensor, *task: Tensor) -> Tensor:
            def along(direction: Tensor) -> Tensor:
                at = lambda vector: first(vector, *task)  # noqa: E731
                column: Tensor = torch.func.jvp(at, (vector,), (direction,))[1]
                return column

            return torch.func.vmap(along, chunk_size=chunk)(torch.eye(len(vector)).to(vector))

        hessian = torch.func.vmap(second, by_task)(start, *each)
        slope = torch.func.vmap(torch.func.jacfwd(fn.value), by_task)(start, *each)
        value = torch.func.vmap(fn.value, by_task)(start, *each)
        return cls(gradient, Curvature.of(hessian), slope, OFF + OFF_SHARE * value.abs())

    def steps(
        self, start: Tensor, gradients: Callable[..., Tensor], each: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """The vectors `(T, p)` at which the loss without each task is least, and which are so."""
        found = start.expand(len(self.within), -1).clone()
        sound = torch.zeros(len(found), dtype=torch.bool)
        spread = self.curvature.spread(self.slope)
        is_open = self.curvature.definite & spread.isfinite()
        last, gradient = torch.full_like(spread, math.inf), self.gradient.clone()
        for number in range(SHARED_STEPS):
            move = self.curvature.solve(gradient)
            promised = 0.5 * (gradient * move).sum(-1)
            is_open = is_open & (promised <= last)  # what grows is no way to the minimum
            found = torch.where(is_open.unsqueeze(-1), found - move, found)
            last = promised
            # after a step with the exact Hessian; else that no step was more than this
            off = CUBIC * promised if number == 0 else (2.0 * promised).sqrt()
            sound |= is_open & (off * spread <= self.within)
            is_open = is_open & ~sound
            if not bool(is_open.any()):
                break
            gradient[is_open] = gradients(found[is_open], *(x[is_open] for x in each))
        return found, sound
