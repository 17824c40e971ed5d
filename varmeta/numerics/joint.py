"""Newton's method for many small problems that share a few numbers: min over phi, eta of sum_i
F_i(phi_i, eta) + penalty(eta).

The Hessian is an arrowhead: one block A_i per task, borders B_i, and a corner C.  Eliminating phi
leaves the Schur complement S = C - sum_i B_i' A_i^-1 B_i, as small as eta, so a Newton step costs
little more than one Hessian product per number in a row of phi and in eta.  Nothing here knows what
the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta.numerics.joint_model import (
    Convex,
    Penalty,
    Quadratic,
    SharedLosses,
    SharedProblem,
    convex_phi,
)
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree

# The constants below were chosen on nine linear mixed models from six starts each, most of them
# absurd; only speed and how far off a start may be depend on them, not the answer.
_SUFFICIENT = 0.25  # of the predicted decrease, the share that a step of eta must achieve
_FIRST_DAMPING, _MORE_DAMPING, _TRIALS = 1e-3, 4.0, 25
_CORRECTIONS = 2  # further steps of phi with the Hessian at hand, before eta moves
_OWN_TRIALS = 8  # halvings of the tasks alone whose derivative is lost, before all step back
_RESETTLE = 3  # Newton steps of phi at a trial point of eta
_LATE = 1.0  # nats: below this decrement the end is near
_NEGATIVE = -1e-6  # an equilibrated eigenvalue below this is negative beyond rounding
_FLAT = 1e-5  # one below this says that some entries of eta can hardly be told apart (0 where they cannot at all)


class JointSolution(NamedTuple):
    """What `minimize_jointly` found.

    phi, eta: the minimum, detached, shaped as they came.
    result: one `Result` for the whole.
    stats: see `minimize_jointly`.
    """

    phi: Tree
    eta: dict[str, Tensor]
    result: Result
    stats: dict[str, Any]


class Step(NamedTuple):
    """Where an iteration arrived: its number, from 1; the total loss; the point; the work so far,
    as in the stats.
    """

    number: int
    loss: float
    phi: Tree
    eta: dict[str, Tensor]
    evaluations: float


def minimize_jointly(
    fn: SharedLosses,
    phi: Tree,
    eta: dict[str, Tensor],
    *,
    penalty: Penalty | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    callback: Callable[[Step], object] | None = None,
) -> JointSolution:
    """Minimise sum_i fn(phi, eta)_i + penalty(eta) over phi and eta together.

    Each iteration (1) assembles the Hessian by automatic differentiation, (2) moves phi at fixed
    eta, every task with a damping of its own, until phi is about minimal, (3) moves eta, phi
    following to first order, damped until the whole falls by a quarter of what was predicted.
    Undamped, (2) and (3) together are Newton's step, and convergence is quadratic.  Where a block
    is not positive definite, the coupling *between the named entries* is weakened, and within an
    entry eigenvalues are replaced by their absolute values; no parameter may promise more than the
    loss itself.  All of it is invariant to the parameters' units.

    It stops when the Newton decrement, 1/2 g' H^-1 g, the decrease still to be had, is at most
    tolerance * max(1, |total|) at two iterations in a row.  That test is met too where the infimum
    lies at infinity and the loss flattens out exponentially, such as a variance whose best value is
    0.  A saddle is left along its direction of negative curvature.  A function with several minima
    may end in any of them.

    Args: fn: see `SharedLosses`; twice differentiable. phi: where to start, `(tasks, ...)`; scalars
        per task `(tasks,)` are fine. eta: where to start, tensors of any shape without task axis;
        `{}` leaves the tasks independent. penalty: a scalar of eta alone, added once. tolerance:
        relative, in the unit of the loss; not below 1e-6 in float32. max_steps: Newton iterations.
        callback: called with a `Step` after each iteration.

    Returns: `JointSolution`; its stats are "loss" (totals, the start first), "losses" (at the end,
        `(tasks,)`), "decrement" (in the loss's unit, before the last step, so an upper bound),
        "gradient_norm", "steps", "evaluations" (work in units of one loss with its gradient: a loss
        alone 1/2, a Hessian column 2), and "flat" (in float64, the names of eta that a direction
        without curvature to speak of leads along: what fn does not determine one by one), and
        "failed" (the tasks that a loss or derivative not finite ended it at, `(tasks,)`). A step to
        where one is not finite is shortened, first of the tasks to blame alone. The result is
        NON_FINITE where that is so at the start, DIVERGED where no step to a lower loss is left but
        such (the last good point is returned), STAGNATED where rounding lets no step lower the
        loss, else CONVERGED or STEP_LIMIT.

    Raises:
        ValueError: phi is empty or its leading sizes differ, an argument is out of range, or fn does not return one
            differentiable loss per task.
        TypeError: the tensors are not floating, or of several dtypes.

    Sources: modified Newton steps and their damping, Nocedal and Wright, Numerical Optimization
    (2006), sections 3.4 and 10.3; absolute eigenvalues, Dauphin et al., NeurIPS 2014;
    equilibration, Ruiz, report RAL-TR-2001-034.

    Example:
        >>> fn = lambda phi, eta: (phi["w"] - torch.tensor([1.0, 3.0])) ** 2 + (phi["w"] - eta["loc"]) ** 2
        >>> solution = minimize_jointly(fn, {"w": torch.zeros(2)}, {"loc": torch.tensor(0.0)})
        >>> solution.phi["w"], solution.eta["loc"], solution.result.name
        (tensor([1.5000, 2.5000]), tensor(2.), 'CONVERGED')
    """
    _check(phi, eta, tolerance, max_steps)
    problem = SharedProblem(fn, phi, eta, penalty)
    x, e = problem.start()
    eps = torch.finfo(x.dtype).eps
    tolerance = max(tolerance, 1e-6 if eps > 1e-10 else 1e-14)
    losses, total = problem.loss(x, e)
    history, damping, was_small = [total], 0.0, False
    result, decrement, steps = Result.STEP_LIMIT, math.nan, 0
    model = Quadratic(problem, x, e, losses) if max_steps else None
    failed, blocked = torch.zeros(len(x), dtype=torch.bool, device=x.device), 0
    if model is not None and not model.finite:
        result, failed = Result.NON_FINITE, model.failed
    while model is not None and model.finite and steps < max_steps:
        good, slack = (x, e, losses), 10 * eps * max(1.0, float(losses.abs().sum()))
        decrement, limit = (
            model.decrement_phi + model.decrement_eta,
            tolerance * max(1.0, abs(total)),
        )
        small = decrement <= limit

        x, losses, reduced, walled, trials = _settle_phi(
            problem, model, x, e, losses, thorough=not small
        )
        base = float(losses.sum() + problem.penalty(e))
        # while phi has everything to gain, what eta has may drown in rounding errors, which any
        # step would pass
        moved = None
        if len(e) and (small or model.eta_decrement(reduced) > slack):
            moved = _move_eta(problem, model, x, e, base, reduced, damping, slack)
        x, e, losses, new, damping = moved or (x, e, losses, base, 0.0)
        stuck = moved is None and not new < total - slack
        if small or stuck:
            way_out = _escape(problem, model, x, e, new, max(limit, slack))
            if way_out is not None:
                (x, e, losses, new), small, stuck = way_out, False, False
        done = small and (was_small or stuck)
        if not (done or stuck) and steps + 1 < max_steps:
            # The trials above looked at losses alone, and a derivative may be lost where the loss
            # is finite. At a wall each step covers half of what is left: such steps are few, not
            # endless.
            arrived = Quadratic(problem, x, e, losses)
            ahead: Quadratic | None = arrived
            if not arrived.finite:
                nearer = _step_back(
                    problem,
                    good,
                    (x, e),
                    arrived,
                    total + slack,
                    max(0, _TRIALS - blocked - trials),
                )
                walled, trials = nearer.failed, trials + nearer.trials
                x, e, losses, new, small = nearer.x, nearer.e, nearer.losses, nearer.total, False
                ahead = nearer.model
            if ahead is None:
                result, failed = Result.DIVERGED, walled
                break
            blocked, model = (blocked + trials if trials else 0), ahead
        total, steps = new, steps + 1
        history.append(total)
        if callback is not None:
            callback(Step(steps, total, *problem.named(x, e), problem.evaluations))
        # a second small decrement: the step between them is what makes the parameters, not the loss
        # alone, exact
        if done:
            result = Result.CONVERGED
            break
        if trials and (stuck or blocked >= _TRIALS):
            result, failed = Result.DIVERGED, walled
            break
        if stuck:
            result = Result.STAGNATED
            break
        was_small = small
    g_phi, g_eta = problem.gradient(x, e)
    stats = {
        "loss": history,
        "losses": losses,
        "decrement": decrement,
        "gradient_norm": math.sqrt(float(g_phi.square().sum() + g_eta.square().sum())),
        "steps": steps,
        "evaluations": problem.evaluations,
        "flat": _flat(problem, model)
        if result == Result.CONVERGED and model and len(e) and eps < 1e-10
        else (),
        "failed": failed
        if result in (Result.NON_FINITE, Result.DIVERGED)
        else torch.zeros_like(failed),
    }
    return JointSolution(*problem.named(x, e), result, stats)


# -- the steps -------------------------------------------------------------------------------------


def _settle_phi(
    problem: SharedProblem, model: Quadratic, x: Tensor, e: Tensor, losses: Tensor, thorough: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Bring phi near its minimum at fixed eta; also the gradient with respect to eta there, and see
    `_before_walls`.

    Where eta has far more to gain than phi, one step does: with eta's it makes Newton's step.
    """
    good, walled, trials = (x, losses), torch.zeros(len(x), dtype=torch.bool, device=x.device), 0
    x, losses = _move_phi(problem, model.phi, x, e, losses, model.g_phi)
    if not thorough or model.decrement_phi <= 1e-3 * model.decrement_eta:
        return x, losses, model.reduced, walled, trials
    for correction in range(_CORRECTIONS + 1):
        x, losses, g_phi, g_eta, at_wall, more = _before_walls(problem, good, x, e, losses)
        walled, trials = walled | at_wall, trials + more
        reduced = model.reduce(g_phi, g_eta)
        left = model.phi_decrement(g_phi)
        if (
            left <= 1e-2 * (model.eta_decrement(reduced) if len(e) else 0.0)
            or correction == _CORRECTIONS
            or more
        ):
            break
        good = x, losses
        x, losses = _move_phi(problem, model.phi, x, e, losses, g_phi)
    return x, losses, reduced, walled, trials


def _before_walls(
    problem: SharedProblem, good: tuple[Tensor, Tensor], x: Tensor, e: Tensor, losses: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """phi with its gradient, where each task whose gradient is lost has gone back half the way to
    `good`, as often as needed.

    Also which tasks did, and how many trials it took.
    """
    x_good, losses_good = good
    g_phi, g_eta = problem.gradient(x, e)
    bad = ~g_phi.isfinite().all(-1)
    walled, trials = bad, 0
    while bool(bad.any()):
        trials += 1
        back = x_good if trials == _OWN_TRIALS else 0.5 * (x + x_good)
        x = torch.where(bad.unsqueeze(-1), back, x)
        losses, _ = problem.loss(x, e)
        g_phi, g_eta = problem.gradient(x, e)
        if trials == _OWN_TRIALS:
            break
        bad = ~g_phi.isfinite().all(-1) | (walled & ~(losses <= losses_good))
    return x, losses, g_phi, g_eta, walled, trials


def _move_phi(
    problem: SharedProblem, convex: Convex, x: Tensor, e: Tensor, losses: Tensor, g_phi: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of phi at fixed eta; each task raises its own damping until its loss falls, or stays
    where it is.
    """
    slack = 10 * torch.finfo(x.dtype).eps * losses.abs().clamp(min=1)
    damping = x.new_zeros(len(x), 1, 1)
    for _ in range(_TRIALS):
        step = -convex.solve(g_phi.unsqueeze(-1), damping).squeeze(-1)
        new, _ = problem.loss(x + step, e)
        good = new.isfinite() & (new <= losses + 1e-4 * (g_phi * step).sum(-1) + slack)
        if bool(good.all()):
            break
        raised = (damping * 2 * _MORE_DAMPING).clamp(min=_FIRST_DAMPING)
        damping = torch.where(good[:, None, None], damping, raised)
    return torch.where(good.unsqueeze(-1), x + step, x), torch.where(good, new, losses)


def _newton_phi(
    problem: SharedProblem, x: Tensor, e: Tensor, losses: Tensor
) -> tuple[Tensor, Tensor]:
    """One Newton step of phi at fixed eta, with a fresh Hessian."""
    g_phi, blocks = problem.phi_hessian(x, e)
    if not (g_phi.isfinite().all() and blocks.isfinite().all()):
        return x, losses
    convex = convex_phi(problem, g_phi, blocks, losses)
    return _move_phi(problem, convex, x, e, losses, g_phi)


def _move_eta(
    problem: SharedProblem,
    model: Quadratic,
    x: Tensor,
    e: Tensor,
    base: float,
    reduced: Tensor,
    last: float,
    slack: float,
) -> tuple[Tensor, Tensor, Tensor, float, float] | None:
    """One step of eta with phi following; None where no damping lowers the total.  `last`: the
    damping used before.
    """
    # such that the softest direction, the likeliest to be overdone, is halved
    damping, first = 0.0, min(_FIRST_DAMPING, float(model.eta.values.min()))
    for _ in range(_TRIALS):
        step = model.eta_step(reduced, damping)
        x_new, e_new = x - model.follow @ step, e + step
        losses, total = problem.loss(x_new, e_new)
        goal = (
            base
            + slack
            + _SUFFICIENT * float((reduced * step).sum() + 0.5 * model.eta.square(step))
        )
        # In a narrow curved valley (a covariance about to lose rank) phi follows a straight step of
        # eta badly, and without this the steps become ever shorter.  Far from a minimum it would
        # hide how bad a step was.
        for _ in range(_RESETTLE if model.decrement_eta <= _LATE else 0):
            if not math.isfinite(total) or total <= goal:
                break
            x_new, losses = _newton_phi(problem, x_new, e_new, losses)
            total = float(losses.sum() + problem.penalty(e_new))
        if math.isfinite(total) and total <= goal:
            return x_new, e_new, losses, total, damping
        # no need to begin from the bottom each time
        damping = damping * _MORE_DAMPING if damping else max(last / _MORE_DAMPING**2, first)
    return None


class _Nearer(NamedTuple):
    """A point before a wall, with its model; `model` None where there is none.  failed: the tasks
    last to blame.
    """

    x: Tensor
    e: Tensor
    losses: Tensor
    total: float
    model: Quadratic | None
    failed: Tensor
    trials: int


def _step_back(
    problem: SharedProblem,
    good: tuple[Tensor, Tensor, Tensor],
    arrived: tuple[Tensor, Tensor],
    ahead: Quadratic,
    goal: float,
    trials: int,
) -> _Nearer:
    """A point between a good one and one where a derivative is not finite, where all is finite and
    the total at most `goal`.

    Only the tasks to blame step back, as long as that serves: one at a wall must not hold up the
        others.
    """
    x_good, e_good, losses_good = good
    along_x, along_e = arrived[0] - x_good, arrived[1] - e_good
    share, whole, failed = x_good.new_ones(len(x_good), 1), 1.0, ahead.failed
    for trial in range(trials):
        bad = failed.unsqueeze(-1)
        if trial < _OWN_TRIALS and bool(bad.any()):
            share = torch.where(bad, 0.5 * share, share)
        else:
            whole *= 0.5
        x, e = x_good + whole * share * along_x, e_good + whole * along_e
        losses, total = problem.loss(x, e)
        if not (math.isfinite(total) and total <= goal):
            continue
        model = Quadratic(problem, x, e, losses)
        if model.finite:
            return _Nearer(x, e, losses, total, model, failed, trial + 1)
        failed = model.failed
    return _Nearer(x_good, e_good, losses_good, math.nan, None, failed, trials)


def _escape(
    problem: SharedProblem, model: Quadratic, x: Tensor, e: Tensor, total: float, gain: float
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Leave a saddle along negative curvature, of eta or else of phi, if that lowers the total by
    more than `gain`.
    """
    ways = []
    if len(e) and bool(model.eta.lowest < _NEGATIVE):
        ways.append((-(model.follow @ model.eta.direction), model.eta.direction))
    saddle = (model.phi.lowest < _NEGATIVE).unsqueeze(-1)
    if bool(saddle.any()):
        ways.append((torch.where(saddle, model.phi.direction, 0.0), torch.zeros_like(e)))
    for along_x, along_e in ways:
        for length in (1.0, -1.0, 0.1, -0.1, 0.01, -0.01):
            x_new, e_new = x + length * along_x, e + length * along_e
            losses, new = problem.loss(x_new, e_new)
            if math.isfinite(new) and new < total - gain:
                return x_new, e_new, losses, new
    return None


def _flat(problem: SharedProblem, model: Quadratic) -> tuple[str, ...]:
    """The names of eta along the softest direction, where its curvature is next to nothing."""
    if float(model.eta.lowest) >= _FLAT:
        return ()
    # in the units in which every entry alone has curvature 1
    share = (model.eta.direction / model.eta.scale).abs() / model.eta.direction.div(
        model.eta.scale
    ).norm()
    entry = problem.entries()[1]
    return tuple(
        name for i, name in enumerate(problem.eta) if bool((share[entry == i] > 0.2).any())
    )


def _check(phi: Tree, eta: dict[str, Tensor], tolerance: float, max_steps: int) -> None:
    shapes = {name: tuple(x.shape) for name, x in phi.items()}
    if not phi or not all(shapes.values()) or not sum(x.numel() for x in phi.values()):
        raise ValueError(
            f"phi must hold numbers, in tensors with the task axis first; its shapes are {shapes}"
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"every tensor in phi needs the same task axis first, but the shapes are {shapes}"
        )
    dtypes = {x.dtype for x in (*phi.values(), *eta.values())}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise TypeError(
            f"phi and eta must be floating tensors of one dtype, not {sorted(map(str, dtypes))}"
        )
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"max_steps must be a whole number of at least 0, not {max_steps!r}")
