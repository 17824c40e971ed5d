"""What the learning rate of inner steps may be: one, several that are fixed, or learned ones.

Nothing here knows the weights that a rate belongs to: `strategies/inner_rates.py` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from varmeta._checks import one_of
from varmeta.numerics.arguments import no_tensors, positive

Per = Literal["weight", "layer", "model"]
PER: tuple[Per, ...] = get_args(Per)


@dataclass(frozen=True)
class LearnedRates:
    """Learning rates of inner steps that are learned with eta, each by its logarithm.

    A rate stays positive.  Its meta-gradient goes through the steps, so that `Unrolled` learns it,
    and `FirstOrder` with the gradients of the steps held fixed.

    start: where every rate starts.
    per: "weight", a rate for each number of a weight tensor (Meta-SGD); "layer", one for the
        weights of each module; "model", one in all.
    per_step: each inner step has rates of its own (with per="layer" MAML++'s); steps beyond those
        of the training take the last one's.

    Reference: Li et al. (2017), "Meta-SGD", whose rates may be negative too; Antoniou et al. (ICLR
    2019), "How to train your MAML".

    Raises ValueError for a start that is not positive or another `per`, TypeError for other kinds.

    >>> import varmeta as vm
    >>> rule = vm.GradientDescent(lr=LearnedRates(start=0.05, per="weight"))
    >>> vm.Unrolled(minimizer=rule).minimizer.lr.start
    0.05
    """

    start: float = 0.01
    per: Per = "layer"
    per_step: bool = False

    def __post_init__(self) -> None:
        no_tensors(self)
        positive("start", self.start)
        one_of("per", self.per, PER)
        if not isinstance(self.per_step, bool):
            raise TypeError(f"per_step must be True or False, not {self.per_step!r}")


# What a rule keeps of the rates that it was given: one; those to learn; one for each pattern of
# names; one for each weight.
Rate = float | LearnedRates | tuple[tuple[str, float], ...] | tuple[float, ...]


def checked_rate(lr: Any) -> Rate:
    """What is kept of `lr`: plain values, which can be compared, hashed and saved.

    Raises TypeError and ValueError for what is no rate, as `GradientDescent` says.
    """
    if isinstance(lr, Tensor):
        lr = _numbers(lr)
    if isinstance(lr, LearnedRates):
        return lr
    if isinstance(lr, str):
        if lr != "learned":
            raise ValueError(f"lr must be a positive number or 'learned', not {lr!r}")
        return LearnedRates()
    pairs = tuple(lr.items()) if isinstance(lr, Mapping) else lr
    if not isinstance(pairs, tuple):
        positive("lr", lr)
        return lr  # type: ignore[no-any-return]
    if not pairs:
        raise ValueError(f"lr has no rate: {SUCH_AS}")
    if not all(isinstance(one, tuple) for one in pairs):
        for one in pairs:
            positive("a rate in lr", one)
        return pairs
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"lr by name takes patterns and rates, {SUCH_AS}, not {pair!r}")
        positive(f"lr[{pair[0]!r}]", pair[1])
    return pairs


SUCH_AS = "such as {'head.*': 0.1, '*': 0.01}"


def _numbers(lr: Tensor) -> float | tuple[float, ...]:
    if lr.requires_grad:
        raise TypeError(
            "lr of GradientDescent is a tensor that asks for a gradient, which is not how a rate "
            "is learned: lr='learned', or vm.LearnedRates(start=..., per='weight'), has it learned "
            "with eta"
        )
    if lr.dim() > 1:
        raise ValueError(
            "lr is one number, or a vector with a rate for each weight, not of shape "
            f"{tuple(lr.shape)}: name the weights, {SUCH_AS}"
        )
    return tuple(lr.tolist()) if lr.dim() else float(lr)
