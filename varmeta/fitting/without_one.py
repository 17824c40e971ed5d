"""A single task left out of a regression whose evidence is known: the others' fit begins anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from varmeta.fitting.profiled_evidence import OneTask, ProfiledEvidence
from varmeta.fitting.profiled_newton import minimum
from varmeta.numerics.curvature import Curvature
from varmeta.numerics.joint_model import row
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import named_parts

# What a value may be off: so many nats, and this share of it.
OFF, OFF_SHARE = 1e-4, 1e-7
# The standard error of a value, given how well the others know eta, over the value: more, and the
# others do not say what it is.
UNKNOWN = 30.0
# What is left of a sum of squares that rounding may make of none; of all tasks'.
ROUNDING = 1e-12


def refitted_without(objective: ProfiledEvidence, best: Mapping[str, Tensor], number: int) -> float:
    """log p(y_i | eta) of the task at `number`, by fits to the others from two starts, nats.

    Those are their own, and the fit to all.

    NaN where they have no maximum.
    """
    tasks = objective.tasks
    left = OneTask(tasks.triangles[number], tasks.counts[number], tasks.log_weights[number])
    keep = torch.arange(len(tasks.counts)) != number
    kept = replace(
        tasks,
        triangles=tasks.triangles[keep],
        counts=tasks.counts[keep],
        log_weights=tasks.log_weights[keep],
    )
    others = ProfiledEvidence(objective.model, kept, objective.eta, objective.linear)
    point: dict[str, Tensor] | None = {}
    if best:
        point = _lowest(others, [others.start, dict(best)])
    return math.nan if point is None else _value(others, left, point)


def _lowest(others: ProfiledEvidence, starts: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Where the loss is least, of searches from these starts; None where that search ran away."""
    found: list[tuple[float, dict[str, Tensor] | None]] = []
    for start in starts:
        if not bool(others(start).isfinite()):
            continue
        with torch.enable_grad():
            solution = minimum(others, start, tolerance=1e-12)
        ended = solution.result in (Result.CONVERGED, Result.STAGNATED)
        point = {name: value.detach() for name, value in row(solution.phi).items()}
        found.append((float(solution.stats["loss"][-1]), point if ended else None))
    return min(found, key=lambda one: one[0])[1] if found else None


def _value(others: ProfiledEvidence, left: OneTask, point: dict[str, Tensor]) -> float:
    """log p(y_i | eta) at the others' best; NaN where they do not determine it."""

    def loss(vector: Tensor) -> Tensor:
        return others(named_parts(vector, point))

    def value(vector: Tensor) -> Tensor:
        here = named_parts(vector, point)
        sums = others.sums(here)
        known = others.determines(sums, sums, ROUNDING)
        at = others.white_places(here, sums)
        return torch.where(
            known, others.log_evidence(here, others.of_one(here, left), at), math.nan
        )

    vector = torch.cat([left.triangle.new_zeros(0), *(x.reshape(-1) for x in point.values())])
    found = value(vector)
    if not len(vector) or not bool(found.isfinite()):
        return float(found)
    slope, gradient = (torch.func.jacrev(fn)(vector).unsqueeze(0) for fn in (value, loss))
    curvature = Curvature.of(torch.func.jacfwd(torch.func.jacrev(loss))(vector).unsqueeze(0))
    spread = curvature.spread(slope)
    promised = 0.5 * (gradient * curvature.solve(gradient)).sum(-1)
    size = 1.0 + found.abs()
    off = (2.0 * promised).sqrt() * spread
    sure = curvature.convex & (spread <= UNKNOWN * size) & (off <= OFF + OFF_SHARE * size)
    return float(found) if bool(sure) else math.nan
