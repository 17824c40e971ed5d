"""Newton's method for many small problems that share a few numbers: min over phi, eta of sum_i F_i(phi_i, eta) + penalty(eta).

The Hessian is an arrowhead: one block A_i per task, borders B_i, and a corner C.  Eliminating phi leaves the Schur
complement S = C - sum_i B_i' A_i^-1 B_i, as small as eta, so a Newton step costs little more than one Hessian product per
number in a row of phi and in eta.  Nothing here knows what the numbers mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varmeta.numerics import tree
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree

Penalty = Callable[[dict[str, Tensor]], Tensor | float]
SharedLosses = Callable[[Tree, dict[str, Tensor]], Tensor]
"""(phi, eta) -> losses `(tasks,)`; loss i depends on row i of phi and on all of eta."""

# The constants below were chosen on nine linear mixed models from six starts each, most of them absurd; only speed and
# how far off a start may be depend on them, not the answer.
_KEEP = 0.4  # of the coupling that would make a block-diagonal model singular, the share that is kept
_SUFFICIENT = 0.25  # of the predicted decrease, the share that a step of eta must achieve
_FIRST_DAMPING, _MORE_DAMPING, _TRIALS = 1e-3, 4.0, 25
_CORRECTIONS = 2  # further steps of phi with the Hessian at hand, before eta moves
_RESETTLE = 3  # Newton steps of phi at a trial point of eta
_LATE = 1.0  # nats: below this decrement the end is near
_NEGATIVE = -1e-6  # an equilibrated eigenvalue below this is negative beyond rounding
_COLUMNS = 8  # Hessian columns made at once: enough to hide the overhead, few enough to bound the memory
# numbers in one tensor, beyond which a processor core is busy enough with a single column (measured: batches cost up to
# twice the loop's time there, and a third of it on small problems)
_BUSY = 50_000


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


def minimize_jointly(
    fn: SharedLosses,
    phi: Tree,
    eta: dict[str, Tensor],
    *,
    penalty: Penalty | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    callback: Callable[[int, float], object] | None = None,
) -> JointSolution:
    """Minimise sum_i fn(phi, eta)_i + penalty(eta) over phi and eta together.

    Each iteration (1) assembles the Hessian by automatic differentiation, (2) moves phi at fixed eta, every task with a
    damping of its own, until phi is about minimal, (3) moves eta, phi following to first order, damped until the whole
    falls by a quarter of what was predicted.  Undamped, (2) and (3) together are Newton's step, and convergence is
    quadratic.  Where a block is not positive definite, the coupling *between the named entries* is weakened, and within an
    entry eigenvalues are replaced by their absolute values; no parameter may promise more than the loss itself.  All of it
    is invariant to the parameters' units.

    It stops when the Newton decrement, 1/2 g' H^-1 g, the decrease still to be had, is at most
    tolerance * max(1, |total|) at two iterations in a row.  That test is met too where the infimum lies at infinity and
    the loss flattens out exponentially, such as a variance whose best value is 0.  A saddle is left along its direction
    of negative curvature.  A function with several minima may end in any of them.

    Args:
        fn: see `SharedLosses`; twice differentiable.
        phi: where to start, `(tasks, ...)`; scalars per task `(tasks,)` are fine.
        eta: where to start, tensors of any shape without task axis; `{}` leaves the tasks independent.
        penalty: a scalar of eta alone, added once.
        tolerance: relative, in the unit of the loss; not below 1e-6 in float32.
        max_steps: Newton iterations.
        callback: called with (number of the iteration, from 1; total loss after it).

    Returns:
        `JointSolution`; its stats are "loss" (totals, the start first), "losses" (at the end, `(tasks,)`), "decrement" (in
        the loss's unit, before the last step, so an upper bound), "gradient_norm", "steps", and "evaluations" (work in
        units of one loss with its gradient: a loss alone 1/2, a Hessian column 2).  The result is NON_FINITE where the
        loss or a derivative is not finite at the start, DIVERGED where that happens later (the last good point is
        returned), STAGNATED where rounding lets no step lower the loss, else CONVERGED or STEP_LIMIT.

    Raises:
        ValueError: phi is empty or its leading sizes differ, an argument is out of range, or fn does not return one
            differentiable loss per task.
        TypeError: the tensors are not floating, or of several dtypes.

    Sources: modified Newton steps and their damping, Nocedal and Wright, Numerical Optimization (2006), sections 3.4 and
    10.3; absolute eigenvalues, Dauphin et al., NeurIPS 2014; equilibration, Ruiz, report RAL-TR-2001-034.

    Example:
        >>> fn = lambda phi, eta: (phi["w"] - torch.tensor([1.0, 3.0])) ** 2 + (phi["w"] - eta["loc"]) ** 2
        >>> solution = minimize_jointly(fn, {"w": torch.zeros(2)}, {"loc": torch.tensor(0.0)})
        >>> solution.phi["w"], solution.eta["loc"], solution.result.name
        (tensor([1.5000, 2.5000]), tensor(2.), 'CONVERGED')
    """
    _check(phi, eta, tolerance, max_steps)
    problem = _Problem(fn, phi, eta, penalty)
    x, e = problem.start()
    eps = torch.finfo(x.dtype).eps
    tolerance = max(tolerance, 1e-6 if eps > 1e-10 else 1e-14)
    losses, total = problem.loss(x, e)
    history, last, damping, was_small = [total], (x, e, losses), 0.0, False
    result, decrement, steps = Result.STEP_LIMIT, math.nan, 0
    while steps < max_steps:
        model = _Quadratic(problem, x, e, losses)
        if not model.finite:
            result = Result.DIVERGED if steps else Result.NON_FINITE
            x, e, losses = last
            break
        last, slack = (x, e, losses), 10 * eps * max(1.0, float(losses.abs().sum()))
        decrement, limit = model.decrement_phi + model.decrement_eta, tolerance * max(1.0, abs(total))
        small = decrement <= limit

        x, losses, reduced = _settle_phi(problem, model, x, e, losses, thorough=not small)
        base = float(losses.sum() + problem.penalty(e))
        # while phi has everything to gain, what eta has may drown in rounding errors, which any step would pass
        moved = None
        if len(e) and (small or model.eta_decrement(reduced) > slack):
            moved = _move_eta(problem, model, x, e, base, reduced, damping, slack)
        x, e, losses, new, damping = moved or (x, e, losses, base, 0.0)
        stuck = moved is None and not new < total - slack
        if small or stuck:
            way_out = _escape(problem, model, x, e, new, max(limit, slack))
            if way_out is not None:
                (x, e, losses, new), small, stuck = way_out, False, False
        total, steps = new, steps + 1
        history.append(total)
        if callback is not None:
            callback(steps, total)
        # a second small decrement: the step between them is what makes the parameters, not the loss alone, exact
        if small and (was_small or stuck):
            result = Result.CONVERGED
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
    }
    return JointSolution(*problem.named(x, e), result, stats)


# -- the function and its derivatives ------------------------------------------------------------------------------------


class _Problem:
    """fn plus penalty on flat tensors: x `(tasks, m)` for phi, e `(p,)` for eta.  Counts its evaluations."""

    def __init__(self, fn: SharedLosses, phi: Tree, eta: dict[str, Tensor], penalty: Penalty | None) -> None:
        self.fn, self.phi, self.eta, self.extra = fn, tree.detach(phi), tree.detach(eta), penalty
        self.evaluations = 0.0
        self.device = next(iter(phi.values())).device
        self.batched = self.device.type != "cpu" or self._largest() <= _BUSY

    def _largest(self) -> int:
        """Size of the largest tensor that the losses keep for their derivative."""
        sizes = [0]

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        x, e = (leaf.clone().requires_grad_() for leaf in self.start())
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.losses(x, e)
        self.evaluations += 0.5
        return max(sizes)

    def start(self) -> tuple[Tensor, Tensor]:
        x = tree.flatten(self.phi)
        return x, torch.cat([value.reshape(-1) for value in self.eta.values()]) if self.eta else x.new_zeros(0)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Which named entry each number of x, and of e, belongs to."""
        sizes = [x[0].numel() for x in self.phi.values()], [x.numel() for x in self.eta.values()]
        x_entry, e_entry = (
            torch.arange(len(size), device=self.device).repeat_interleave(
                torch.tensor(size, device=self.device, dtype=torch.int64)
            )
            for size in sizes
        )
        return x_entry, e_entry

    def named_eta(self, e: Tensor) -> dict[str, Tensor]:
        parts = e.split([value.numel() for value in self.eta.values()]) if self.eta else ()
        return {name: part.reshape(value.shape) for (name, value), part in zip(self.eta.items(), parts, strict=True)}

    def named(self, x: Tensor, e: Tensor) -> tuple[Tree, dict[str, Tensor]]:
        return tree.unflatten(x, self.phi), self.named_eta(e)

    def penalty(self, e: Tensor) -> Tensor:
        return e.new_zeros(()) if self.extra is None else torch.as_tensor(self.extra(self.named_eta(e))).to(e)

    def losses(self, x: Tensor, e: Tensor) -> Tensor:
        losses = self.fn(*self.named(x, e))
        if losses.shape != x.shape[:1]:
            raise ValueError(f"fn must return one loss per task, shape {tuple(x.shape[:1])}, not {tuple(losses.shape)}")
        return losses

    @torch.no_grad()
    def loss(self, x: Tensor, e: Tensor) -> tuple[Tensor, float]:
        """Losses `(tasks,)` and the total."""
        self.evaluations += 0.5
        losses = self.losses(x, e)
        return losses, float(losses.sum() + self.penalty(e))

    def gradient(self, x: Tensor, e: Tensor, graph: bool = False) -> tuple[Tensor, ...]:
        """Gradients with respect to x and e; with `graph` also the leaves they belong to."""
        self.evaluations += 1
        x, e = x.clone().requires_grad_(), e.clone().requires_grad_()
        with torch.enable_grad():
            total = self.losses(x, e).sum() + self.penalty(e)
            if not total.requires_grad:
                raise ValueError("fn's losses carry no derivative: compute them from phi and eta by torch, undetached")
            g = torch.autograd.grad(total, (x, e), create_graph=graph, allow_unused=True, materialize_grads=True)
        return (*g, x, e) if graph else g

    def hessian(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients g_x `(tasks, m)`, g_e `(p,)`; blocks A `(tasks, m, m)`, B `(tasks, m, p)`, C `(p, p)`."""
        g_x, g_e, x, e = self.gradient(x, e, graph=True)
        a = self._phi_blocks(g_x, x)
        b, c = self._rows(g_e, (x, e), torch.eye(len(e), dtype=x.dtype, device=x.device))
        return g_x.detach(), g_e.detach(), a, b.permute(1, 2, 0), 0.5 * (c + c.mT)

    def phi_hessian(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """g_x and the blocks A alone."""
        g_x, _, x, _ = self.gradient(x, e, graph=True)
        return g_x.detach(), self._phi_blocks(g_x, x)

    def _phi_blocks(self, g_x: Tensor, x: Tensor) -> Tensor:
        tasks, m = x.shape
        # row j of every task's block at once: the tasks do not see each other
        basis = torch.eye(m, dtype=x.dtype, device=x.device).unsqueeze(1).expand(m, tasks, m)
        a = self._rows(g_x, (x,), basis)[0].transpose(0, 1)
        return 0.5 * (a + a.mT)

    def _rows(self, vector: Tensor, leaves: tuple[Tensor, ...], basis: Tensor) -> list[Tensor]:
        """Products basis[k] . d vector / d leaf, stacked over k, one tensor per leaf."""
        if not vector.requires_grad or not len(basis):  # linear in the leaves, or nothing to differentiate
            return [vector.new_zeros(len(basis), *leaf.shape) for leaf in leaves]
        self.evaluations += 2 * len(basis)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        chunks: list[list[Tensor]] = []
        for chunk in basis.split(_COLUMNS):
            if self.batched:
                try:
                    with warnings.catch_warnings():
                        # an operation without a batching rule is looped over by torch itself, with a warning
                        warnings.filterwarnings("ignore", message="There is a performance drop")
                        columns: tuple[Tensor | None, ...] = torch.autograd.grad(
                            vector, leaves, chunk, is_grads_batched=True, **options
                        )
                except RuntimeError:  # one that cannot be batched at all
                    self.batched = False
            if not self.batched:
                rows = [torch.autograd.grad(vector, leaves, row, **options) for row in chunk]
                columns = tuple(
                    None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)
                )
            chunks.append(
                [
                    vector.new_zeros(len(chunk), *leaf.shape) if column is None else column
                    for leaf, column in zip(leaves, columns, strict=True)
                ]
            )
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


# -- the quadratic model -------------------------------------------------------------------------------------------------


class _Convex(NamedTuple):
    """Positive definite models of symmetric matrices `(..., n, n)`: M = D^-1 V diag(w) V' D^-1, D = diag(scale).

    lowest, direction: the smallest eigenvalue of the matrix as it was, equilibrated, and its eigenvector in the
    parameters' units; a unit step along it changes the quadratic by lowest / 2.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor
    lowest: Tensor
    direction: Tensor

    def solve(self, b: Tensor, damping: Tensor | float = 0.0) -> Tensor:
        """(M + damping D^-2)^-1 b for `b` `(..., n, k)`; damping broadcasts against `(..., n, 1)`."""
        rotated = self.vectors.mT @ (self.scale.unsqueeze(-1) * b)
        return self.scale.unsqueeze(-1) * (self.vectors @ (rotated / (self.values.unsqueeze(-1) + damping)))

    def square(self, d: Tensor) -> Tensor:
        """d' M d, `d` `(..., n)`."""
        rotated = (self.vectors.mT @ (d / self.scale).unsqueeze(-1)).squeeze(-1)
        return (rotated.square() * self.values).sum(-1)


def _convex(matrix: Tensor, gradient: Tensor, level: Tensor, entry: Tensor, noise: Tensor) -> _Convex:
    """See `minimize_jointly` for what is done to a matrix that is not positive definite.

    gradient `(..., n)`; level `(...)`, what no parameter's predicted decrease may exceed; entry `(n,)`, which blocks keep
    their coupling; noise `(..., n)`: rows whose entries are all smaller are rounding errors.
    """
    eps = torch.finfo(matrix.dtype).eps
    # Far out on a plateau curvature vanishes before the slope does and Newton's step is astronomical: g^2 / 2h <= level
    # bounds it.  Near a minimum the term is of second order in g and does not slow convergence.
    least = (gradient.square() / (2 * level.unsqueeze(-1))).clamp(max=math.sqrt(torch.finfo(matrix.dtype).max))
    matrix = matrix + torch.diag_embed((least - matrix.diagonal(dim1=-2, dim2=-1).abs()).clamp(min=0))
    scale = _equilibrate(matrix, noise)
    matrix = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # numbers near the end of the floating range: no step there
    finite = matrix.isfinite().all(-1).all(-1) & scale.isfinite().all(-1)
    matrix = torch.where(finite[..., None, None], matrix, torch.eye(matrix.shape[-1]).to(matrix))
    scale = torch.where(finite.unsqueeze(-1), scale, 0.0)
    values, vectors = torch.linalg.eigh(matrix)
    lowest, direction = values[..., 0], scale * vectors[..., 0]
    bad = lowest < -1e4 * eps  # a singular direction is harmless: nothing is to be gained along it
    if bool(bad.any()):
        blocks = torch.where(entry.unsqueeze(-1) == entry, matrix[bad], 0.0)
        coupling = matrix[bad] - blocks
        v, q = torch.linalg.eigh(blocks)
        v = v.abs().clamp(min=math.sqrt(eps))
        root = (q * v.rsqrt().unsqueeze(-2)) @ q.mT
        most_negative = torch.linalg.eigvalsh(root @ coupling @ root)[..., 0]
        keep = (_KEEP / (-most_negative).clamp(min=eps)).clamp(max=1)
        blocks = (q * v.unsqueeze(-2)) @ q.mT
        new_values, new_vectors = torch.linalg.eigh(blocks + keep[..., None, None] * coupling)
        values, vectors = values.clone(), vectors.clone()
        values[bad], vectors[bad] = new_values, new_vectors
    return _Convex(scale, values.clamp(min=1e4 * eps), vectors, lowest, direction)


def _equilibrate(matrix: Tensor, noise: Tensor) -> Tensor:
    """Scales `(..., n)` that bring the largest entry of every row near 1; also where the diagonal is 0."""
    size = matrix.abs()
    largest = size.amax(-1)
    live = largest > noise
    # from the diagonal on, so that the parameters' units cancel; 0 on it is as small as rounding leaves it
    diagonal = torch.maximum(size.diagonal(dim1=-2, dim2=-1), torch.finfo(size.dtype).eps ** 2 * largest)
    scale = torch.where(live, torch.where(live, diagonal, 1.0).rsqrt(), 1.0)
    for _ in range(6):
        top = (size * scale.unsqueeze(-1) * scale.unsqueeze(-2)).amax(-1)
        scale = torch.where(live, scale / torch.where(live, top, 1.0).sqrt(), scale)
    return scale


def _convex_phi(problem: _Problem, g_phi: Tensor, blocks: Tensor, losses: Tensor) -> _Convex:
    noise = torch.full_like(g_phi, torch.finfo(g_phi.dtype).tiny)  # nothing was subtracted here
    return _convex(blocks, g_phi, losses.abs().clamp(min=1), problem.entries()[0], noise)


class _Quadratic:
    """The model at one point: `phi` with phi's blocks A_i, `eta` with the Schur complement, `follow` = A_i^-1 B_i."""

    def __init__(self, problem: _Problem, x: Tensor, e: Tensor, losses: Tensor) -> None:
        self.g_phi, g_eta, a, b, c = problem.hessian(x, e)
        self.finite = all(bool(t.isfinite().all()) for t in (losses, self.g_phi, g_eta, a, b, c))
        if not self.finite:
            return
        self.phi = _convex_phi(problem, self.g_phi, a, losses)
        self.follow = self.phi.solve(b)
        self.reduced = self.reduce(self.g_phi, g_eta)
        self.decrement_phi = self.phi_decrement(self.g_phi)
        self.decrement_eta = 0.0
        if len(e):
            removed = (b.mT @ self.follow).sum(0)
            noise = (
                100 * torch.finfo(x.dtype).eps * (c.abs() + removed.abs()).amax(-1)
            )  # what is left of two large terms
            schur = c - 0.5 * (removed + removed.mT)
            self.eta = _convex(schur, self.reduced, losses.abs().clamp(min=1).sum(), problem.entries()[1], noise)
            self.decrement_eta = self.eta_decrement(self.reduced)

    def reduce(self, g_phi: Tensor, g_eta: Tensor) -> Tensor:
        """The gradient with respect to eta, phi following."""
        return g_eta - (self.follow * g_phi.unsqueeze(-1)).sum((0, 1))

    def phi_decrement(self, g_phi: Tensor) -> float:
        return 0.5 * float((g_phi * self.phi.solve(g_phi.unsqueeze(-1)).squeeze(-1)).sum())

    def eta_step(self, reduced: Tensor, damping: float = 0.0) -> Tensor:
        return -self.eta.solve(reduced.unsqueeze(-1), damping).squeeze(-1)

    def eta_decrement(self, reduced: Tensor) -> float:
        return 0.5 * float(-(reduced * self.eta_step(reduced)).sum())


# -- the steps -----------------------------------------------------------------------------------------------------------


def _settle_phi(
    problem: _Problem, model: _Quadratic, x: Tensor, e: Tensor, losses: Tensor, thorough: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Bring phi near its minimum at fixed eta; also the gradient with respect to eta there.

    Where eta has far more to gain than phi, one step does: with eta's it makes Newton's step.
    """
    x, losses = _move_phi(problem, model.phi, x, e, losses, model.g_phi)
    if not thorough or model.decrement_phi <= 1e-3 * model.decrement_eta:
        return x, losses, model.reduced
    for correction in range(_CORRECTIONS + 1):
        g_phi, g_eta = problem.gradient(x, e)
        reduced = model.reduce(g_phi, g_eta)
        left = model.phi_decrement(g_phi)
        if left <= 1e-2 * (model.eta_decrement(reduced) if len(e) else 0.0) or correction == _CORRECTIONS:
            break
        x, losses = _move_phi(problem, model.phi, x, e, losses, g_phi)
    return x, losses, reduced


def _move_phi(
    problem: _Problem, convex: _Convex, x: Tensor, e: Tensor, losses: Tensor, g_phi: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of phi at fixed eta; each task raises its own damping until its loss falls, or stays where it is."""
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


def _newton_phi(problem: _Problem, x: Tensor, e: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """One Newton step of phi at fixed eta, with a fresh Hessian."""
    g_phi, blocks = problem.phi_hessian(x, e)
    if not (g_phi.isfinite().all() and blocks.isfinite().all()):
        return x, losses
    convex = _convex_phi(problem, g_phi, blocks, losses)
    return _move_phi(problem, convex, x, e, losses, g_phi)


def _move_eta(
    problem: _Problem, model: _Quadratic, x: Tensor, e: Tensor, base: float, reduced: Tensor, last: float, slack: float
) -> tuple[Tensor, Tensor, Tensor, float, float] | None:
    """One step of eta with phi following; None where no damping lowers the total.  `last`: the damping used before."""
    # such that the softest direction, the likeliest to be overdone, is halved
    damping, first = 0.0, min(_FIRST_DAMPING, float(model.eta.values.min()))
    for _ in range(_TRIALS):
        step = model.eta_step(reduced, damping)
        x_new, e_new = x - model.follow @ step, e + step
        losses, total = problem.loss(x_new, e_new)
        goal = base + slack + _SUFFICIENT * float((reduced * step).sum() + 0.5 * model.eta.square(step))
        # In a narrow curved valley (a covariance about to lose rank) phi follows a straight step of eta badly, and without
        # this the steps become ever shorter.  Far from a minimum it would hide how bad a step was.
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


def _escape(
    problem: _Problem, model: _Quadratic, x: Tensor, e: Tensor, total: float, gain: float
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Leave a saddle along negative curvature, of eta or else of phi, if that lowers the total by more than `gain`."""
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


def _check(phi: Tree, eta: dict[str, Tensor], tolerance: float, max_steps: int) -> None:
    shapes = {name: tuple(x.shape) for name, x in phi.items()}
    if not phi or not all(shapes.values()) or not sum(x.numel() for x in phi.values()):
        raise ValueError(f"phi must hold numbers, in tensors with the task axis first; its shapes are {shapes}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"every tensor in phi needs the same task axis first, but the shapes are {shapes}")
    dtypes = {x.dtype for x in (*phi.values(), *eta.values())}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise TypeError(f"phi and eta must be floating tensors of one dtype, not {sorted(map(str, dtypes))}")
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise ValueError(f"tolerance must be a finite number of at least 0, not {tolerance}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"max_steps must be a whole number of at least 0, not {max_steps!r}")
