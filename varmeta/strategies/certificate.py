"""What an implicit gradient rests on: was the minimum reached, and the system solved?

The implicit function theorem holds at a minimum only.  After 16 gradient steps a small network's
implicit gradient can be off by more than its own length (`experiments.choices`, certificate); here
every such gradient comes with the numbers. They are taken in the unit of the loss, so that the
units of the weights, and how well they are scaled, do not decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta._checks import counted
from varmeta.display.shown import Shown
from varmeta.numerics.solution import Result, Solution

if TYPE_CHECKING:
    import pandas as pd

# How many nats above the inner minimum phi may be, and the relative error of the linear solution.
# The error of the gradient goes with the root of the first: 3e-3 nats went with 2 % on a small
# network (`experiments.choices`, certificate).
MAX_DECREMENT = {torch.float64: 1e-10, torch.float32: 1e-6}
MAX_LINEAR_ERROR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """Per task, `(tasks,)` each.

    decrement: 1/2 g' H^-1 g with the inner gradient g and Hessian H, an estimate of how many nats
        the inner loss can still fall by (NaN where the strategy was told to ignore it): it takes
        the loss for quadratic, and beyond 32 numbers a task it comes from conjugate gradients,
        which may miss directions of little curvature.
    decrement_bound: 1/2 g' Lambda^-1 g with the prior's precision matrix Lambda: the inner loss
        lies at most so many nats above its minimum, a theorem where f_i is convex by construction
        (weights that enter linearly, a log-concave likelihood, a point as guide).  NaN elsewhere.
    inner_gradient: |g|, in nats per unit of phi.
    linear_error: the relative error of u in A u = b, in the norm of A, an estimate from the
        smallest curvature met; linear_bound: what it is at most, where f_i is convex by
        construction (else NaN); residual: |b - A u| / |b|.  They are 0 where the envelope theorem
        leaves no system.
    left, solved_to: what is judged of the two: the bound where it is in tolerance, else the
        estimate.
    curvature: the smallest curvature d'Ad / d'd that the solvers met; negative means that phi is no
        minimum.
    failed: which tasks are out of tolerance; ok: none is.

    It says that phi is a minimum, not which: of a loss with several, two minimisers may be
    certified at two, with two gradients.  A curvature below the prior's precision says that there
    may be.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> vm.meta_gradient(model, tasks, vm.Implicit("delta", "query")).certificate
    <Certificate: 9 tasks, all certified>
    """

    names: tuple[str, ...]
    decrement: Tensor
    decrement_bound: Tensor
    inner_gradient: Tensor
    linear_error: Tensor
    linear_bound: Tensor
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
            linear["decrement_bound"],
            linear["gradient_norm"],
            linear["linear_error"],
            linear["linear_bound"],
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
    def left(self) -> Tensor:
        """What is judged of the inner minimum, `(tasks,)`."""
        # a bound in the prior's metric is far too large where the data weigh much more than the
        # prior
        return torch.where(
            self.decrement_bound <= self._limits[0], self.decrement_bound, self.decrement
        )

    @property
    def solved_to(self) -> Tensor:
        """What is judged of the linear solution, `(tasks,)`."""
        return torch.where(
            self.linear_bound <= self._limits[1], self.linear_bound, self.linear_error
        )

    @property
    def failed(self) -> Tensor:
        decrement, linear = self._limits
        good = (self.left <= decrement) & (self.solved_to <= linear)
        # exactly 0 is a direction on which nothing depends, such as an unused entry of a guide
        saddle = (self.curvature < 0) | (self.inner_result == Result.NEGATIVE_CURVATURE)
        return ~good | saddle | (self.linear_result == Result.NEGATIVE_CURVATURE)

    @property
    def ok(self) -> bool:
        return not bool(self.failed.any())

    def frame(self) -> pd.DataFrame:
        """One row per task; the columns are those of the class, and ok.

        decrement, decrement_bound in nats; inner_gradient in nats per unit of phi; linear_error,
        linear_bound and residual relative, without unit; curvature in nats per square unit of phi;
        inner_result, linear_result: names of `Result` codes; ok: whether the task is in tolerance.
        """
        import pandas as pd

        numbers = (
            "decrement", "decrement_bound", "inner_gradient", "linear_error", "linear_bound",
            "residual", "curvature",
        )  # fmt: skip
        columns: dict[str, list[object]] = {name: getattr(self, name).tolist() for name in numbers}
        for name in ("inner_result", "linear_result"):
            columns[name] = [Result(int(code)).name for code in getattr(self, name).tolist()]
        columns["ok"] = (~self.failed).tolist()
        return pd.DataFrame(columns, index=pd.Index(self.names, name="task"))

    def _headline(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        bad = int(self.failed.sum())
        end = f"{bad} of them not certified" if bad else "all certified"
        return f"<Certificate: {counted(len(self.names), 'task')}, {end}>"

    def __str__(self) -> str:
        failed, limits = self.failed, self._limits
        count = int(failed.sum())
        excess = (self.left / limits[0] + self.solved_to / limits[1]).nan_to_num(nan=torch.inf)
        worst = int(torch.where(failed | (count == 0), excess, -1.0).argmax())
        left, linear = float(self.left[worst]), float(self.solved_to[worst])
        how = "at most" if left == float(self.decrement_bound[worst]) else "an estimated"
        well = "at most" if linear == float(self.linear_bound[worst]) else "about"
        numbers = (
            f"the inner loss {how} {left:.2g} nats above its minimum (tolerance {limits[0]:.0e}), "
            f"linear error {well} {linear:.2g} (tolerance {limits[1]:.0e}), smallest curvature met "
            f"{float(self.curvature[worst]):.2g}"
        )
        if not count:
            return f"certified for all {len(self.names)} tasks; the largest: {numbers}"
        advice = (
            "take more inner steps (inner_steps=None runs to tolerance); where they do, a faster "
            "minimizer, NewtonCG() or a higher rate, or float64"
        )
        if bool((self.curvature[failed] < 0).any()) or bool(
            (self.inner_result == Result.NEGATIVE_CURVATURE).any()
        ):
            advice = Result.NEGATIVE_CURVATURE.sentence
        elif bool((self.left <= limits[0])[failed].all()):
            advice = "raise the linear solver's max_steps, or use Direct()"
        return (
            f"the implicit gradient is not certified for {count} of {len(self.names)} tasks; the "
            f"worst, {self.names[worst]!r}: {numbers}.  It may be far from the true one: {advice}"
        )
