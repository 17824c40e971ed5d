"""Solve A x = b for every task, given only products with A.

A is block-diagonal over tasks and symmetric; one call of `matvec` multiplies the blocks of all
tasks.  A task stops on its own, and what it returns does not depend on which other tasks are in the
batch.  No graph is kept: the solution is a number, and whoever needs a derivative through it
(`adjoint.py`) writes that derivative down.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.graphs.capture import tracing
from varmeta.numerics import tree
from varmeta.numerics.conjugate import (
    ConjugateStep,
    Product,
    Walk,
    host_reads_every,
    norm,
    walked,
)
from varmeta.numerics.hessian import of_products
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree

Matvec = Callable[[Tree], Tree]
# Over so many steps CG's gain in energy is summed, to judge by it what is still to be had (Strakos
# and Tichy 2002).
_DELAY = 4


class LinearSolver(ABC):
    """A way to solve A x = b.  Subclasses hold choices, never state.

    >>> import torch
    >>> Direct().solve(lambda v: {"w": 2.0 * v["w"]}, {"w": torch.ones(1, 2)}).value["w"]
    tensor([[0.5000, 0.5000]])
    """

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tree) -> Solution:
        """Solve A x = b for every task.

        matvec: the product with A; takes and returns a tree with the names and shapes of `b`.
        b: floating tensors of one dtype, `(tasks, ...)`; a tensor of shape `(tasks,)` is one number
            per task.

        Returns a `Solution` with `value` shaped as `b`, a `Result` code per task, and the stats,
        each `(tasks,)`: "residual", |b - A x| / |b| recomputed from the returned x (0 where b = 0);
        "curvature", the smallest p'Ap / p'p over the directions p that were met (NaN where none
        was); "steps", int64; "products", how many products with A were taken for the whole batch.

        Raises ValueError where `b` or what `matvec` returns does not have the shapes above;
        TypeError where `b` is not floating.
        """

    def solve_all(self, matvec: Matvec, bs: Sequence[Tree]) -> list[Solution]:
        """Several right-hand sides for one A.

        bs: right-hand sides, each a tree of tensors `(tasks, ...)` as `solve` takes it.
        """
        return [self.solve(matvec, b) for b in bs]


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, batched over tasks.

    Source: Hestenes and Stiefel (1952); Nocedal and Wright (2006), algorithm 5.3.

    A must be positive definite.  A direction without positive curvature ends that task with
    `Result.NEGATIVE_CURVATURE` and the iterate before it, which is 0 when it is the first
    direction. The recursion's residual drifts from b - A x by rounding, so the latter is computed
    once at the end (one more product) and tasks that fall short of the tolerance are refined;
    `Result.STAGNATED` says that this did not help.

    rtol: stop at |b - A x| <= rtol |b|; a number, or one per task as a tensor `(tasks,)`.
        Default 1e-10 in float64 and 1e-5 in lower precision; never tighter than the rounding of
        the dtype.
    max_steps: limit on the steps of a task.  Default 10 size + 10, at most 1000: exact
        arithmetic needs `size`.
    preconditioner: product with an approximation of A^-1, symmetric positive definite; if it is
        not, the task ends as NEGATIVE_CURVATURE.
    energy_rtol: stop, too, where the last four steps added no more than this share of b'x,
        which grows to b'A^-1 b.  A small residual says little of that number: weak directions
        of A hide in it.  An estimate, no bound: what a later step would find is not known.

    `solve` may be given a guess of x, where each task starts if that leaves less than starting at 0
    does.

    Raises ValueError where a choice is out of range.

    >>> A = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])  # one task
    >>> product = lambda v: {"w": (A @ v["w"][..., None])[..., 0]}
    >>> solution = CG().solve(product, {"w": torch.tensor([[3.0, 3.0]])})
    >>> solution.value["w"], solution.worst.name
    (tensor([[1., 1.]]), 'CONVERGED')
    """

    rtol: float | Tensor | None = None
    max_steps: int | None = None
    preconditioner: Matvec | None = None
    energy_rtol: float | None = None

    def __post_init__(self) -> None:
        _check_rtol(self.rtol)
        if self.energy_rtol is not None and not 0 < self.energy_rtol < 1:
            raise ValueError(f"energy_rtol must be a share between 0 and 1, not {self.energy_rtol}")
        if self.max_steps is not None:
            _check_count("max_steps", self.max_steps)

    def solve(self, matvec: Matvec, b: Tree, guess: Tree | None = None) -> Solution:
        system = _System.of(matvec, b)
        tolerance = system.tolerance(self.rtol)
        start, left = system.start(guess)
        precondition = (
            None
            if self.preconditioner is None
            else _on_rows(self.preconditioner, b, "preconditioner")
        )
        limit = (
            min(10 * system.b.shape[-1] + 10, 1000) if self.max_steps is None else self.max_steps
        )
        limits = torch.full_like(tolerance, limit, dtype=torch.int64)
        # a little below the tolerance, or rounding alone would send tasks to the refinement
        target = 0.9 * tolerance

        walk = conjugate_gradient(
            system.product, left, target, limits, limit, precondition, self.energy_rtol
        )
        x, result, curvature, steps = (walk[name] for name in ("x", "result", "curvature", "steps"))
        x = start + x
        r = system.b - system.product(x)
        error = norm(r)
        refines = self.energy_rtol is None  # whoever asks for an energy has it
        while (
            refines
            and not tracing()
            and bool((short := (result == Result.CONVERGED) & (error > tolerance)).any())
        ):
            # iterative refinement, A dx = b - A x; it ends because every round halves the error or
            # is the last
            left = torch.where(short[:, None], r, 0)
            walk = conjugate_gradient(
                system.product, left, target, limits - steps, limit, precondition
            )
            dx, outcome, met, more = (walk[name] for name in ("x", "result", "curvature", "steps"))
            refined = system.b - system.product(x + dx)
            refined_error = norm(refined)
            outcome = torch.where(refined_error < 0.5 * error, outcome, int(Result.STAGNATED))
            outcome = torch.where(refined_error <= tolerance, int(Result.CONVERGED), outcome)
            better = short & (refined_error < error)
            x, r = torch.where(better[:, None], x + dx, x), torch.where(better[:, None], refined, r)
            result, error = (
                torch.where(short, outcome, result),
                torch.where(better, refined_error, error),
            )
            curvature, steps = torch.fmin(curvature, met), steps + more
        # the recursion may miss the tolerance that its iterate meets
        result = torch.where(
            (result == Result.STEP_LIMIT) & (error <= tolerance), int(Result.CONVERGED), result
        )
        return system.solution(x, r, result, curvature, steps)


