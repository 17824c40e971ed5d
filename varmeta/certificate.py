"""What an implicit gradient rests on: was the inner minimum reached, and was the linear system solved?

The implicit function theorem holds at a minimum only.  At lambda = 0.1 after 16 gradient steps a small network's implicit
gradient was off by 731 %, and none of the libraries that were tried says so; here every such gradient comes with the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.numerics.solution import Result, Solution

# Relative to (1 + the inner gradient's norm at the start), and to |b| of the linear system.  Two digits looser than
# what the solvers aim at, so that a solver which just meets its own tolerance is not called out.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Certificate:
    """Per task, `(tasks,)` each.

    inner_gradient: |dF/dphi| at the phi that was used (nats per unit of phi).
    residual: |b - A u| / |b| of the linear system A u = b (0 where the envelope theorem leaves none).
    curvature: the smallest curvature d'Ad / d'd that the solvers met; not positive means that phi is no minimum (NaN where
        nothing was solved).
    ok: everything is within tolerance.
    """

    names: tuple[str, ...]
    inner_gradient: Tensor
    inner_tolerance: Tensor
    residual: Tensor
    curvature: Tensor
    inner_result: Tensor
    linear_result: Tensor
    tolerance: float

    @classmethod
    def of(cls, names: tuple[str, ...], inner: Solution, linear: dict[str, Tensor]) -> Certificate:
        norm = inner.stats["gradient_norm"]
        tolerance = TOLERANCE.get(norm.dtype, 1e-2)
        start = inner.stats["start_gradient_norm"]
        curvature = linear["curvature"]
        if "curvature" in inner.stats:
            curvature = torch.where(curvature.isnan(), inner.stats["curvature"], curvature)
        return cls(
            names,
            norm,
            tolerance * (1.0 + start),
            linear["residual"],
            curvature,
            inner.result,
            linear["linear_result"],
            tolerance,
        )

    @property
    def failed(self) -> Tensor:
        """Tasks out of tolerance, `(tasks,)` bool."""
        # a precision of 1e11 makes gradients of 1e-6 out of rounding: a solver that stands at the minimum as far as its
        # numbers can tell has converged, whatever the gradient's unit
        inner = (self.inner_gradient <= self.inner_tolerance) | (self.inner_result == Result.CONVERGED)
        good = inner & (self.residual <= self.tolerance)
        return ~good | (self.curvature <= 0)

    @property
    def ok(self) -> bool:
        return not bool(self.failed.any())

    def __str__(self) -> str:
        failed = self.failed
        count = int(failed.sum())
        excess = self.inner_gradient / self.inner_tolerance + self.residual / self.tolerance
        worst = int(torch.where(failed | (count == 0), excess, -1.0).argmax())
        numbers = (
            f"inner gradient norm {float(self.inner_gradient[worst]):.2g} (tolerance {float(self.inner_tolerance[worst]):.2g}), "
            f"linear residual {float(self.residual[worst]):.2g} (tolerance {self.tolerance:.2g}), "
            f"smallest curvature {float(self.curvature[worst]):.2g}"
        )
        if not count:
            return f"certified for all {len(self.names)} tasks; the largest: {numbers}"
        advice = "take more inner steps (inner_steps=None runs to tolerance)"
        if bool((self.curvature[failed] <= 0).any()):
            advice = Result.NEGATIVE_CURVATURE.sentence
        elif not bool((self.inner_gradient > self.inner_tolerance).any()):
            advice = "raise the linear solver's max_steps, or use Direct() for few weights"
        return (
            f"the implicit gradient is not certified for {count} of {len(self.names)} tasks; the worst, "
            f"{self.names[worst]!r}: {numbers}.  It may be far from the true one: {advice}"
        )
