"""What one step of a first-order rule is, for every task at once, and several after another.

The pieces are run as they are, or as compiled graphs (`graphs/pieces.py`); several steps keep their
graph for the way back, or make it again there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from varmeta.numerics import tree
from varmeta.numerics.recompute import recomputed
from varmeta.numerics.tree import Tree

Losses = Callable[[Tree], Tensor]
"""phi, tensors `(tasks, ...)` -> losses `(tasks,)`; loss i depends on row i of phi alone."""


class Rule(Protocol):
    """What a step needs of a `FirstOrderMinimizer`, which see."""

    def init(self, phi: Tree) -> Tree: ...

    def update(
        self, phi: Tree, gradient: Tree, state: Tree, lr_scale: Any = 1.0
    ) -> tuple[Tree, Tree]: ...


class Pace(NamedTuple):
    """How far the steps of a first-order rule go; see `minimize`."""

    lr_scale: Tensor | None = None
    rates: Tree | None = None

    def at(self, step: int) -> tuple[Tensor | Tree, ...]:
        """What `FirstOrderMinimizer.update` is told at that step, if anything."""
        if self.rates is None:
            return () if self.lr_scale is None else (self.lr_scale,)
        rates = {name: x[min(step, len(x) - 1)] for name, x in self.rates.items()}
        return (rates if self.lr_scale is None else tree.scale(rates, self.lr_scale),)

    def times(self, factor: Any) -> Any:
        """The same of a first step, times a schedule's factor, a number or `(tasks,)`."""
        for own in self.at(0):
            return tree.scale(own, factor) if isinstance(own, dict) else own * factor
        return factor

    @property
    def has_graph(self) -> bool:
        return self.rates is not None and any(x.requires_grad for x in self.rates.values())


class Walk(NamedTuple):
    """Where all tasks stand: phi, the rule's state, and the first losses and gradient norms."""

    point: Tree
    state: Tree
    met: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Steps:
    """Some steps one after another.  numbers: theirs; go: how a piece is run."""

    rule: Rule
    numbers: range
    go: Callable[..., Any]
    create_graph: bool

    def __call__(self, fn: Losses, walk: Walk, pace: Pace) -> Walk:
        point, state, met = walk
        for number in self.numbers:
            move = Move(self.rule, self.create_graph, number == 0)
            losses, norm, point, state = self.go(fn, move, point, state, *pace.at(number))
            met = met or (losses, norm)
        return Walk(point, state, met)


def block_size(steps: int) -> int:
    """How many of so many steps are made again at a time, whose graph is then held.

    Half the root: a step's graph is some four times as large as the point that a block starts from.
    """
    return max(1, round(math.sqrt(steps) / 2))


def without_graph(some: Steps, fn: Losses, walk: Walk, pace: Pace, given: Sequence[Tensor]) -> Walk:
    """The same steps, whose graph is made again on the way back."""
    parts = {"point": walk.point, "state": walk.state, "rates": pace.rates or {}}

    def function(inputs: Tree) -> Tree:
        own = {part: _under(part, inputs) for part in parts}
        # without autograd, as it is run first, a step need not be differentiable
        moving = replace(some, create_graph=torch.is_grad_enabled())
        here = pace._replace(rates=own["rates"] or None)
        end = moving(fn, Walk(own["point"], own["state"], walk.met), here)
        first = () if walk.met else zip(("losses", "norm"), end.met or (), strict=True)
        return _named("point", end.point) | _named("state", end.state) | _named("met", dict(first))

    inputs = {k: v for part, values in parts.items() for k, v in _named(part, values).items()}
    found = recomputed(function, inputs, [x for x in given if x.requires_grad])
    own = _under("met", found)
    met = walk.met or (own["losses"].detach(), own["norm"].detach())
    return Walk(_under("point", found), _under("state", found), met)


def _named(part: str, values: Tree) -> Tree:
    return {f"{part} {name}": value for name, value in values.items()}


def _under(part: str, values: Tree) -> Tree:
    first = f"{part} "
    return {k.removeprefix(first): v for k, v in values.items() if k.startswith(first)}


@dataclass(frozen=True)
class Move:
    """The piece that is one step of every task, whatever comes of it."""

    rule: Rule
    create_graph: bool
    first: bool

    def __call__(
        self, fn: Losses, point: Tree, state: Tree, *rates: Tensor | Tree
    ) -> tuple[Tensor, Tensor, Tree, Tree]:
        """The losses before the step, their gradient's norm (before the first step only), the point
        and the state after.
        """
        losses, at, gradient = value_and_gradient(fn, point, self.create_graph)
        norm = tree.norm(tree.detach(gradient)) if self.first else losses
        # what graph the point has without one of the gradients is that of the rates
        begin = at if self.create_graph else point
        return losses, norm, *self.rule.update(begin, gradient, state, *rates)


def loss_at(fn: Losses, phi: Tree) -> Tensor:
    with torch.no_grad():
        return checked_losses(fn, phi)