def conjugate_gradient(
    product: Product,
    b: Tensor,
    tolerance: Tensor,
    limits: Tensor,
    most: int,
    precondition: Product | None = None,
    energy_rtol: float | None = None,
) -> Walk:
    """The recursion behind `CG`, on rows: until |b - A x| <= tolerance by its own account.

    From x = 0, or see `CG`; what is returned is described in `ConjugateStep.begin`.

    product: v -> A v, `(tasks, size)` to `(tasks, size)`, without a graph.
    b: `(tasks, size)`, finite.
    tolerance: absolute, `(tasks,)`.
    limits: steps that each task may take, int64 `(tasks,)`.
    most: the largest of them, or more.
    precondition: v -> M v, as `product`.
    energy_rtol: see `CG`.
    """
    step = ConjugateStep(precondition=precondition)
    walk = step.begin(b, norm(b) > tolerance, tolerance=tolerance)
    walk["active"] = walk["active"] & (walk["steps"] < limits)
    gains = [torch.full_like(tolerance, math.inf)] * _DELAY
    energy = torch.zeros_like(tolerance)

    def stop(walk: Walk) -> Walk:
        nonlocal gains, energy
        active, result = walk["active"], walk["result"]
        if energy_rtol is not None:
            gains = [*gains[1:], walk["gain"]]
            energy = energy + gains[-1]
            met = active & (torch.stack(gains).sum(0) <= energy_rtol * energy)
            result = torch.where(met, int(Result.CONVERGED), result)
            active = active & ~met
        return walk | {"active": active & (walk["steps"] < limits), "result": result}

    return walked(product, step, walk, most, stop)


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """The Neumann series x = step sum_k (I - step A)^k b, one product per term.

    Source: Lorraine, Vicol and Duvenaud (2020).

    It is the fixed-point iteration x <- x + step (b - A x) from 0.  For symmetric A the residual's
    norm is a log-convex sequence: once it grows it never shrinks again.  So a task stops at its
    first growth, with the iterate before it: `NEGATIVE_CURVATURE` if a negative curvature was met
    or the step size was estimated here (then nothing else makes it grow), else `DIVERGED`.
    `STEP_LIMIT` says that the series is truncated above the tolerance.

    num_terms: the largest number of terms.
    step: size of the step, in units of 1 / curvature; it converges for 0 < step < 2 / (largest
        eigenvalue).  Default 1 / (1.1 x an estimate of that eigenvalue), which costs 10 more
        products.
    rtol: as in `CG`.

    Raises ValueError where a choice is out of range.

    >>> twice = lambda v: {"w": 2.0 * v["w"]}
    >>> solution = Neumann(step=0.25).solve(twice, {"w": torch.tensor([6.0])})
    >>> [round(float(x), 4) for x in solution.value["w"]], solution.worst.name
    ([3.0], 'CONVERGED')
    """

    num_terms: int = 100
    step: float | None = None
    rtol: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_count("num_terms", self.num_terms)
        _check_rtol(self.rtol)
        if self.step is not None and not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(
                f"step must be a positive number, got {self.step}; leave it out to have it "
                "estimated"
            )

    def solve(self, matvec: Matvec, b: Tree) -> Solution:
        system = _System.of(matvec, b)
        tolerance = system.tolerance(self.rtol)
        if self.step is None:
            largest, curvature = _largest_eigenvalue(system.product, system.b)
            step = torch.where(largest > 0, 1 / (1.1 * largest), 1)
        else:
            curvature = torch.full_like(tolerance, math.nan)
            step = torch.full_like(tolerance, self.step)
        # sqrt(eps): more than the rounding of a residual that does not move, as where A is singular
        growth = 1 + torch.finfo(system.b.dtype).eps ** 0.5

        x, r = torch.zeros_like(system.b), system.b
        error = norm(r)
        active = error > tolerance
        result = torch.where(active, int(Result.STEP_LIMIT), int(Result.CONVERGED))
        steps = torch.zeros_like(result)
        every = host_reads_every(system.b)
        for count in range(self.num_terms):
            if count % every == 0 and not tracing() and not bool(active.any()):
                break
            ar = system.product(r)
            curvature = torch.where(
                active, torch.fmin(curvature, _dot(r, ar) / _dot(r, r)), curvature
            )
            trial = r - step[:, None] * ar
            trial_error = norm(trial)
            finite = torch.isfinite(trial_error)
            # with an estimated step, (I - step A) expands only where A is negative
            negative = torch.ones_like(active) if self.step is None else curvature < 0
            verdict = torch.where(negative, int(Result.NEGATIVE_CURVATURE), int(Result.DIVERGED))
            verdict = torch.where(finite, verdict, int(Result.NON_FINITE))
            fine = finite & (trial_error <= growth * error)
            result = torch.where(active & ~fine, verdict, result)
            active = active & fine
            x = torch.where(active[:, None], x + step[:, None] * r, x)
            r, error = (
                torch.where(active[:, None], trial, r),
                torch.where(active, trial_error, error),
            )
            steps = steps + active
            result = torch.where(active & (error <= tolerance), int(Result.CONVERGED), result)
            active = active & (error > tolerance)
        r = system.b - system.product(x)
        # twice: the recursion stops just under the tolerance, and rounding may put the iterate just
        # above
        result = torch.where(
            (result == Result.CONVERGED) & (norm(r) > 2 * tolerance), int(Result.STAGNATED), result
        )
        return system.solution(x, r, result, curvature, steps)


