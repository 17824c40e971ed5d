"""Minimise one loss per task over a tree, by first-order rules; every task stops on its own.

Nothing here knows what is minimised.  A rule is a pure function of (phi, gradient, state), so the
same rule serves a caller who has the gradient already, an inner solve to tolerance, and K steps
that are differentiated afterwards.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta.graphs.capture import tracing
from varmeta.graphs.pieces import apply, run
from varmeta.numerics import tree
from varmeta.numerics.recompute import recomputed
from varmeta.numerics.solution import Result, Solution, checked
from varmeta.numerics.tree import Tree

Losses = Callable[[Tree], Tensor]
"""phi, tensors `(tasks, ...)` -> losses `(tasks,)`; loss i depends on row i of phi alone."""

_HOST_READS_EVERY = (
    8  # steps between two looks at "has everybody converged?", which make an accelerator wait
)


class Minimizer(ABC):
    """A way to minimise: `solve`.  Subclasses hold choices, never state.

    A rule that needs the gradient alone is written faster as a `FirstOrderMinimizer`.
    """

    takes_units = False
    per_point = False

    @abstractmethod
    def solve(
        self,
        fn: Losses,
        phi: Tree,
        *,
        steps: int | None,
        tolerance: float,
        max_steps: int,
        create_graph: bool,
    ) -> Solution:
        """What `minimize` calls once it has checked the arguments, which see.

        With `units` too where the class says `takes_units`.
        """


def minimize(
    fn: Losses,
    phi: Tree,
    minimizer: Minimizer,
    *,
    steps: int | None = None,
    tolerance: float | None = None,
    max_steps: int = 1000,
    create_graph: bool = False,
    units: Tree | None = None,
    lr_scale: Tensor | None = None,
    rates: Tree | None = None,
    recompute: Sequence[Tensor] | None = None,
) -> Solution:
    """Minimise fn over phi, each task by itself.

    A task has converged when |g| <= tolerance (1 + |g at its start|), g its gradient.  With
    `steps=None` its row does not change any more from then on, bit for bit; `steps=K` goes on to
    exactly K steps (at most K with `NewtonCG`), and a first-order rule then ends as STEP_LIMIT. A
    task whose loss or gradient stops being finite keeps its last finite point, and the others go
    on.

    fn: see `Losses`.
    phi: where to start, floating tensors `(tasks, ...)` of one dtype.
    minimizer: `GradientDescent`, `Adam` or `NewtonCG`.
    steps: None, to tolerance; or a fixed number K.
    tolerance: default 1e-8 in float64, 1e-4 in lower precision.
    max_steps: the limit where `steps` is None.
    create_graph: keep the graph of all steps, so that the value can be differentiated with
        respect to the start and to whatever else fn depends on.  A task that ends NON_FINITE
        may put NaN into that derivative.
    units: the size of a usual change of each entry of phi, shaped as phi; only their ratios
        within a task matter.  `NewtonCG` takes its conjugate directions in them where it does
        not form the Hessian; nothing else looks at them.
    lr_scale: for each task a factor on the learning rate of a first-order rule, `(tasks,)`;
        None: 1.  A rule that is `per_point` needs it: 1 / the number of points whose losses a
        task's loss is the sum of.
    rates: the learning rate of each entry of phi at each step, `(steps, tasks or 1, ...)`, for a
        `GradientDescent` whose lr is not one number; steps beyond them take the last one's.  Also
        without `create_graph` the value can be differentiated with respect to them, the gradients
        of the steps held fixed.
    recompute: with `create_graph` and `steps`, the tensors that fn depends on besides phi.  The
        graph is then not kept but made again on the way back, a few steps at a time: memory does
        not grow with the steps, and each takes another gradient.  The value has a first derivative
        alone.

    Returns a `Solution` with the stats, each `(tasks,)`: "gradient_norm", at the returned point
    (NaN after a fixed number of first-order steps, which spend no gradient on it);
    "start_gradient_norm"; "steps", int64; and "evaluations", the work in units of one loss with its
    gradient (a loss alone 1/2, a Hessian product 2).  A task that ends above the loss that it
    started from, by more than rounding, is DIVERGED.

    Raises ValueError where an argument is out of range, or fn does not return one differentiable
    loss per task; TypeError where phi is not floating, or of several dtypes.

    >>> from varmeta.numerics.first_order import GradientDescent
    >>> y = torch.tensor([1.0, 2.0])  # two tasks, one number each
    >>> fn = lambda phi: (phi["w"] - y) ** 2
    >>> solution = minimize(fn, {"w": torch.zeros(2)}, GradientDescent(lr=0.5))
    >>> solution.value["w"], solution.worst.name, solution.stats["steps"]
    (tensor([1., 2.]), 'CONVERGED', tensor([1, 1]))
    """
    dtypes = {x.dtype for x in phi.values()}
    if not phi:
        raise ValueError("phi has no entries: there is nothing to minimise over")
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise TypeError(
            f"phi must be floating tensors of one dtype, not {sorted(map(str, dtypes))}"
        )
    leading = {name: tuple(x.shape[:1]) for name, x in phi.items()}
    if len(set(leading.values())) > 1 or () in leading.values():
        raise ValueError(
            "every tensor in phi needs the same task axis first, but the leading sizes are "
            f"{leading}"
        )
    if steps is not None:
        _check_count("steps", steps)
    _check_count("max_steps", max_steps)
    if tolerance is None:
        tolerance = 1e-8 if torch.float64 in dtypes else 1e-4
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    if units is not None and {name: x.shape for name, x in units.items()} != {
        name: x.shape for name, x in phi.items()
    }:
        came, expected = ({name: tuple(x.shape) for name, x in t.items()} for t in (units, phi))
        raise ValueError(f"units must have the names and shapes of phi, {expected}, not {came}")
    if minimizer.per_point and lr_scale is None:
        raise ValueError(
            "per_point divides the step by a task's number of points, which is not known here: "
            "leave it out, or give minimize(lr_scale=1 / points)"
        )
    if lr_scale is not None and (
        not isinstance(minimizer, FirstOrderMinimizer) or lr_scale.shape != (tree.num_tasks(phi),)
    ):
        raise ValueError(
            f"lr_scale is one factor per task, shape ({tree.num_tasks(phi)},), for GradientDescent "
            f"or Adam, not of shape {tuple(lr_scale.shape)} for {type(minimizer).__name__}"
        )
    more: dict[str, Any] = {"units": units} if minimizer.takes_units else {}
    more |= {} if lr_scale is None else {"lr_scale": lr_scale}
    more |= {} if rates is None else {"rates": rates}
    more |= {} if recompute is None else {"recompute": recompute}
    found = minimizer.solve(
        fn,
        phi,
        steps=steps,
        tolerance=tolerance,
        max_steps=max_steps,
        create_graph=create_graph,
        **more,
    )
    return checked(found, minimizer, ("evaluations",))


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


class FirstOrderMinimizer(Minimizer):
    """A rule that needs the gradient alone: a subclass writes `init` and `update`."""

    @abstractmethod
    def init(self, phi: Tree) -> Tree:
        """The state before the first step.

        Every tensor has the task axis first, so rows can be taken and put back.
        """

    @abstractmethod
    def update(
        self, phi: Tree, gradient: Tree, state: Tree, lr_scale: Any = 1.0
    ) -> tuple[Tree, Tree]:
        """One step from a gradient already at hand, as a pure function: phi and the state after.

        lr_scale: multiplies the learning rate (a schedule); a number, or one per task `(tasks,)`.
            Of a `GradientDescent` whose lr is not one number, its rates as a tree shaped as phi.
        """

    def solve(
        self,
        fn: Losses,
        phi: Tree,
        *,
        steps: int | None,
        tolerance: float,
        max_steps: int,
        create_graph: bool,
        lr_scale: Tensor | None = None,
        rates: Tree | None = None,
        recompute: Sequence[Tensor] | None = None,
    ) -> Solution:
        pace = Pace(lr_scale, rates)
        if steps is not None:
            solution = self._exactly(fn, phi, steps, create_graph, pace, recompute)
            # in a graph that is being traced no number can be read: whoever calls it looks at what
            # comes out
            if tracing() or solution.worst < Result.NON_FINITE:
                return solution
        return self._carefully(fn, phi, steps, tolerance, max_steps, create_graph, pace)

    def _exactly(
        self,
        fn: Losses,
        phi: Tree,
        steps: int,
        create_graph: bool,
        pace: Pace,
        recompute: Sequence[Tensor] | None,
    ) -> Solution:
        """`steps` steps with nothing to look at on the way: what is not finite stays so."""
        go = apply if create_graph or pace.has_graph else run
        point = phi if create_graph else tree.map_tree(lambda x: x.detach().clone(), phi)
        walk = Walk(point, self.init(tree.detach(point)))
        size = max(1, steps) if recompute is None else block_size(steps)
        for begin in range(0, steps, size):
            some = _Steps(self, range(begin, min(begin + size, steps)), go, create_graph)
            walk = (
                some(fn, walk, pace)
                if recompute is None
                else _without_graph(some, fn, walk, pace, recompute)
            )
        point = walk.point
        end = go(fn, _loss_at, point)
        unknown = torch.full_like(end, math.nan)
        first, norm = walk.met or (end, unknown)
        stats = {
            "gradient_norm": unknown,
            "start_gradient_norm": norm,
            "steps": torch.full_like(end, steps, dtype=torch.int64),
            "evaluations": torch.full_like(end, steps + 0.5),
        }
        result = torch.full_like(end, int(Result.STEP_LIMIT), dtype=torch.int64)
        return Solution(point, _judged(result, first, end, ~torch.isfinite(end)), stats)

    def _carefully(
        self,
        fn: Losses,
        phi: Tree,
        steps: int | None,
        tolerance: float,
        max_steps: int,
        create_graph: bool,
        pace: Pace,
    ) -> Solution:
        """To tolerance, or for `steps` steps, a task that leads nowhere finite stopping where it
        was last.
        """
        # the end's own gradient would be a step's work, and after a fixed number of steps nobody
        # moves on from there
        limit, final = (max_steps, _Evaluation.FULL) if steps is None else (steps, _Evaluation.LOSS)
        middle = _Evaluation.GRAPH if create_graph else _Evaluation.FULL
        bound = tolerance if steps is None else None
        # without a graph the start is copied: the result must not share memory with it
        start = phi if create_graph else tree.map_tree(lambda x: x.detach().clone(), phi)
        # a compiled piece has no graph of autograd's
        go = apply if create_graph or pace.has_graph else run
        walk = go(fn, _Begin(self, bound, middle if limit else final), start)
        for count in range(1, limit + 1):
            if steps is None and count % _HOST_READS_EVERY == 1 and not bool(walk["active"].any()):
                break
            advance = _Advance(self, steps is None, middle if count < limit else final)
            walk = go(fn, advance, walk, *pace.at(count - 1))

        result = torch.where(walk["converged"], int(Result.CONVERGED), int(Result.STEP_LIMIT))
        result = _judged(result, walk["first"], walk["loss"], walk["failed"])
        stats = {
            "gradient_norm": walk["norm"],
            "start_gradient_norm": walk["start_norm"],
            "steps": walk["taken"],
            "evaluations": walk["evaluations"],
        }
        return Solution(walk["point"], result, stats)


def _judged(result: Tensor, first: Tensor, end: Tensor, failed: Tensor) -> Tensor:
    """`result`, but NON_FINITE for those that failed and DIVERGED for those that ended above their
    first loss.
    """
    slack = 100 * torch.finfo(end.dtype).eps * first.abs().clamp(min=1)
    result = torch.where(failed, int(Result.NON_FINITE), result)
    return torch.where(~failed & (end > first + slack), int(Result.DIVERGED), result)


class Walk(NamedTuple):
    """Where all tasks stand: phi, the rule's state, and the first losses and gradient norms."""

    point: Tree
    state: Tree
    met: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class _Steps:
    """Some steps one after another.  numbers: theirs; go: how a piece is run."""

    rule: FirstOrderMinimizer
    numbers: range
    go: Callable[..., Any]
    create_graph: bool

    def __call__(self, fn: Losses, walk: Walk, pace: Pace) -> Walk:
        point, state, met = walk
        for number in self.numbers:
            move = _Move(self.rule, self.create_graph, number == 0)
            losses, norm, point, state = self.go(fn, move, point, state, *pace.at(number))
            met = met or (losses, norm)
        return Walk(point, state, met)