class Evaluation(Enum):
    """What is worked out at a point: its loss; its gradient too; and the gradient's graph too."""

    LOSS = "loss"
    FULL = "gradient"
    GRAPH = "graph"

    @property
    def cost(self) -> float:
        return 0.5 if self is Evaluation.LOSS else 1.0

    def __call__(self, fn: Losses, phi: Tree) -> tuple[Tensor, Tree, Tree, Tensor]:
        """Losses, the point, the gradient there ({} without), and its norm (NaN without)."""
        if self is not Evaluation.LOSS:
            losses, point, gradient = value_and_gradient(fn, phi, self is Evaluation.GRAPH)
            kept = point if self is Evaluation.GRAPH else phi
            return losses, kept, gradient, tree.norm(tree.detach(gradient))
        losses = loss_at(fn, phi)
        return losses, phi, {}, torch.full_like(losses, math.nan)


@dataclass(frozen=True)
class Begin:
    """The piece before the first step: where each task stands, as a tree of tensors."""

    rule: Rule
    tolerance: float | None
    evaluate: Evaluation

    def __call__(self, fn: Losses, phi: Tree) -> dict[str, Any]:
        losses, point, gradient, norm = self.evaluate(fn, phi)
        finite = torch.isfinite(losses) & (
            torch.isfinite(norm) | (self.evaluate is Evaluation.LOSS)
        )
        # without a tolerance nobody converges
        threshold = (
            torch.full_like(norm, -1.0) if self.tolerance is None else self.tolerance * (1 + norm)
        )
        converged = finite & (norm <= threshold)
        return {
            "point": point,
            "gradient": gradient,
            "state": self.rule.init(tree.detach(point)),
            "loss": losses,
            "first": losses,
            "norm": norm,
            "start_norm": norm,
            "threshold": threshold,
            "active": finite & ~converged,
            "failed": ~finite,
            "converged": converged,
            "taken": torch.zeros_like(losses, dtype=torch.int64),
            "evaluations": torch.full_like(losses, self.evaluate.cost),
        }


@dataclass(frozen=True)
class Advance:
    """The piece that is one step of every task that still moves."""

    rule: Rule
    to_tolerance: bool
    evaluate: Evaluation

    def __call__(self, fn: Losses, walk: dict[str, Any], *rates: Tensor | Tree) -> dict[str, Any]:
        active, point, state = walk["active"], walk["point"], walk["state"]
        moved, moved_state = self.rule.update(point, walk["gradient"], state, *rates)
        trial = tree.where(active, moved, point)
        losses, trial, gradient, norm = self.evaluate(fn, trial)
        finite = torch.isfinite(losses)
        if self.to_tolerance:
            finite = finite & torch.isfinite(norm)
        else:
            # nobody asks for the norm, and where the gradient is not finite the next loss will not
            # be
            norm = torch.full_like(losses, math.nan)
        broken, arrived = active & ~finite, active & finite
        converged = arrived & (norm <= walk["threshold"])
        return {
            # a step that leads nowhere finite is taken back
            "point": tree.where(broken, point, trial),
            "gradient": gradient,
            "state": tree.where(active, moved_state, state) if state else state,
            "loss": torch.where(arrived, losses, walk["loss"]),
            "first": walk["first"],
            "norm": torch.where(arrived, norm, walk["norm"]),
            "start_norm": walk["start_norm"],
            "threshold": walk["threshold"],
            "active": arrived & ~converged,
            "failed": walk["failed"] | broken,
            "converged": walk["converged"] | converged,
            "taken": walk["taken"] + arrived,
            "evaluations": walk["evaluations"] + self.evaluate.cost * active,
        }


def value_and_gradient(
    fn: Losses, phi: Tree, create_graph: bool = False
) -> tuple[Tensor, Tree, Tree]:
    """Losses `(tasks,)` without a graph, the point they were taken at, their gradient there.

    The point is phi; without `create_graph` as leaves cut from phi's own graph, so that the
    caller's is not kept alive.

    Raises ValueError if fn does not return one loss per task, or returns losses that have no graph
    back to phi.
    """
    if create_graph:
        point = tree.map_tree(lambda x: x if x.requires_grad else x.detach().requires_grad_(), phi)
    else:
        point = tree.map_tree(lambda x: x.detach().requires_grad_(), phi)
    with torch.enable_grad():
        losses = checked_losses(fn, point)
        if not losses.requires_grad:
            raise ValueError(
                "the losses have no graph back to phi: compute them from phi, without detach or "
                "no_grad"
            )
        # entries that fn does not use have gradient 0
        found = torch.autograd.grad(
            losses.sum(), list(point.values()), create_graph=create_graph, materialize_grads=True
        )
    return losses.detach(), point, dict(zip(point, found, strict=True))


def checked_losses(fn: Losses, phi: Tree) -> Tensor:
    return tree.one_for_each(fn(phi), phi, "the function to minimise")
