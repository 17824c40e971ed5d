"""Minimise one loss per task over a tree, by first-order rules; every task stops on its own.

Nothing here knows what is minimised.  A rule is a pure function of (phi, gradient, state), so the
same rule serves a caller who has the gradient already, an inner solve to tolerance, and K steps
that are differentiated afterwards.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varmeta.graphs.capture import tracing
from varmeta.graphs.pieces import apply, run
from varmeta.numerics import tree
from varmeta.numerics.solution import Result, Solution, checked
from varmeta.numerics.steps import (
    Advance,
    Begin,
    Evaluation,
    Losses,
    Pace,
    Steps,
    Walk,
    block_size,
    loss_at,
    without_graph,
)
from varmeta.numerics.tree import Tree

_HOST_READS_EVERY = (
    8  # steps between two looks at "has everybody converged?", which make an accelerator wait
)


class Minimizer(ABC):
    """A way to minimise: `solve`.  Subclasses hold choices, never state.

    A rule that needs the gradient alone is written faster as a `FirstOrderMinimizer`.

    >>> import torch
    >>> from varmeta.numerics.newton import NewtonCG
    >>> fn = lambda phi: (phi["w"] - 2.0).square().sum(-1)  # a loss per task
    >>> minimize(fn, {"w": torch.zeros(1, 2)}, NewtonCG()).value["w"]
    tensor([[2., 2.]])
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

        fn: phi to losses `(tasks,)`; phi: where to start, `(tasks, ...)` each.  Returns a
            `Solution`, whose stats have "evaluations", `(tasks,)`.

        Raises ValueError for what the rule cannot do, as the derivative of Newton's steps.
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
    return checked(found, minimizer, ("evaluations",), phi)


class FirstOrderMinimizer(Minimizer):
    """A rule that needs the gradient alone: a subclass writes `init` and `update`.

    phi, its gradient and the state are trees of tensors `(tasks, ...)`.

    >>> import torch
    >>> from varmeta.numerics.first_order import GradientDescent
    >>> rule, phi = GradientDescent(lr=0.5), {"w": torch.ones(1, 2)}
    >>> rule.update(phi, {"w": torch.ones(1, 2)}, rule.init(phi))
    ({'w': tensor([[0.5000, 0.5000]])}, {})
    """

    @abstractmethod
    def init(self, phi: Tree) -> Tree:
        """The state before the first step.

        Every tensor has the task axis first, `(tasks, ...)`, so rows can be taken and put back.
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
            some = Steps(self, range(begin, min(begin + size, steps)), go, create_graph)
            walk = (
                some(fn, walk, pace)
                if recompute is None
                else without_graph(some, fn, walk, pace, recompute)
            )
        point = walk.point
        end = go(fn, loss_at, point)
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
        limit, final = (max_steps, Evaluation.FULL) if steps is None else (steps, Evaluation.LOSS)
        middle = Evaluation.GRAPH if create_graph else Evaluation.FULL
        bound = tolerance if steps is None else None
        # without a graph the start is copied: the result must not share memory with it
        start = phi if create_graph else tree.map_tree(lambda x: x.detach().clone(), phi)
        # a compiled piece has no graph of autograd's
        go = apply if create_graph or pace.has_graph else run
        walk = go(fn, Begin(self, bound, middle if limit else final), start)
        for count in range(1, limit + 1):
            if steps is None and count % _HOST_READS_EVERY == 1 and not bool(walk["active"].any()):
                break
            advance = Advance(self, steps is None, middle if count < limit else final)
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


def _check_count(name: str, value: int) -> None:
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if value < 0:
        raise ValueError(f"{name} must not be negative, but is {value}")
