"""Float32 data judged in float64: flatness shows only beyond the digits of float32."""

from __future__ import annotations

from dataclasses import replace

import torch

from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.numerics.tree import Tree, cast
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch


def doubled(batch: Batch) -> Batch:
    """The batch in float64."""
    query = None if batch.query is None else batch.query.to(torch.float64)
    return replace(batch, support=batch.support.to(torch.float64), query=query)


def in_double(
    problem: Problem, batch: Batch, phi: Tree, eta: Eta
) -> tuple[Batch, Tree, Eta] | None:
    """The same problem in float64; None where it cannot be worked out there.

    A program, or a forward, may hold float32 tensors of its own that do not mix with float64; so
    may a guide of the user's own, and some devices know no float64.
    """
    if batch.support.like.dtype == torch.float64:
        return batch, phi, eta
    if isinstance(problem.guide, PyroGuide):
        return None
    try:
        wide = doubled(batch), cast(phi, torch.float64), cast(eta, torch.float64)
        with torch.no_grad():
            losses = elbo_losses(problem, wide[0])(wide[1], wide[2])
    except (RuntimeError, TypeError, ValueError):
        return None
    return wide if losses.dtype == torch.float64 and bool(losses.isfinite().all()) else None