@dataclass(frozen=True)
class Direct(LinearSolver):
    """A dense solve: A is built from `size` products.

    It takes O(tasks size^2) memory and O(tasks size^3) time.

    Cholesky where A is positive definite.  Elsewhere by eigenvalues, those within rounding of 0
    left out: the solution if A is invertible, else the shortest least-squares one.  A negative
    eigenvalue flags the task `NEGATIVE_CURVATURE`. Only the symmetric part of A is used.  The stat
    "curvature" is the smallest eigenvalue that is not 0 by rounding, "steps" is `size`.
    `STAGNATED` says that A is too ill-conditioned for the dtype, or b outside its range: the
    residual is above the root of its rounding.

    >>> product = lambda v: {"w": 4.0 * v["w"]}
    >>> solution = Direct().solve(product, {"w": torch.tensor([[2.0, 8.0]])})
    >>> solution.value["w"], solution.stats["curvature"]
    (tensor([[0.5000, 2.0000]]), tensor([4.]))
    """

    def solve(self, matvec: Matvec, b: Tree) -> Solution:
        return self.solve_all(matvec, [b])[0]

    def solve_all(self, matvec: Matvec, bs: Sequence[Tree]) -> list[Solution]:
        systems = [_System.of(matvec, b) for b in bs]
        like = systems[0].b
        size = like.shape[-1]
        basis = torch.eye(size, dtype=like.dtype, device=like.device)
        a = of_products(systems[0].product, like)
        finite = torch.isfinite(a).all(-1).all(-1)
        a = torch.where(
            finite[:, None, None], a, basis
        )  # LAPACK raises on NaN, for all tasks at once
        factor, failed = torch.linalg.cholesky_ex(a)
        definite = failed == 0
        factor = torch.where(definite[:, None, None], factor, basis)
        eigenvalues, vectors = torch.linalg.eigh(a)
        cut = size * torch.finfo(a.dtype).eps * eigenvalues.abs().amax(-1, keepdim=True)
        known = eigenvalues.abs() > cut
        inverse = torch.where(known, 1 / eigenvalues, 0)
        curvature = torch.where(known, eigenvalues, math.inf).amin(-1)
        curvature = torch.where(finite & known.any(-1), curvature, math.nan)

        solutions = []
        for system in systems:
            b = system.b[..., None]
            spectral = vectors @ (inverse[..., None] * (vectors.mT @ b))
            x = torch.where(definite[:, None, None], torch.cholesky_solve(b, factor), spectral)
            r = (b - a @ x)[..., 0]
            accurate = norm(r) <= torch.finfo(a.dtype).eps ** 0.5 * norm(system.b)
            result = torch.where(accurate, int(Result.CONVERGED), int(Result.STAGNATED))
            result = torch.where(curvature < 0, int(Result.NEGATIVE_CURVATURE), result)
            result = torch.where(finite, result, int(Result.NON_FINITE))
            x = torch.where(finite[:, None], x[..., 0], 0)
            r = torch.where(finite[:, None], r, math.nan)
            solutions.append(
                system.solution(x, r, result, curvature, torch.full_like(result, size))
            )
        return solutions


