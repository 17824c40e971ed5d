"""The Gaussian of eta where the tasks' evidence is known: nothing of the tasks is searched for.

M(eta) of `varmeta.hyper.family` is then -log p(y | eta), a function of eta alone, so that the bound
is one of (m, L) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from varmeta.fitting import profiled_at_eta
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.hyper.coordinates import Coordinates
from varmeta.hyper.gaussian import Gaussian, Nodes
from varmeta.hyper.known import known
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.joint import Step, minimize_single
from varmeta.numerics.joint_model import row
from varmeta.numerics.rows import rowwise
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import cast, detach
from varmeta.tasks import Batch

# Numbers of one tensor that are held at once.
CELLS = 200_000
# How wide a prior may be, see `profiled_at_eta.reach`, for products of rows to keep their digits.
FAR = 1e4

Evidence = Callable[[dict[str, Tensor]], Tensor]
"""log p(y | eta), nats."""


def log_evidence(objective: ProfiledEvidence, batch: Batch, eta: Mapping[str, Tensor]) -> Tensor:
    """log p(y | eta) of all tasks at each of K eta, `(K,)`, without derivatives."""
    step, number = max(1, CELLS // objective.tasks.triangles.numel()), len(next(iter(eta.values())))
    fn = rowwise(
        lambda one: torch.stack(
            [profiled_at_eta.log_evidence(objective, one), profiled_at_eta.reach(objective, one)]
        )
    )
    with torch.no_grad():
        parts = [
            fn({name: value[k : k + step] for name, value in eta.items()})
            for k in range(0, number, step)
        ]
        found, reach = torch.cat(parts).unbind(-1)
        lost = (~((reach < FAR) & found.isfinite())).nonzero()[:, 0]
        if len(lost):
            some = {name: value[lost] for name, value in eta.items()}
            found[lost] = known(objective.model, batch, some).log_evidence.sum(-1)
    return found


def fit_gaussian(
    objective: ProfiledEvidence,
    coordinates: Coordinates,
    start: Mapping[str, Tensor],
    free: Tensor,
    *,
    diagonal: bool = False,
    jacobian: bool = True,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    callback: Callable[[Step], object] | None = None,
) -> Gaussian:
    """See `varmeta.hyper.family.fit_gaussian`."""
    evidence = partial(profiled_at_eta.log_evidence, objective)

    def penalty(point: Mapping[str, Tensor]) -> Tensor:
        return -coordinates.log_density(point, jacobian)

    def loss(point: Mapping[str, Tensor]) -> Tensor:
        return penalty(point) - evidence(coordinates.eta(point))

    like = next(iter(start.values()))
    begin = cast(detach(coordinates.of(start)), torch.float64)
    mode = minimize_single(loss, begin, max_steps=max_steps)
    if mode.result in (Result.NON_FINITE, Result.DIVERGED):
        point = coordinates.vector(row(mode.phi))
        return Gaussian.lost(point, mode.result)
    # the mode of a density may lie far from its mass, even at an edge of its support, where the
    # start is the better place
    places = []
    for place in (row(mode.phi), begin):
        hessian = vector_hessian(
            lambda vector: loss(coordinates.named(vector)), coordinates.vector(place)
        )
        nodes = Nodes(coordinates, penalty, place, hessian.detach(), free, diagonal)
        places.append((nodes, *nodes.begin(partial(_value, evidence, nodes))))
    nodes, parameters, _ = min(places, key=lambda place: place[2])
    solution = minimize_single(
        lambda parameters: _bound(evidence, nodes, parameters),
        parameters,
        tolerance=tolerance,
        max_steps=max_steps,
        callback=callback,
    )
    found = nodes.gaussian(row(solution.phi), float(solution.stats["loss"][-1]), solution.result)
    return replace(found, mean=found.mean.to(like), factor=found.factor.to(like))


def _bound(evidence: Evidence, nodes: Nodes, parameters: Mapping[str, Tensor]) -> Tensor:
    return nodes.penalty(parameters) - rowwise(evidence)(nodes.eta(parameters)).mean()


def _value(evidence: Evidence, nodes: Nodes, parameters: Mapping[str, Tensor]) -> float:
    with torch.no_grad():
        return float(_bound(evidence, nodes, parameters)) - nodes.entropy
