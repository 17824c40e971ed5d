"""When a run of steps has come to its end: by a flat record, or by its last third."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from varmeta.fitting.run import Run

# A run has settled when its mean objective changed by no more than this over its last third (nats
# per task), or than chance makes of it; how far that is must be below RESOLVED, or nothing is
# known.
SETTLED = 0.01
RESOLVED = 0.05
# Where more than this share of the steps raise the objective, larger ones are not what it lacks.
UNEVEN = 0.3
# A run whose mean objective ends this far above where it began diverges (nats per task).
RISEN = 1.0


def settled(history: list[dict[str, float]], window: int, tolerance: float = 1e-10) -> bool:
    """Whether the last `window` losses are equal up to rounding."""
    losses = [row["loss"] for row in history[-window:]]
    return len(losses) == window and max(losses) - min(losses) <= tolerance * max(
        1.0, abs(losses[-1])
    )


def promised(optimizer: torch.optim.Optimizer) -> float:
    """By how much L-BFGS's last direction promised to lower the objective.

    That is, were the objective the quadratic that it took it for.
    """
    state = next(iter(optimizer.state.values()))
    return -0.5 * float(state["prev_flat_grad"] @ state["d"])


def risen(history: list[dict[str, float]], num_tasks: int) -> float:
    """How far the mean loss of the last tenth of the steps lies above that of the first (nats).

    0 where it does not, or by no more than chance or `RISEN` makes of it.  Infinite where it is
    beyond all numbers.
    """
    losses = torch.tensor([row["loss"] for row in history], dtype=torch.float64)
    tenth = len(losses) // 10
    if len(losses) < _enough(1):
        return 0.0
    first, last = losses[:tenth], losses[-tenth:]
    rise = (last.mean() - first.mean()).nan_to_num(nan=math.inf)
    # what minibatches make of it
    chance = 3.0 * float(first.std(correction=0))
    return float(rise) if float(rise) > max(RISEN * num_tasks, chance) else 0.0


def judge(run: Run, num_tasks: int, every: int) -> None:
    """Whether a first-order run settled.

    The mean loss of its last tenth is held against the tenth that ended at 70 %.

    Not the tenth before: under a falling step size nothing moves at the end, whether or not it has
    arrived.
    every: look at each that many-th step only (the ends of `Reinit`'s periods).
    """
    losses = _looked_at(run, every)
    if len(losses) < _enough(every):
        return
    change, noise = _change(losses)
    longer = "the budget" if run.stop.startswith("spent") else "num_steps"
    still = _is_still(change, noise, num_tasks)
    run.converged = still and noise <= RESOLVED * num_tasks
    above = risen(run.history, num_tasks)
    if above:
        run.converged = False
        run.stop += (
            f"; the mean objective ended {above:.3g} nats above where it began: lower the learning "
            "rate"
        )
        return
    if run.converged:
        verdict = "which has settled"
    elif still:
        verdict = (
            f"which its noise of {noise:.1e} hides: raise {longer}, num_particles or batch_size"
        )
    elif change > 0:
        ups = float((losses[1:] > losses[:-1]).double().mean())
        faster = "" if ups > UNEVEN else " or the learning rate"
        verdict = f"so it is still moving: raise {longer}{faster}"
    else:
        verdict = "so it does not descend: lower the learning rate"
    moved = f"fell by {change:.1e}" if change >= 0 else f"rose by {-change:.1e}"
    run.stop += f"; over its last third the mean objective {moved} nats, {verdict}"


def fell(run: Run, num_tasks: int, every: int) -> float:
    """By how much the mean objective fell over the last third of the steps, nats per task.

    NaN where too few steps or too much noise hide it.  every: as in `judge`.
    """
    losses = _looked_at(run, every)
    if len(losses) < _enough(every):
        return math.nan
    change, noise = _change(losses)
    hidden = _is_still(change, noise, num_tasks) and noise > RESOLVED * num_tasks
    return math.nan if hidden else change / num_tasks


def _looked_at(run: Run, every: int) -> Tensor:
    return torch.tensor(
        [row["loss"] for row in run.history[every - 1 :: every]], dtype=torch.float64
    )


def _enough(every: int) -> int:
    return 30 if every == 1 else 4


def _change(losses: Tensor) -> tuple[float, float]:
    """How far the mean of the last tenth lies below an earlier one, and its standard error."""
    tenth = max(1, len(losses) // 10)
    late, earlier = losses[-tenth:], losses[-4 * tenth : -3 * tenth]
    # what minibatches and draws make of it by chance
    noise = math.sqrt(float(late.var() + earlier.var()) / tenth) if tenth > 2 else 0.0
    return float(earlier.mean() - late.mean()), noise


def _is_still(change: float, noise: float, num_tasks: int) -> bool:
    return abs(change) <= max(SETTLED * num_tasks, 2.0 * noise)
