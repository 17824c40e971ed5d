"""What an implicit gradient rests on: was the inner minimum reached, and was the linear system solved?

The implicit function theorem holds at a minimum only.  At lambda = 0.1 after 16 gradient steps a small network's implicit
gradient was off by 731 %, and none of the libraries that were tried says so; here every such gradient comes with the numbers.
They are taken in the unit of the loss, so that the units of the weights, and how well they are scaled, do not decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.numerics.solution import Result, Solution

# How many nats above the inner minimum phi may be, and the relative error of the linear solution.  The error of the gradient
# goes with the root of the first: 1e-4 nats went with 3 % on a small network.
MAX_DECREMENT = {torch.float64: 1e-10, torch.float32: 1e-6}
MAX_LINEAR_ERROR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True)
class Certificate:
    """Per task, `(tasks,)` each.

    decrement: 1/2 g' H^-1 g with the inner gradient g and Hessian H: how many nats the inner loss can still fall by (NaN where
        the strategy was told to ignore it).
    inner_gradient: |g|, in nats per unit of phi.
    linear_error: bound on the relative error of u in A u = b, in the norm of A; residual: |b - A u| / |b|.  Both are 0 where
        the envelope theorem leaves no system.
    curvature: the smallest curvature d'Ad / d'd that the solvers met; negative means that phi is no minimum.
    failed: which tasks are out of tolerance; ok: none is.
    """

    names: tuple[str, ...]
    decrement: Tensor
    inner_gradient: Tensor
    linear_error: Tensor
    residual: Tensor
    curvature: Tensor
    inner_result: Tensor
    linear_result: Tensor

    @classmethod
    def of(cls, names: tuple[str, ...], inner: Solution, linear: dict[str, Tensor]) -> Certificate:
        curvature = linear["curvature"]
        if "curvature" in inner.stats:
            curvature = torch.where(curvature.isnan(), inner.stats["curvature"], curvature)
        return cls(
            names,
            linear["decrement"],
            linear["gradient_norm"],
            linear["linear_error"],
            linear["residual"],
            curvature,
            inner.result,
            linear["linear_result"],
        )

    @property
    def _limits(self) -> tuple[float, float]:
        dtype = self.decrement.dtype
        return MAX_DECREMENT.get(dtype, 1e-4), MAX_LINEAR_ERROR.get(dtype, 0.1)

    @property
    def failed(self) -> Tensor:
        decrement, linear = self._limits
        good = (self.decrement <= decrement) & (self.linear_error <= linear)
        # exactly 0 is a direction on which nothing depends, such as an unused entry of a guide
        saddle = (self.curvature < 0) | (self.inner_result == Result.NEGATIVE_CURVATURE)
        return ~good | saddle | (self.linear_result == Result.NEGATIVE_CURVATURE)

    @property
    def ok(self) -> bool:
        return not bool(self.failed.any())

    def __str__(self) -> str:
        failed, limits = self.failed, self._limits
        count = int(failed.sum())
        excess = (self.decrement / limits[0] + self.linear_error / limits[1]).nan_to_num(nan=torch.inf)
        worst = int(torch.where(failed | (count == 0), excess, -1.0).argmax())
        numbers = (
            f"the inner loss {float(self.decrement[worst]):.2g} nats above its minimum (tolerance {limits[0]:.0e}), linear "
            f"error {float(self.linear_error[worst]):.2g} (tolerance {limits[1]:.0e}), smallest curvature "
            f"{float(self.curvature[worst]):.2g}"
        )
        if not count:
            return f"certified for all {len(self.names)} tasks; the largest: {numbers}"
        advice = "take more inner steps (inner_steps=None runs to tolerance)"
        if bool((self.curvature[failed] < 0).any()) or bool((self.inner_result == Result.NEGATIVE_CURVATURE).any()):
            advice = Result.NEGATIVE_CURVATURE.sentence
        elif bool((self.decrement <= limits[0])[failed].all()):
            advice = "raise the linear solver's max_steps, or use Direct()"
        return (
            f"the implicit gradient is not certified for {count} of {len(self.names)} tasks; the worst, "
            f"{self.names[worst]!r}: {numbers}.  It may be far from the true one: {advice}"
        )