class _System(NamedTuple):
    """A x = b on rows `(tasks, size)`, each row of b divided by its largest entry so that squares
    do not underflow.

    calls: one entry for each product taken so far.
    """

    product: Product
    b: Tensor
    scale: Tensor
    finite: Tensor
    like: Tree
    calls: list[None]

    @classmethod
    def of(cls, matvec: Matvec, b: Tree) -> _System:
        _check_tree(b)
        flat = tree.flatten(b).detach()
        scale = flat.abs().amax(-1)
        finite = torch.isfinite(scale)
        scale = torch.where(finite & (scale > 0), scale, 1)[:, None]
        on_rows, calls = _on_rows(matvec, b, "matvec"), list[None]()

        def product(v: Tensor) -> Tensor:
            calls.append(None)
            return on_rows(v)

        return cls(product, torch.where(finite[:, None], flat / scale, 0), scale, finite, b, calls)

    def start(self, guess: Tree | None) -> tuple[Tensor, Tensor]:
        """x to start from and b - A x there: the guess, or 0 for a task where that leaves less."""
        zero = torch.zeros_like(self.b)
        if guess is None:
            return zero, self.b
        x = tree.flatten({name: guess[name].detach() for name in self.like}) / self.scale
        x = torch.where(torch.isfinite(x).all(-1, keepdim=True), x, 0)
        r = self.b - self.product(x)
        better = (norm(r) < norm(self.b))[:, None]
        return torch.where(better, x, zero), torch.where(better, r, self.b)

    def tolerance(self, rtol: float | Tensor | None) -> Tensor:
        """The largest |b - A x| that is accepted, `(tasks,)`."""
        if isinstance(rtol, Tensor) and rtol.shape not in ((), self.finite.shape):
            raise ValueError(
                f"rtol must be a number or one per task, {tuple(self.finite.shape)}, got "
                f"{tuple(rtol.shape)}"
            )
        if rtol is None:
            rtol = 1e-10 if self.b.dtype == torch.float64 else 1e-5
        eps = torch.finfo(self.b.dtype).eps
        return torch.as_tensor(rtol, dtype=self.b.dtype, device=self.b.device).clamp(
            min=eps
        ) * norm(self.b)

    def solution(
        self, x: Tensor, r: Tensor, result: Tensor, curvature: Tensor, steps: Tensor
    ) -> Solution:
        size = norm(self.b)
        residual = torch.where(size > 0, norm(r) / size, 0)
        # a row of b that is not finite was replaced by 0 above
        residual = torch.where(self.finite, residual, math.nan)
        result = torch.where(torch.isfinite(residual), result, int(Result.NON_FINITE))
        value = tree.unflatten(self.scale * x, self.like)
        products = torch.full_like(steps, len(self.calls))
        stats = {"residual": residual, "curvature": curvature, "steps": steps, "products": products}
        return Solution(value, result, stats)


