"""Newton for many problems that share numbers: min over phi, eta of sum_i F_i + penalty.

F_i(phi_i, eta) is smooth, the penalty a function of eta alone.

The Hessian is an arrowhead: one block A_i per task, borders B_i, and a corner C.  Eliminating phi
leaves the Schur complement S = C - sum_i B_i' A_i^-1 B_i, as small as eta, so a Newton step costs
little more than one Hessian product per number in a row of phi and in eta.  Nothing here knows what
the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta.numerics.joint_model import (
    Convex,
    Derivatives,
    Penalty,
    Point,
    Quadratic,
    SharedLosses,
    SharedProblem,
    Single,
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
_MOST = 1e-3  # nats; a decrement above this is never next to nothing, however large the total
_ROUNDED = 0.1  # nats that rounding may leave of a total and that are called converged
_NEGATIVE = -1e-6  # an equilibrated eigenvalue below this is negative beyond rounding
# one below this says that some entries of eta can hardly be told apart (0 where they cannot at all)
_FLAT = 1e-5


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
    """Where an iteration arrived.

    Its number, from 1; the total loss; the point; the work so far, as in the stats.
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

    fn: see `SharedLosses`; twice differentiable.
    phi: where to start, `(tasks, ...)`; scalars per task `(tasks,)` are fine.
    eta: where to start, tensors of any shape without task axis; `{}` leaves the tasks independent.
    penalty: a scalar of eta alone, added once.
    tolerance: relative, in the unit of the loss; not below 1e-6 in float32.
    max_steps: Newton iterations.
    callback: called with a `Step` after each iteration.

    Returns a `JointSolution`; its stats are "loss" (totals, the start first), "losses" (at the end,
    `(tasks,)`), "decrement" (in the loss's unit, before the last step, so an upper bound),
    "gradient_norm", "steps", "evaluations" (work in units of one loss with its gradient: a loss
    alone 1/2, a Hessian column 2), "flat" (in float64, the names of eta, or without eta of the only
    row of phi, that a direction without curvature to speak of leads along: what fn does not
    determine one by one), and "failed" (the tasks that a loss or derivative not finite ended it at,
    `(tasks,)`).

    A step to where a loss is not finite is shortened, first of the tasks to blame alone.  The
    result is NON_FINITE where that is so at the start, or of the total at the end, DIVERGED where
    no step to a lower loss is left but such (the last good point is returned), STAGNATED where
    rounding lets no step lower the loss, else CONVERGED or STEP_LIMIT.

    Raises ValueError where phi is empty or its leading sizes differ, an argument is out of range,
    or fn does not return one differentiable loss per task; TypeError where the tensors are not
    floating, or of several dtypes.

    Source: modified Newton steps and their damping, Nocedal and Wright, Numerical Optimization
    (2006), sections 3.4 and 10.3; absolute eigenvalues, Dauphin et al., NeurIPS 2014;
    equilibration, Ruiz, report RAL-TR-2001-034.

    >>> y = torch.tensor([1.0, 3.0])
    >>> fn = lambda phi, eta: (phi["w"] - y) ** 2 + (phi["w"] - eta["loc"]) ** 2
    >>> solution = minimize_jointly(fn, {"w": torch.zeros(2)}, {"loc": torch.tensor(0.0)})
    >>> solution.phi["w"], solution.eta["loc"], solution.result.name
    (tensor([1.5000, 2.5000]), tensor(2.), 'CONVERGED')
    """
    _check(phi, eta, tolerance, max_steps)
    problem = SharedProblem(fn, phi, eta, penalty)
    x, e = problem.start()
    eps = torch.finfo(x.dtype).eps
    tolerance = max(tolerance, 1e-6 if eps > 1e-10 else 1e-14)
    place = _Place(x, e, *problem.loss(x, e))
    model = Quadratic(problem, x, e, place.losses) if max_steps else None
    history, decrement, damping, was_small, blocked = [place.total], math.nan, 0.0, False, 0
    result, failed = Result.STEP_LIMIT, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if model is not None and not model.finite:
        result, failed = Result.NON_FINITE, model.failed
    while model is not None and model.finite and len(history) <= max_steps:
        slack = 10 * eps * max(1.0, float(place.losses.abs().sum()))
        # a share of a total so large that whole nats are left in it is no convergence, nor is one
        # of an infinite total, as outside a hyperprior's support
        limit = min(tolerance * max(1.0, abs(place.total)), max(_MOST, slack))
        limit = limit if math.isfinite(place.total) else 0.0
        decrement = model.decrement_phi + model.decrement_eta
        move = _move(problem, model, place, damping, decrement <= limit, limit, slack)
        # a second small decrement: the step between them is what makes the parameters, not the loss
        # alone, exact
        done = move.small and (was_small or move.stuck)
        if not (done or move.stuck) and len(history) < max_steps:
            ahead, move = _model_ahead(problem, place, move, slack, blocked)
            if ahead is None:
                result, failed = Result.DIVERGED, move.walled
                break
            blocked, model = (blocked + move.trials if move.trials else 0), ahead
        place, damping, was_small = move.place, move.damping, move.small
        history.append(place.total)
        if callback is not None:
            point = problem.named(place.x, place.e)
            callback(Step(len(history) - 1, place.total, *point, problem.evaluations))
        if done:
            # where rounding alone is more than that, nobody knows how far it is
            result = Result.CONVERGED if decrement <= _ROUNDED else Result.STAGNATED
            break
        if move.trials and (move.stuck or blocked >= _TRIALS):
            result, failed = Result.DIVERGED, move.walled
            break
        if move.stuck:
            result = Result.STAGNATED
            break
    if not math.isfinite(place.total):
        result = Result.NON_FINITE
    stats = _stats(problem, model, place, history, decrement, result, failed)
    return JointSolution(*problem.named(place.x, place.e), result, stats)


def minimize_single(
    fn: Callable[[Point], Tensor],
    start: Mapping[str, Tensor],
    written: Derivatives | None = None,
    **options: Any,
) -> JointSolution:
    """Minimise a scalar of numbers by name: `minimize_jointly` of one task, whose `row` they are.

    written: see `Single`.  options: as of `minimize_jointly`.

    >>> found = minimize_single(lambda p: (p["a"] - 1.0) ** 2, {"a": torch.tensor(0.0)})
    >>> found.phi["a"]
    tensor([1.])
    """
    phi = {name: value.unsqueeze(0) for name, value in start.items()}
    return minimize_jointly(Single(fn, written), phi, {}, **options)


class _Place(NamedTuple):
    """Rows of phi, eta, the losses there, and their total with the penalty."""

    x: Tensor
    e: Tensor
    losses: Tensor
    total: float


class _Move(NamedTuple):
    """Where an iteration's steps lead.

    small: whether there was next to nothing to gain, and no saddle to leave; stuck: whether no step
        lowers the total.
    walled: the tasks that a derivative not finite stopped; trials: how often.
    """

    place: _Place
    damping: float
    small: bool
    stuck: bool
    walled: Tensor
    trials: int


def _stats(
    problem: SharedProblem,
    model: Quadratic | None,
    place: _Place,
    history: list[float],
    decrement: float,
    result: Result,
    failed: Tensor,
) -> dict[str, Any]:
    """See `minimize_jointly`."""
    g_phi, g_eta = problem.gradient(place.x, place.e)
    exact = result == Result.CONVERGED and torch.finfo(place.x.dtype).eps < 1e-10
    ended_by_it = result in (Result.NON_FINITE, Result.DIVERGED)
    return {
        "loss": history,
        "losses": place.losses,
        "decrement": decrement,
        "gradient_norm": math.sqrt(float(g_phi.square().sum() + g_eta.square().sum())),
        "steps": len(history) - 1,
        "evaluations": problem.evaluations,
        "flat": _flat(problem, model) if exact and model and _is_one(place) else (),
        "failed": failed if ended_by_it else torch.zeros_like(failed),
    }


# -- the steps -------------------------------------------------------------------------------------


def _move(
    problem: SharedProblem,
    model: Quadratic,
    place: _Place,
    damping: float,
    small: bool,
    limit: float,
    slack: float,
) -> _Move:
    """Steps of phi and then of eta from a place, or out of a saddle.

    small: whether the decrement is within `limit`; slack: what rounding may make of the total.
    """
    x, losses, reduced, walled, trials = _settle_phi(
        problem, model, place.x, place.e, place.losses, thorough=not small
    )
    settled = _Place(x, place.e, losses, float(losses.sum() + problem.penalty(place.e)))
    # while phi has everything to gain, what eta has may drown in rounding errors, which any step
    # would pass
    moved = None
    if len(place.e) and (small or model.eta_decrement(reduced) > slack):
        moved = _move_eta(problem, model, settled, reduced, damping, slack)
    reached, damping = moved or (settled, 0.0)
    stuck = moved is None and not reached.total < place.total - slack
    if small or stuck:
        way_out = _escape(problem, model, reached, max(limit, slack))
        if way_out is not None:
            reached, small, stuck = way_out, False, False
    return _Move(reached, damping, small, stuck, walled, trials)


def _settle_phi(
    problem: SharedProblem, model: Quadratic, x: Tensor, e: Tensor, losses: Tensor, thorough: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Bring phi near its minimum at fixed eta; also the gradient with respect to eta there, and see
    `_before_walls`.

    Where eta has far more to gain than phi, one step does: with eta's it makes Newton's step.
    """
    good, walled, trials = (x, losses), torch.zeros(len(x), dtype=torch.bool, device=x.device), 0
    x, losses = _move_phi(problem, model.phi, x, e, losses, model.g_phi)
    # corrections by the same Hessian pay where one costs many gradients
    if not thorough or problem.written or model.decrement_phi <= 1e-3 * model.decrement_eta:
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
    """One step of phi at fixed eta.

    Each task raises its own damping until its loss falls, or stays where it is.
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
    place: _Place,
    reduced: Tensor,
    last: float,
    slack: float,
) -> tuple[_Place, float] | None:
    """One step of eta with phi following, and its damping.

    None where none lowers the total. `last`: the damping used before.
    """
    # such that the softest direction, the likeliest to be overdone, is halved
    damping, first = 0.0, min(_FIRST_DAMPING, float(model.eta.values.min()))
    for _ in range(_TRIALS):
        step = model.eta_step(reduced, damping)
        x_new, e_new = place.x - model.follow @ step, place.e + step
        losses, total = problem.loss(x_new, e_new)
        goal = (
            place.total
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
            return _Place(x_new, e_new, losses, total), damping
        # no need to begin from the bottom each time
        damping = damping * _MORE_DAMPING if damping else max(last / _MORE_DAMPING**2, first)
    return None


def _model_ahead(
    problem: SharedProblem, good: _Place, move: _Move, slack: float, blocked: int
) -> tuple[Quadratic | None, _Move]:
    """The model where the steps lead, or, where a derivative is lost there, at a place on the way;
    None where there is none.  `blocked`: trials of the iterations just before.

    The steps looked at losses alone, and a derivative may be lost where the loss is finite.  At a
    wall each step covers half of what is left: such steps are few, not endless.
    """
    arrived = Quadratic(problem, move.place.x, move.place.e, move.place.losses)
    if arrived.finite:
        return arrived, move
    left = max(0, _TRIALS - blocked - move.trials)
    nearer = _step_back(problem, good, move.place, arrived, good.total + slack, left)
    trials = move.trials + nearer.trials
    return nearer.model, move._replace(
        place=nearer.place, small=False, walled=nearer.failed, trials=trials
    )


class _Nearer(NamedTuple):
    """A place before a wall, with its model; `model` None where there is none.  failed: the tasks
    last to blame.
    """

    place: _Place
    model: Quadratic | None
    failed: Tensor
    trials: int


def _step_back(
    problem: SharedProblem,
    good: _Place,
    arrived: _Place,
    ahead: Quadratic,
    goal: float,
    trials: int,
) -> _Nearer:
    """A place between a good one and one where a derivative is not finite, where all is finite and
    the total at most `goal`.

    Only the tasks to blame step back, as long as that serves: one at a wall must not hold up the
        others.
    """
    along_x, along_e = arrived.x - good.x, arrived.e - good.e
    share, whole, failed = good.x.new_ones(len(good.x), 1), 1.0, ahead.failed
    for trial in range(trials):
        bad = failed.unsqueeze(-1)
        if trial < _OWN_TRIALS and bool(bad.any()):
            share = torch.where(bad, 0.5 * share, share)
        else:
            whole *= 0.5
        x, e = good.x + whole * share * along_x, good.e + whole * along_e
        losses, total = problem.loss(x, e)
        if not (math.isfinite(total) and total <= goal):
            continue
        model = Quadratic(problem, x, e, losses)
        if model.finite:
            return _Nearer(_Place(x, e, losses, total), model, failed, trial + 1)
        failed = model.failed
    return _Nearer(good, None, failed, trials)


def _escape(problem: SharedProblem, model: Quadratic, place: _Place, gain: float) -> _Place | None:
    """Leave a saddle along negative curvature, of eta or else of phi, if that lowers the total by
    more than `gain`.
    """
    ways = []
    if len(place.e) and bool(model.eta.lowest < _NEGATIVE):
        ways.append((-(model.follow @ model.eta.direction), model.eta.direction))
    saddle = (model.phi.lowest < _NEGATIVE).unsqueeze(-1)
    if bool(saddle.any()):
        ways.append((torch.where(saddle, model.phi.direction, 0.0), torch.zeros_like(place.e)))
    for along_x, along_e in ways:
        for length in (1.0, -1.0, 0.1, -0.1, 0.01, -0.01):
            x, e = place.x + length * along_x, place.e + length * along_e
            losses, total = problem.loss(x, e)
            if math.isfinite(total) and total < place.total - gain:
                return _Place(x, e, losses, total)
    return None


def _is_one(place: _Place) -> bool:
    """Whether there is one vector to tell about: eta, or the only row of phi without one."""
    return bool(len(place.e)) or len(place.x) == 1


def _flat(problem: SharedProblem, model: Quadratic) -> tuple[str, ...]:
    """The names along the softest direction of eta, where its curvature is next to nothing; of the
    only row of phi where there is no eta.
    """
    names, entry, convex = problem.eta, problem.entries()[1], model.eta if problem.eta else None
    if convex is None:
        names, entry = problem.phi, problem.entries()[0]
        convex = Convex(*(part[0] for part in model.phi))
    if float(convex.lowest) >= _FLAT:
        return ()
    # in the units in which every entry alone has curvature 1
    share = (convex.direction / convex.scale).abs() / convex.direction.div(convex.scale).norm()
    return tuple(name for i, name in enumerate(names) if bool((share[entry == i] > 0.2).any()))


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
