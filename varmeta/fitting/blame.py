"""Which task's numbers ended a step: looked for when a step failed, at no other time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import eager
from varmeta.fitting.run import ADVICE, non_finite
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.tasks import Batch

# So many are looked for; one is named.
MOST = 8
# What rounding may take from the others (nats).
LOST = 0.01


def what_failed(
    strategy: Strategy,
    problem: Problem,
    batch: Batch,
    eta: Eta,
    state: State,
    losses: Tensor,
    when: str,
) -> str:
    """Name the task whose loss, else whose gradient, is not finite at eta, in a sentence.

    Where all are finite, the one whose loss is largest.
    """
    if not bool(torch.isfinite(losses).all()):
        return non_finite(batch, losses, when)
    detached = {name: value.detach() for name, value in eta.items()}
    if not math.isfinite(float(torch.as_tensor(problem.model.penalty(detached)))):
        return (
            f"the density of the hyperprior is not finite {when}: start elsewhere, with "
            "GaussianPrior(precision=...)"
        )
    bad = _tasks_without_gradient(strategy, problem, batch, eta, state)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        return f"the gradient of task {bad[0]!r}{more} is not finite {when}: {ADVICE}"
    begun = drowning_at_start(strategy, problem, batch, float(losses.abs().sum()))
    if begun is not None:  # by now all tasks may have been drawn after one
        return f"eta is not finite {when}: {begun}"
    return f"eta is not finite {when}, {largest(batch.names, losses)}: {ADVICE}"


def largest(names: Sequence[str], losses: Tensor) -> str:
    """Where no task's numbers fail by themselves: the one with most to say."""
    worst = int(losses.abs().nan_to_num(nan=math.inf).argmax())
    return (
        f"where the loss of task {names[worst]!r} is the largest ({float(losses[worst]):.1e} nats)"
    )


def drowning_at_start(
    strategy: Strategy, problem: Problem, batch: Batch, loss: float
) -> str | None:
    """Say the same of where the model starts, for a fit that ended at such a `loss`.

    By then all tasks may have been drawn after one.
    """
    if abs(loss) * torch.finfo(batch.support.like.dtype).eps <= LOST:  # NaN goes on
        return None
    eta = problem.model.init(batch.support.like)
    cut = chunks.pieces_in_memory(strategy, problem, batch, eta)
    with torch.no_grad():
        losses = [
            problem.losses(strategy.outer, part, 0)(problem.start(part, eta), eta)
            for _, part in cut
        ]
    return drowning(batch, chunks.in_place(losses, cut))


def drowning(batch: Batch, end: Tensor) -> str | None:
    """The task in the rounding of whose loss those of the others are lost, in a sentence.

    None where there is none.
    """
    return drowning_of(batch.names, rows_of(batch), end)


def rows_of(batch: Batch) -> Tensor:
    """How many rows each task has, support and query, int64 `(tasks,)`."""
    return batch.support.num_points + (0 if batch.query is None else batch.query.num_points)


def drowning_of(names: tuple[str, ...], rows: Tensor, end: Tensor) -> str | None:
    """The same of losses `(tasks,)` of as many rows."""
    size = end.detach().abs().double()
    if len(size) < 2 or not bool(torch.isfinite(size).all()):
        return None
    per_row = size / rows.clamp_min(1)
    worst = int(per_row.argmax())
    lost = float(size[worst]) * torch.finfo(end.dtype).eps > LOST
    if not lost or float(per_row[worst]) < 1e3 * (1.0 + float(per_row.median())):
        return None
    return (
        f"the loss of task {names[worst]!r} is {float(end[worst]):.1e} nats, in whose "
        "rounding the other tasks are lost: look at its data, or standardise them"
    )


def _tasks_without_gradient(
    strategy: Strategy, problem: Problem, batch: Batch, eta: Eta, state: State
) -> list[str]:
    """By halving: a part whose gradient is finite has no such task."""
    waiting, bad = [(batch, state)], list[str]()
    try:
        while waiting and len(bad) < MOST:
            part, own = waiting.pop()
            leaves = {name: value.detach().requires_grad_() for name, value in eta.items()}
            gradient = eager(strategy, problem, part, leaves, own).gradient
            if all(bool(torch.isfinite(value).all()) for value in gradient.values()):
                continue
            if len(part) == 1:
                bad.append(part.names[0])
                continue
            cut = chunks.pieces(problem, part, math.ceil(len(part) / 2))
            if len(cut) == 1:  # a guide of the user's own serves all tasks only
                return []
            states = chunks.states(own, part, cut)
            waiting += reversed([(p.batch, s) for p, s in zip(cut, states, strict=True)])
    except (RuntimeError, ValueError):  # a guide of the user's own may serve all tasks only
        return []
    return bad