def _on_rows(function: Matvec, like: Tree, what: str) -> Product:
    """`function` on rows `(tasks, size)`; detached, checked, and in the order of `like`'s names."""

    def product(v: Tensor) -> Tensor:
        out = function(tree.unflatten(v, like))
        if out.keys() != like.keys() or any(out[name].shape != x.shape for name, x in like.items()):
            came, expected = ({name: tuple(x.shape) for name, x in t.items()} for t in (out, like))
            raise ValueError(
                f"{what} must return the names and shapes that it is given, {expected}, but "
                f"returned {came}"
            )
        return tree.flatten({name: out[name].detach() for name in like})

    return product


def _largest_eigenvalue(
    product: Product, like: Tensor, num_products: int = 10
) -> tuple[Tensor, Tensor]:
    """Power iteration: a lower bound on the largest |eigenvalue|, and the smallest curvature met,
    each `(tasks,)`.

    A start with 1/size of its square along the top vector falls short by a factor 2 only if size is
    about 4^10.
    """
    # the same start for every task and batch, drawn without touching the global generator
    start = torch.randn(
        like.shape[-1], generator=torch.Generator().manual_seed(0), dtype=like.dtype
    )
    v = (start / start.norm()).to(like.device).expand_as(like)
    largest = torch.zeros_like(like[:, 0])
    curvature = torch.full_like(largest, math.nan)
    for _ in range(num_products):
        av = product(v)
        length = norm(av)
        largest, curvature = torch.maximum(largest, length), torch.fmin(curvature, _dot(v, av))
        v = torch.where((length > 0)[:, None], av / length[:, None], v)
    return largest, curvature


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _check_tree(b: Tree) -> None:
    shapes = {name: tuple(x.shape) for name, x in b.items()}
    # a single empty tensor is fine: the weights of a regression without predictors
    empty = sum(x.numel() for x in b.values()) == 0
    if empty or any(x.dim() == 0 for x in b.values()) or len({len(x) for x in b.values()}) > 1:
        raise ValueError(
            f"b must hold numbers in tensors with one common task axis first, got shapes {shapes}"
        )
    dtypes = {x.dtype for x in b.values()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise TypeError(
            f"b must be floating, got {sorted(map(str, dtypes))}; cast it with .to(torch.float64)"
        )
    if len(dtypes) > 1:
        raise ValueError(
            f"the tensors of b must share one dtype, got {sorted(map(str, dtypes))}; cast them to "
            "one"
        )


def _check_rtol(rtol: float | Tensor | None) -> None:
    # a tensor is taken as it is: reading it would wait for the device
    if not (rtol is None or isinstance(rtol, Tensor) or rtol > 0):
        raise ValueError(
            f"rtol must be positive, got {rtol}; leave it out for the default of the dtype"
        )


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
