"""Minimise one smooth loss per task by Newton's method, given only the loss.

The loss is a function that autograd differentiates twice.

Each iteration builds the graph of the gradient once, takes a direction from the Hessian
(`_dense_direction` for few parameters, `_truncated_direction` for many), and searches along it,
every task with its own length.  Inside, phi is rows `(tasks, size)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from varmeta.graphs.pieces import Graphed, linearize, run
from varmeta.numerics import tree
from varmeta.numerics.arguments import no_tensors
from varmeta.numerics.conjugate import ConjugateStep, walked
from varmeta.numerics.hessian import Rows, pulled_back, symmetric, unit_vectors
from varmeta.numerics.minimize import Minimizer
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.steps import Losses, value_and_gradient
from varmeta.numerics.tree import Tree

# nats that a step may promise where a task is said to have converged
_MOST = {torch.float64: 1e-8, torch.float32: 0.1}
# the share of slope x length that a step must gain; with 1e-4 steps that overshoot are taken too
# often
_ARMIJO = 0.1
_STEEP = (
    0.3  # a step after which the slope is still this share of what it was has been much too short
)
_BROKEN, _CREEP, _PATIENCE = (
    1e-3,
    1e-6,
    5,
)  # gain over promise, gain over loss, and how often in a row, to give up


@dataclass(frozen=True)
class NewtonCG(Minimizer):
    """Newton's method with a line search, per task.

    Quadratic convergence, on convex and other functions.

    Up to `dense_size` parameters a task the Hessian H is formed, rescaled to a unit diagonal so
    that the units of the parameters do not matter, and its eigenvalues are taken by absolute
    value.  Beyond, H d = -g is solved by conjugate gradients to the accuracy max(sqrt(eps),
    min(0.1, (|g| / |g before|)^2)) |g|, or up to the first direction of negative curvature; in the
    units that `minimize` was given, if any.  Steps are halved or so until the loss falls (Armijo),
    and doubled where it still falls steeply. Where the loss is level but for rounding, a full step
    must lower |g| by a tenth instead: so the gradient goes on down to its own rounding, and no task
    wanders there.

    A task ends as
      CONVERGED, when |g| <= tolerance (1 + |g at its start|) and the last step promised to lower
        the loss by no more than `tolerance`: in the parameters' units, or after a poor start, the
        first condition alone says little.  Also when no step gets further, and what is promised is
        below `tolerance` and the loss's rounding, 10 eps max(1, |loss|);
      NEGATIVE_CURVATURE, when one of these holds but the last H was indefinite: a saddle;
      STAGNATED, when no step lowers the loss, or five in a row by next to nothing, as at the kink
        of a ReLU;
      NON_FINITE, when its loss, gradient or Hessian is not finite, at its last finite point.

    There is no graph: `create_graph` is refused.  fn meets far points in the search;
    it must answer with inf or nan, not with an exception (switch the validation of distributions
    off).

    max_cg_steps: Hessian products per direction; default twice the parameters of a task, at
        most 500.
    damping: added to every eigenvalue of H, in the direction only; units of 1 / (unit of
        phi)^2.  Steps are not doubled then.
    max_backtracks: trial lengths per line search, beyond the first.
    dense_size: up to how many parameters a task H is formed; costs as many products, and its
        cube.  0: never.

    In the stats of `minimize`, "curvature" is the smallest Rayleigh quotient of H that the task's
    last direction met, NaN where none was needed.

    Raises ValueError for a number out of range.

    >>> from varmeta.numerics.minimize import minimize
    >>> c = torch.tensor([1.0, 4.0])  # two tasks, one number each
    >>> fn = lambda phi: (phi["w"] ** 2 + c).sqrt()
    >>> solution = minimize(fn, {"w": torch.tensor([0.5, 30.0])}, NewtonCG())
    >>> solution.worst.name, bool(solution.value["w"].abs().max() < 1e-3)
    ('CONVERGED', True)

    Source: Nocedal and Wright, Numerical Optimization (2006), sections 3.5 and 7.1; Eisenstat and
    Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci. Comput. 17 (1996),
    choice 2.
    """

    max_cg_steps: int | None = None
    damping: float = 0.0
    max_backtracks: int = 30
    dense_size: int = 64

    takes_units = True

    def __post_init__(self) -> None:
        no_tensors(self)
        if self.max_cg_steps is not None and self.max_cg_steps < 1:
            raise ValueError(f"max_cg_steps must be at least 1, not {self.max_cg_steps}")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must be a finite number of at least 0, not {self.damping}")
        if self.max_backtracks < 0 or self.dense_size < 0:
            raise ValueError(
                "max_backtracks and dense_size must not be negative, but are "
                f"{self.max_backtracks}, {self.dense_size}"
            )

    def solve(
        self,
        fn: Losses,
        phi: Tree,
        *,
        steps: int | None,
        tolerance: float,
        max_steps: int,
        create_graph: bool,
        units: Tree | None = None,
    ) -> Solution:
        if create_graph:
            raise ValueError(
                "NewtonCG's steps cannot be differentiated: unroll GradientDescent or Adam, or "
                "take the derivative at NewtonCG's minimum with ImplicitAdjoint"
            )
        x = tree.flatten(tree.detach(phi))
        scales = None if units is None else _scales(units, phi)
        point = _point(fn, x, phi)
        here = _Here(x, point.loss, point.norm)
        start, allowed = point.norm, tolerance * (1 + point.norm)
        finite = torch.isfinite(point.loss) & torch.isfinite(point.norm)
        # also a start whose gradient looks small: in what units is for the Hessian to say
        active = finite & (point.norm > 0)
        result = torch.where(active, int(Result.STEP_LIMIT), int(Result.CONVERGED))
        result = torch.where(finite, result, int(Result.NON_FINITE))
        curvature, forcing = torch.full_like(start, math.nan), torch.full_like(start, 0.1)
        idle = taken = torch.zeros_like(result)
        evaluations = torch.ones_like(start)

        for _ in range(max_steps if steps is None else steps):
            if not bool(active.any()):
                break
            way = self._direction(point, active, forcing, scales)
            curvature = torch.where(active, way.curvature, curvature)
            moving = active & way.sound
            step = self._step_along(fn, phi, here, point, way.direction, moving)
            point = step.point
            evaluations = evaluations + torch.where(active, way.work + step.work, 0)

            stepped = moving & (step.length > 0)
            arrived_finite = torch.isfinite(point.norm)
            broken = (active & ~way.sound) | (stepped & ~arrived_finite)
            stepped = stepped & arrived_finite
            idle = torch.where(stepped & step.creeping(here), idle + 1, 0)
            stuck = moving & ((step.length == 0) | (idle >= _PATIENCE))
            forcing = torch.where(stepped, _forcing(point.norm / here.norm), forcing)
            here = here.moved(point, stepped)
            taken = taken + stepped

            small = here.norm <= allowed
            done = stepped & small & ((step.promise <= tolerance) | (here.norm == 0))
            in_rounding = step.promise <= step.rounding.clamp(max=tolerance)
            # rounding in a gradient of any size may hide whole nats from a relative tolerance
            near = step.promise <= max(tolerance, _MOST[here.x.dtype])
            done = done | (stuck & ((small & near) | in_rounding))
            result = torch.where(stuck, int(Result.STAGNATED), result)
            result = torch.where(done, int(Result.CONVERGED), result)
            result = torch.where(done & ~way.convex, int(Result.NEGATIVE_CURVATURE), result)
            result = torch.where(broken, int(Result.NON_FINITE), result)
            active = stepped & ~done & ~stuck
        stats = {
            "gradient_norm": here.norm,
            "start_gradient_norm": start,
            "steps": taken,
            "evaluations": evaluations,
            "curvature": curvature,
        }
        return Solution(tree.unflatten(here.x, phi), result, stats)

    def _step_along(
        self,
        fn: Losses,
        phi: Tree,
        here: _Here,
        point: _Point | _GraphedPoint,
        direction: Tensor,
        moving: Tensor,
    ) -> _Step:
        """A full step of the tasks that move, or, where it serves badly, one of another length."""
        x, loss = here.x, here.loss
        direction = torch.where(moving[:, None], direction, 0)
        slope = torch.where(moving, _dot(point.gradient, direction), 0)
        promise = -0.5 * slope
        rounding = 10 * torch.finfo(x.dtype).eps * loss.abs().clamp(min=1)

        trial = _point(fn, x + direction, phi)
        lower = trial.loss <= loss + torch.minimum(_ARMIJO * slope, -rounding)
        # sums that cancel leave more rounding than the loss's size tells; the gradient is there
        # to judge
        level = (trial.loss <= loss + 100 * rounding) & (trial.norm <= 0.9 * here.norm)
        good = moving & torch.isfinite(trial.norm) & (lower | level)
        # where the promise is below rounding, shorter steps would be judged by noise
        shorter = moving & ~good & (promise > rounding)
        longer = good & lower & (_dot(trial.gradient, direction) < _STEEP * slope)
        longer = longer & (self.damping == 0)  # or it would undo the damping
        length, work = good.to(x.dtype), torch.ones_like(loss)
        if bool((shorter | longer).any()):
            line = _Line(fn, x, direction, phi, loss, slope, rounding)
            length, trials = line.search(length, trial.loss, shorter, longer, self.max_backtracks)
            trial = _point(fn, x + length[:, None] * direction, phi)
            work = work + 0.5 * trials + (shorter | longer)
        return _Step(trial, length, promise, rounding, work)

    def _direction(
        self, point: _Point | _GraphedPoint, active: Tensor, forcing: Tensor, scales: Tensor | None
    ) -> _Direction:
        size = point.x.shape[-1]
        if size <= self.dense_size:
            return _dense_direction(point, active, self.damping)
        limit = min(2 * size, 500) if self.max_cg_steps is None else self.max_cg_steps
        return _truncated_direction(point, active, self.damping, forcing, limit, scales)


class _Here(NamedTuple):
    """Where the tasks stand: their last rows with a finite loss and gradient."""

    x: Tensor
    loss: Tensor
    norm: Tensor

    def moved(self, point: _Point | _GraphedPoint, stepped: Tensor) -> _Here:
        return _Here(
            torch.where(stepped[:, None], point.x, self.x),
            torch.where(stepped, point.loss, self.loss),
            torch.where(stepped, point.norm, self.norm),
        )


class _Step(NamedTuple):
    """A step, each `(tasks,)`: where it leads, by which length, 0 for none.

    promise: by how much the quadratic model of a full step lowers the loss; rounding: of the loss;
        work: in gradients.
    """

    point: _Point | _GraphedPoint
    length: Tensor
    promise: Tensor
    rounding: Tensor
    work: Tensor

    def creeping(self, here: _Here) -> Tensor:
        """Whether it gains next to nothing: at a kink, as of a ReLU, Newton's promises are broken
        again and again while the loss creeps.
        """
        gain = here.loss - self.point.loss
        return (gain <= _BROKEN * self.promise) & (gain <= _CREEP * here.loss.abs().clamp(min=1))


def _forcing(ratio: Tensor) -> Tensor:
    """How accurate the next direction must be, from the ratio of the last two gradients."""
    return ratio.square().clamp(torch.finfo(ratio.dtype).eps ** 0.5, 0.1)


class _Point:
    """Loss `(tasks,)` and gradient `(tasks, size)` at the rows x, and products with the Hessian
    there.
    """

    def __init__(self, fn: Losses, x: Tensor, like: Tree) -> None:
        self.x, self._like = x, like
        self.loss, self._leaves, self._gradient = value_and_gradient(
            fn, _tree(x, like), create_graph=True
        )
        self.gradient = tree.flatten(tree.detach(self._gradient))
        self.norm = _norm(self.gradient)

    def linearized(self) -> Callable[[Tensor], Tensor]:
        return self.product

    def product(self, v: Tensor) -> Tensor:
        """H v, `(tasks, size)`."""
        parts = list(tree.unflatten(v, self._like).values())
        found = pulled_back(list(self._gradient.values()), list(self._leaves.values()), parts)
        return torch.cat([x.reshape(len(v), -1) for x in found], -1)

    def hessian(self) -> Tensor:
        """`(tasks, size, size)`, symmetric."""
        basis = unit_vectors(self.x)
        parts = tree.unflatten(basis.reshape(-1, basis.shape[-1]), self._like)
        stacks = [part.reshape(len(basis), len(self.x), *part.shape[1:]) for part in parts.values()]
        found = Rows()(list(self._gradient.values()), list(self._leaves.values()), stacks)
        rows = torch.cat([x.reshape(*basis.shape[:2], -1) for x in found], -1)
        return symmetric(rows.movedim(0, 1))


class _GraphedPoint:
    """The same of a fn that can be a graph, which is asked for the gradient, the Hessian or its
    products one by one.
    """

    def __init__(self, fn: Graphed, x: Tensor, like: Tree) -> None:
        self.x, self._fn, self._like = x, fn, like
        self.loss, self.gradient, self.norm = fn.run(_slope, x, like)

    def linearized(self) -> Callable[[Tensor], Tensor]:
        return linearize(self._fn, _products, self.x, self._like)[1]

    def hessian(self) -> Tensor:
        return cast("Tensor", self._fn.run(_hessian, self.x, self._like))


def _point(fn: Losses, x: Tensor, like: Tree) -> _Point | _GraphedPoint:
    return _GraphedPoint(fn, x, like) if isinstance(fn, Graphed) else _Point(fn, x, like)


def _slope(fn: Losses, x: Tensor, like: Tree) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, gradient = value_and_gradient(fn, _tree(x, like))
    rows = tree.flatten(gradient)
    return loss, rows, _norm(rows)


def _products(fn: Losses, x: Tensor, like: Tree) -> tuple[tuple[()], Callable[[Tensor], Tensor]]:
    return (), _Point(fn, x, like).product


def _hessian(fn: Losses, x: Tensor, like: Tree) -> Tensor:
    return _Point(fn, x, like).hessian()


def _loss_along(fn: Losses, x: Tensor, direction: Tensor, length: Tensor, like: Tree) -> Tensor:
    with torch.no_grad():
        return fn(_tree(x + length[:, None] * direction, like))


class _Direction(NamedTuple):
    """A direction `(tasks, size)` and, each `(tasks,)`, what was met on the way to it.

    curvature: the smallest Rayleigh quotient; convex: whether none was negative beyond rounding;
        work: in gradients;
    sound: whether all is finite.
    """

    direction: Tensor
    curvature: Tensor
    convex: Tensor
    work: Tensor
    sound: Tensor


def _dense_direction(point: _Point | _GraphedPoint, active: Tensor, damping: float) -> _Direction:
    """-|H + damping|^-1 g, with the absolute value taken in the units where the diagonal is 1."""
    h = point.hessian()
    eps = torch.finfo(h.dtype).eps
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    sound = torch.isfinite(h).all(-1).all(-1)
    # LAPACK raises on NaN, for all tasks at once
    h = torch.where((sound & active)[:, None, None], h + damping * identity, identity)
    diagonal = torch.maximum(h.diagonal(dim1=-2, dim2=-1).abs(), eps * h.abs().amax(-1))
    unit = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    values, vectors = torch.linalg.eigh(unit[:, :, None] * h * unit[:, None, :])
    largest = values.abs().amax(-1, keepdim=True)
    # the floor: parameters that do not matter have curvature 0 but for rounding
    magnitude = torch.maximum(values.abs(), torch.where(largest > 0, eps**0.75 * largest, 1))
    gradient = torch.where(active[:, None], point.gradient, 0)
    axes = unit[:, :, None] * vectors
    axis = axes.square().sum(-2)
    along = (axes.mT @ -gradient[..., None])[..., 0] / magnitude
    # each by itself: where one parameter's curvature has all but vanished, the others still take
    # their Newton step
    farthest = _farthest(point.x)[:, None] / axis.sqrt()
    direction = (axes @ along.clamp(-farthest, farthest)[..., None])[..., 0]
    quotients = values / axis
    work = torch.full_like(point.loss, 2.0 * h.shape[-1])
    convex = values[:, 0] >= -(eps**0.5) * largest[:, 0]
    return _Direction(direction, quotients.amin(-1) - damping, convex, work, sound)


def _truncated_direction(
    point: _Point | _GraphedPoint,
    active: Tensor,
    damping: float,
    forcing: Tensor,
    limit: int,
    scales: Tensor | None,
) -> _Direction:
    """CG on (H + damping) d = -g until |residual| <= forcing |g|; with scales S, on S (H + damping)
    S c = -S g, d = S c.

    A direction p without positive curvature is the last: d goes on along it by the step for
    |curvature|, at most to 100 times phi's own size.  To stop before it would be steepest descent
    again and again beside a ridge.
    """
    # in units of |g|: squares of very large or small gradients would leave the range of the dtype
    unit = torch.where(active, point.norm, 1)[:, None]
    r = torch.where(active[:, None], -point.gradient / unit, 0)
    step = ConjugateStep(damping, bounded=True)
    more = {"farthest": _farthest(point.x) / unit[:, 0]}
    walk = step.begin(r, active, **(more if scales is None else more | {"scales": scales}))
    walk["tolerance"] = forcing * walk["rz"].sqrt()
    walk = walked(point.linearized(), step, walk, limit)
    convex = walk["lowest"] >= -(torch.finfo(r.dtype).eps ** 0.5) * walk["largest"]
    sound = walk["result"] != Result.NON_FINITE
    work = 2.0 * (walk["steps"] + ~sound)
    return _Direction(unit * walk["x"], walk["curvature"], convex, work, sound)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _norm(a: Tensor) -> Tensor:
    largest = a.abs().amax(-1)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    return unit * (a / unit[:, None]).square().sum(-1).sqrt()


def _scales(units: Tree, phi: Tree) -> Tensor:
    """The units on rows, the largest of each task 1, and none so small that rounding would hide
    what is done along it.
    """
    rows = tree.flatten({name: units[name].detach() for name in phi})
    if not bool((torch.isfinite(rows) & (rows > 0)).all()):
        raise ValueError(
            "units must be positive and finite: they are the sizes of usual changes of phi's "
            "entries"
        )
    rows = rows / rows.amax(-1, keepdim=True)
    return rows.clamp(min=torch.finfo(rows.dtype).eps ** 0.25)


def _farthest(x: Tensor) -> Tensor:
    """How far one direction may lead, `(tasks,)`: a bound on nonsense, loose enough for a start in
    poor units.
    """
    return 100 * (1 + _norm(x))


class _Line(NamedTuple):
    """The lines x + length direction, one per task."""

    fn: Losses
    x: Tensor
    direction: Tensor
    like: Tree
    loss: Tensor
    slope: Tensor
    rounding: Tensor

    def search(
        self, length: Tensor, at_one: Tensor, shorter: Tensor, longer: Tensor, max_trials: int
    ) -> tuple[Tensor, Tensor]:
        """Lengths, 0 where none lowers the loss, and how many losses each task asked for.

        length: what a task settles for if nothing better is found; at_one: the losses at length 1;
        shorter, longer: the tasks that must go back, and those that may go on while the loss falls.
        """
        ahead, last, lowest, trials = (
            torch.ones_like(length),
            at_one,
            at_one,
            torch.zeros_like(length),
        )
        for _ in range(max_trials):
            searching = shorter | longer
            if not bool(searching.any()):
                break
            # the minimum of the parabola through what is known, but between a tenth and a half; a
            # tenth where it is not
            shrink = -0.5 * self.slope * ahead / (last - self.loss - ahead * self.slope)
            shrink = torch.where(torch.isfinite(last), shrink.nan_to_num(0.1).clamp(0.1, 0.5), 0.1)
            ahead = torch.where(shorter, shrink * ahead, torch.where(longer, 2 * ahead, length))
            last = run(self.fn, _loss_along, self.x, self.direction, ahead, self.like)
            trials = trials + searching
            enough = last <= self.loss + torch.minimum(_ARMIJO * ahead * self.slope, -self.rounding)
            enough = shorter & enough
            longer = longer & (last < lowest - self.rounding)
            length = torch.where(enough | longer, ahead, length)
            lowest = torch.where(longer, last, lowest)
            shorter = shorter & ~enough
        return length, trials


def _tree(x: Tensor, like: Tree) -> Tree:
    # contiguous: a compiled function may have been specialised to the strides of the caller's phi
    return tree.map_tree(lambda part: part.contiguous(), tree.unflatten(x, like))
