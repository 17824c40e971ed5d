"""Tasks with one scalar weight under many anchors theta0 at once, and the global minimum of each.

A prior mean with a row axis is all it takes for a model's own losses to be those of many anchors:
row r of a batch is one task under one theta0.  Newton's method finds the nearest minimum only, so
it starts from every well of a grid that may hold the lowest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.guides.delta import Delta
from varmeta.landscape.wells import lowest_of, lowest_wells
from varmeta.models.model import TaskModel
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree, add
from varmeta.strategies.expectation import Point
from varmeta.strategies.problem import Losses, Problem
from varmeta.tasks import TaskSet

_TIGHT = 1e-13  # of inner gradients: central differences divide what is left of them by 2e-5
_MAX_SIZE = 2_000_000  # points of the grid x tasks, before a loss that has no minimum is given up
_CHUNK = 500_000  # numbers in one table of anchors x grid


RowOuter = Literal["f", "query", "elbo"]


class Grid(NamedTuple):
    """theta `(points,)`, evenly spaced, and f there, `(points, tasks)`."""

    theta: Tensor
    loss: Tensor


class Anchored:
    """F_i(theta; theta0) for any pairs of an anchor theta0 and a task.

    F_i(theta; theta0) = f_i(theta) + lambda/2 (theta - theta0)^2.

    eta: everything shared; its theta0 is replaced by the anchors.  All tensors are float64.
    """

    def __init__(
        self, model: TaskModel, tasks: TaskSet, eta: Mapping[str, Tensor], spacing: float
    ) -> None:
        self.model, self.tasks, self.spacing = model, tasks, spacing
        self.problem = Problem(model, Delta(), Point(), seed=0)
        like = torch.zeros((), dtype=torch.float64)
        start = model.init(like)
        unknown = set(eta) - set(start)
        if unknown:
            raise ValueError(
                f"eta names {sorted(unknown)}, but the model has {sorted(start)}"
                f"{nearest(sorted(unknown), start)}"
            )
        self.eta = start | {name: value.detach().to(like) for name, value in eta.items()}
        log_precision = float(model.prior.log_precision(model.weights, self.eta, like))
        self.precision = math.exp(log_precision)  # lambda
        self.normaliser = 0.5 * math.log(2 * math.pi) - 0.5 * log_precision

    def named(self, anchors: Tensor) -> dict[str, Tensor]:
        """theta0 under the weight's own name, and in its own shape behind the axes of `anchors`."""
        ((name, shape),) = self.model.weights.shapes.items()
        return {name: anchors.reshape(*anchors.shape, *shape)}

    def penalty(self, theta: Tensor, anchor: Tensor) -> Tensor:
        """lambda/2 (theta - anchor)^2, broadcast: -log prior, less what it is at theta = anchor."""
        prior = self.model.prior_distribution(self.eta | self.named(anchor))
        return prior.log_prob(anchor[..., None]) - prior.log_prob(theta[..., None])

    def rows(self, anchors: Tensor, task: Tensor | None = None, live: bool = False) -> Rows:
        """Each anchor with each task; with `task`, `(anchors,)`, each anchor with its own."""
        if task is None:
            task = torch.arange(len(self.tasks)).repeat(len(anchors))
            anchors = anchors.repeat_interleave(len(self.tasks))
        return Rows(self, anchors, task, live)

    def grid(self, anchors: Tensor) -> Grid:
        """f on a grid that reaches as far from the anchors as the penalty lets a minimum be.

        f(theta*) + lambda/2 (theta* - theta0)^2 <= f(theta0), so (theta* - theta0)^2 <= 2
        (f(theta0) - lowest f) / lambda.

        Raises ValueError for an f that is not finite there, or that falls as fast as the penalty
        rises.
        """
        low, high = float(anchors.min()), float(anchors.max())
        reach = 5.0 / math.sqrt(self.precision)
        while True:
            first, last = (
                math.floor((low - reach) / self.spacing),
                math.ceil((high + reach) / self.spacing),
            )
            if (last - first) * len(self.tasks) > _MAX_SIZE:
                raise ValueError(
                    f"minima may be farther than {reach:.3g} from the anchors, which are too many "
                    f"points of {self.spacing:g}: raise the spacing, or, if f falls as fast as the "
                    "penalty rises, the precision"
                )
            theta = self.spacing * torch.arange(first, last + 1, dtype=torch.float64)
            rows = self.rows(theta)
            loss = rows("f", rows.anchor).reshape(len(theta), -1)
            bad = (~loss.isfinite()).nonzero()
            if len(bad):
                point, task = bad[0].tolist()
                where = f"at theta = {float(theta[point]):.6g}"
                raise ValueError(f"f of task {self.tasks.names[task]!r} is not finite {where}")
            near = (theta >= low - self.spacing) & (theta <= high + self.spacing)
            depth = float((loss[near].amax(0) - loss.amin(0)).max())
            needed = 1.1 * math.sqrt(2 * depth / self.precision)
            if needed <= reach:
                return Grid(theta, loss)
            reach = needed

    def argmin(self, anchor: Tensor, task: Tensor, grid: Grid) -> Tensor:
        """theta* of each pair of an anchor and a task, `(pairs,)`."""
        size = max(1, _CHUNK // len(grid.theta))
        found = []
        for first, (anchors, tasks) in enumerate(
            zip(anchor.split(size), task.split(size), strict=True)
        ):
            several, which = anchors.unique_consecutive(
                return_inverse=True
            )  # an anchor's tasks share its penalty
            row, point = lowest_wells(
                grid.loss.T[tasks] + self.penalty(grid.theta, several[:, None])[which]
            )
            found.append((row + first * size, grid.theta[point]))
        row, start = (torch.cat(parts) for parts in zip(*found, strict=True))
        rows = self.rows(anchor[row], task[row])
        theta = rows.polish(start)
        return lowest_of(row, rows("elbo", theta), theta, len(anchor))


class Rows:
    """Row r is task `task[r]` under a prior with the mean `anchor[r]`; both `(rows,)`.

    eta: everything shared, with theta0 `(rows, 1, ...)` made of `anchor`, which is a leaf where
        `live`.
    """

    def __init__(self, anchored: Anchored, anchor: Tensor, task: Tensor, live: bool) -> None:
        self._problem, self.task = anchored.problem, task
        self.anchor = anchor.detach().clone().requires_grad_(live)
        self.eta = anchored.eta | anchored.named(self.anchor[:, None])
        batch = anchored.tasks.batch(task)
        # the post's simplification, where there is no validation loss
        self._batch = batch if batch.query is not None else replace(batch, query=batch.support)

    def losses(self, name: RowOuter) -> Losses:
        """`fn(phi, eta) -> (rows,)` of the objective of that name.

        "elbo" and "query" are as for any problem; "f" is the loss on the support alone.
        """
        if name == "f":
            return self._problem.losses("query", replace(self._batch, query=self._batch.support), 0)
        return self._problem.losses(name, self._batch, 0)

    def __call__(self, name: RowOuter, theta: Tensor) -> Tensor:
        return self.losses(name)(phi_of(theta), self.eta)

    def slopes(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """f' and f'' at theta, `(rows,)` each."""
        theta = theta.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(self("f", theta).sum(), theta, create_graph=True)
        if not first.requires_grad:  # f is a straight line
            return first, torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.sum(), theta, materialize_grads=True)
        return first.detach(), second

    def minimize(self, minimizer: Minimizer, start: Tensor, **how: Any) -> Solution:
        inner = self.losses("elbo")
        return minimize(lambda phi: inner(phi, self.eta), phi_of(start), minimizer, **how)

    def polish(self, start: Tensor) -> Tensor:
        """The minimum beside `start`, to the last digits.

        Warns where Newton's method does not get there.
        """
        found = self.minimize(NewtonCG(), start, tolerance=_TIGHT)
        failed = int((found.result != Result.CONVERGED).sum())
        if failed:
            row = int(found.result.argmax())
            warnings.warn(
                f"{failed} of {len(start)} minima are not exact, the worst near theta = "
                f"{float(start[row]):.4g} for theta0 = {float(self.anchor[row]):.4g}: "
                f"{found.worst.sentence}",
                RuntimeWarning,
                stacklevel=2,
            )
        return theta_of(found.value)


@dataclass(frozen=True)
class RowDescent(FirstOrderMinimizer):
    """Gradient descent with a learning rate for each row, `(rows,)`."""

    lr: Tensor

    def init(self, phi: Tree) -> Tree:
        return {}

    def update(
        self, phi: Tree, gradient: Tree, state: Tree, lr_scale: float | Tensor = 1.0
    ) -> tuple[Tree, Tree]:
        return add(phi, gradient, -self.lr * lr_scale), state


def phi_of(theta: Tensor) -> Tree:
    """The delta guide's parameters for theta `(rows,)`."""
    return {"loc": theta[:, None]}


def theta_of(phi: Tree, eta: Mapping[str, Tensor] | None = None) -> Tensor:
    """theta `(rows,)` of the delta guide's parameters.

    As an outer objective its gradient in theta0 is d theta* / d theta0.
    """
    return phi["loc"][:, 0]
