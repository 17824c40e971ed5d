"""What an iteration came to: a value, one result per task, and the numbers behind it."""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import Tensor

from varmeta._checks import kind_of
from varmeta.numerics.tree import Tree, num_tasks


class Result(enum.IntEnum):
    """How an iteration ended; the larger, the worse.

    `.sentence` says it and ends in something to do.

    >>> Result.STEP_LIMIT > Result.CONVERGED, Result.DIVERGED.sentence
    (True, 'the iteration diverges: lower its step size')
    """

    CONVERGED = 0
    STEP_LIMIT = 1
    STAGNATED = 2
    NEGATIVE_CURVATURE = 3
    DIVERGED = 4
    NON_FINITE = 5

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Result.CONVERGED: "converged",
    Result.STEP_LIMIT: "stopped at the step limit before the tolerance was met: raise max_steps "
    "or loosen the tolerance",
    Result.STAGNATED: "no step lowered the objective although the gradient is above the "
    "tolerance: use float64 data, or "
    "loosen the tolerance",
    Result.NEGATIVE_CURVATURE: "met a direction of negative curvature, so the inner problem is "
    "not convex there: raise the "
    "prior precision, or take more inner steps",
    Result.DIVERGED: "the iteration diverges: lower its step size",
    Result.NON_FINITE: "a loss or gradient is not finite: look at the named tasks' data, and "
    "lower the learning rate",
}


class Solution(NamedTuple):
    """The outcome of an inner solve or of a linear solve.

    value: the tree that was found.
    result: codes of `Result`, `(tasks,)`, int64.
    stats: named numbers, each `(tasks,)`.

    >>> import torch
    >>> found = Solution({"w": torch.zeros(2, 3)}, torch.tensor([0, 1]), {})
    >>> found.worst.name
    'STEP_LIMIT'
    """

    value: Tree
    result: Tensor
    stats: dict[str, Tensor]

    @property
    def worst(self) -> Result:
        return Result(int(self.result.max()))


def checked(found: object, who: object, stats: tuple[str, ...], like: Tree) -> Solution:
    """What `who.solve` returned, if it is a `Solution` shaped as `like`, with those stats.

    Raises TypeError for anything else, ValueError for one that lacks a stat or has other names or
    shapes: part of a user's own.
    """
    name = f"{type(who).__name__}.solve"
    if not isinstance(found, Solution):
        raise TypeError(
            f"{name} returns {kind_of(found)}, expected vm.Solution(value, result, stats)"
        )
    missing = [stat for stat in stats if stat not in found.stats]
    if missing:
        raise ValueError(
            f"{name} returns a Solution without {missing[0]!r} in its stats, which must hold "
            f"{', '.join(map(repr, stats))}, (tasks,) each"
        )
    number = num_tasks(like)
    numbers = {"result": found.result} | {name: found.stats[name] for name in stats}
    for what, value in numbers.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} returns {kind_of(value)} as {what!r}, expected a tensor")
        if value.shape != (number,):
            raise ValueError(
                f"{name} returns {what!r} of shape {tuple(value.shape)}, expected ({number},), a "
                "number per task"
            )
    if not isinstance(found.value, dict):
        raise TypeError(f"{name} returns {kind_of(found.value)} as its value, expected a dict")
    came, expected = ({n: tuple(x.shape) for n, x in t.items()} for t in (found.value, like))
    if came != expected:
        raise ValueError(f"{name} returns a value of {came}, expected {expected}")
    return found