def block_size(steps: int) -> int:
    """How many of so many steps are made again at a time, whose graph is then held.

    Half the root: a step's graph is some four times as large as the point that a block starts from.
    """
    return max(1, round(math.sqrt(steps) / 2))


def _without_graph(
    some: _Steps, fn: Losses, walk: Walk, pace: Pace, given: Sequence[Tensor]
) -> Walk:
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
class _Move:
    """The piece that is one step of every task, whatever comes of it."""

    rule: FirstOrderMinimizer
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


def _loss_at(fn: Losses, phi: Tree) -> Tensor:
    with torch.no_grad():
        return _checked_losses(fn, phi)


class _Evaluation(Enum):
    """What is worked out at a point: its loss; its gradient too; and the gradient's graph too."""

    LOSS = "loss"
    FULL = "gradient"
    GRAPH = "graph"

    @property
    def cost(self) -> float:
        return 0.5 if self is _Evaluation.LOSS else 1.0

    def __call__(self, fn: Losses, phi: Tree) -> tuple[Tensor, Tree, Tree, Tensor]:
        """Losses, the point, the gradient there ({} without), and its norm (NaN without)."""
        if self is not _Evaluation.LOSS:
            losses, point, gradient = value_and_gradient(fn, phi, self is _Evaluation.GRAPH)
            kept = point if self is _Evaluation.GRAPH else phi
            return losses, kept, gradient, tree.norm(tree.detach(gradient))
        losses = _loss_at(fn, phi)
        return losses, phi, {}, torch.full_like(losses, math.nan)


@dataclass(frozen=True)
class _Begin:
    """The piece before the first step: where each task stands, as a tree of tensors."""

    rule: FirstOrderMinimizer
    tolerance: float | None
    evaluate: _Evaluation

    def __call__(self, fn: Losses, phi: Tree) -> dict[str, Any]:
        losses, point, gradient, norm = self.evaluate(fn, phi)
        finite = torch.isfinite(losses) & (
            torch.isfinite(norm) | (self.evaluate is _Evaluation.LOSS)
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
class _Advance:
    """The piece that is one step of every task that still moves."""

    rule: FirstOrderMinimizer
    to_tolerance: bool
    evaluate: _Evaluation

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
        losses = _checked_losses(fn, point)
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


def _checked_losses(fn: Losses, phi: Tree) -> Tensor:
    losses = fn(phi)
    tasks = tree.num_tasks(phi)
    if losses.shape != (tasks,):
        raise ValueError(
            f"the function to minimise must return one loss per task, shape ({tasks},), not "
            f"{tuple(losses.shape)}: sum over everything but the task axis"
        )
    return losses


def _check_count(name: str, value: int) -> None:
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if value < 0:
        raise ValueError(f"{name} must not be negative, but is {value}")
