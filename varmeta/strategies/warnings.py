"""What the caller of a strategy's `loss` is told: what it rests on, steps that diverge."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal, get_args

from torch import Tensor

from varmeta._checks import counted
from varmeta.numerics.first_order import GradientDescent
from varmeta.numerics.minimize import Minimizer
from varmeta.strategies.certificate import Certificate
from varmeta.strategies.strategy import Stats, Traits
from varmeta.tasks import Batch

# The share of an algorithm's draws that may end on a ridge before the bias of the gradient is worth
# a warning.
MAX_UNSETTLED = 0.02


def certificate(batch: Batch, stats: Stats) -> Certificate | None:
    """What an implicit gradient rests on.

    None for other gradients, and where it was not to be worked out.
    """
    if stats.inner is None or stats.linear is None:
        return None
    draws = len(stats.inner.result) // len(batch)  # of a stochastic Alg
    return Certificate.of(batch.names * draws, stats.inner, stats.linear)


Kind = Literal["steps", "gradient"]
KINDS: frozenset[Kind] = frozenset(get_args(Kind))


def warning(
    traits: Traits, batch: Batch, stats: Stats, said: Set[Kind] = frozenset()
) -> tuple[Kind, str] | None:
    """What to warn about, if anything: inner steps that diverge, or else the gradient.

    said: what was warned about before, which is not said again: the next steps would say the same
        with other numbers.

    Raises RuntimeError where the strategy was told to raise.
    """
    raises = traits.on_unconverged == "raise"
    asked = traits.on_unconverged != "ignore" and (raises or "gradient" not in said)
    found = certificate(batch, stats) if asked else None
    if raises and found is not None and not found.ok:
        raise RuntimeError(str(found))
    if stats.diverged is not None and traits.minimizer is not None and said != KINDS:
        sentence = diverged(batch, stats.diverged, traits.minimizer)
        if sentence is not None:  # which explains the gradient too
            return None if "steps" in said else ("steps", sentence)
    unsettled = 0.0 if stats.unsettled is None or not asked else float(stats.unsettled)
    if unsettled > MAX_UNSETTLED:
        return "gradient", (
            f"{unsettled:.1%} of the draws of alg ended on a ridge between two minima, where the "
            "noise does not settle which one is reached and the gradient is biased: cool the noise "
            "down (cooling=True), or take more steps"
        )
    return None if found is None or found.ok else ("gradient", str(found))


def diverged(batch: Batch, which: Tensor, minimizer: Minimizer) -> str | None:
    """A sentence that names a task, and what to change in the numbers of the minimizer.

    which: `(tasks,)`, or one for each draw and task.
    """
    flags = which.reshape(-1, len(batch)).any(0)
    bad = [name for name, yes in zip(batch.names, flags.tolist(), strict=True) if yes]
    if not bad:
        return None
    first = f"{bad[0]!r}" + (" first" if len(bad) > 1 else "")
    return (
        f"the inner steps diverge for {counted(len(bad), 'task')}, {first}, whose loss they raise: "
        + diverging(batch, minimizer)
    )


def diverging(batch: Batch, minimizer: Minimizer) -> str:
    """What to change in the numbers of the minimizer where its steps raise a task's loss."""
    if not isinstance(minimizer, GradientDescent):
        return "lower the minimizer's learning rate"
    points, lr = int(batch.support.num_points.max()), minimizer.lr
    if not isinstance(lr, (int, float)):
        return (
            "take lower rates (learned ones from a lower start), or clip=, which bounds a task's "
            "gradient"
        )
    if minimizer.per_point:
        # whole numbers are classes or counts, whose loss is no squared error
        squared = batch.support.flat()[1].is_floating_point()
        field = (
            " (a field's rate a on a mean squared error is 2 s^2 a under a Gaussian of noise scale "
            "s)"
        )
        return (
            f"lower the minimizer's lr of {lr:g}, or use Adam, whose steps do not grow with the "
            f"curvature{field * squared}"
        )
    return (
        f"losses are sums, so that lr={lr:g} on up to {counted(points, 'point')} is a step of "
        f"{lr * points:g} on their mean.  Take GradientDescent({lr:g}, per_point=True), which "
        "divides by the number of points, a lower lr, or Adam, whose steps do not grow with the "
        "curvature"
    )
