"""The arrowhead problem as numbers: losses, gradient, Hessian blocks, and its convex model.

Everything here works on rows `(tasks, m)` for phi and one vector `(p,)` for eta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from varmeta.numerics import tree
from varmeta.numerics.hessian import Rows, symmetric, unit_vectors
from varmeta.numerics.tree import Tree

Penalty = Callable[[dict[str, Tensor]], Tensor | float]
SharedLosses = Callable[[Tree, dict[str, Tensor]], Tensor]
"""(phi, eta) -> losses `(tasks,)`; loss i depends on row i of phi and on all of eta."""
Point = dict[str, Tensor]
"""Numbers by name, which are not of any task."""

_KEEP = (
    0.4  # of the coupling that would make a block-diagonal model singular, the share that is kept
)
# numbers in one tensor, beyond which a processor core is busy enough with a single column
# (measured: batches cost up to twice the loop's time there, and a third of it on small problems)
BUSY = 50_000


def row(phi: Tree) -> Point:
    """Of the only task."""
    return {name: value[0] for name, value in phi.items()}


class Derivatives(Protocol):
    """Gradient `(m,)` and, with `second`, Hessian `(m, m)` in the numbers of a point."""

    def __call__(self, point: Point, *, second: bool) -> tuple[Tensor, Tensor]: ...


class Single:
    """A function of a point as the loss of a single task without eta: its row is the point.

    written: the derivatives where they are written out; None: by automatic differentiation.
    """

    def __init__(self, fn: Callable[[Point], Tensor], written: Derivatives | None = None) -> None:
        self.fn, self.written = fn, written

    def __call__(self, phi: Tree, eta: object) -> Tensor:
        return self.fn(row(phi)).reshape(1)


# -- the function and its derivatives --------------------------------------------------------------


class SharedProblem:
    """fn plus penalty on flat tensors: x `(tasks, m)` for phi, e `(p,)` for eta.

    Counts its evaluations.
    """

    def __init__(
        self, fn: SharedLosses, phi: Tree, eta: dict[str, Tensor], penalty: Penalty | None
    ) -> None:
        self.fn, self.phi, self.eta, self.extra = fn, tree.detach(phi), tree.detach(eta), penalty
        self.evaluations = 0.0
        self.device = next(iter(phi.values())).device
        self.written = fn.written if isinstance(fn, Single) else None
        small = self.written is not None or self.device.type != "cpu" or self._largest() <= BUSY
        self.rows = Rows(small)

    def _largest(self) -> int:
        """Size of the largest tensor that the losses keep for their derivative."""
        sizes = [0]

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        x, e = (leaf.clone().requires_grad_() for leaf in self.start())
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            self.losses(x, e)
        self.evaluations += 0.5
        return max(sizes)

    def start(self) -> tuple[Tensor, Tensor]:
        x = tree.flatten(self.phi)
        return x, torch.cat(
            [value.reshape(-1) for value in self.eta.values()]
        ) if self.eta else x.new_zeros(0)

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
        return tree.named_parts(e, self.eta) if self.eta else {}

    def named(self, x: Tensor, e: Tensor) -> tuple[Tree, dict[str, Tensor]]:
        return tree.unflatten(x, self.phi), self.named_eta(e)

    def penalty(self, e: Tensor) -> Tensor:
        return (
            e.new_zeros(())
            if self.extra is None
            else torch.as_tensor(self.extra(self.named_eta(e))).to(e)
        )

    def losses(self, x: Tensor, e: Tensor) -> Tensor:
        losses = self.fn(*self.named(x, e))
        if losses.shape != x.shape[:1]:
            raise ValueError(
                f"fn must return one loss per task, shape {tuple(x.shape[:1])}, not "
                f"{tuple(losses.shape)}"
            )
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
        if self.written is not None:
            return self._written(x, False)[0], e
        x, e = x.clone().requires_grad_(), e.clone().requires_grad_()
        with torch.enable_grad():
            total = self.losses(x, e).sum() + self.penalty(e)
            if not total.requires_grad:
                raise ValueError(
                    "fn's losses carry no derivative: compute them from phi and eta by torch, "
                    "undetached"
                )
            g = torch.autograd.grad(
                total, (x, e), create_graph=graph, allow_unused=True, materialize_grads=True
            )
        return (*g, x, e) if graph else g

    def hessian(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients and the blocks of the joint Hessian.

        g_x `(tasks, m)`, g_e `(p,)`; A `(tasks, m, m)`, B `(tasks, m, p)`, C `(p, p)`.
        """
        if self.written is not None:
            self.evaluations += 1 + 2 * x.shape[1]
            g_x, a = self._written(x, True)
            return g_x, e, a, x.new_zeros(1, x.shape[1], 0), e.reshape(0, 0)
        g_x, g_e, x, e = self.gradient(x, e, graph=True)
        a = self._phi_blocks(g_x, x)
        b, c = self._products(g_e, (x, e), torch.eye(len(e), dtype=x.dtype, device=x.device))
        return g_x.detach(), g_e.detach(), a, b.permute(1, 2, 0), symmetric(c)

    def phi_hessian(self, x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """g_x and the blocks A alone."""
        if self.written is not None:
            self.evaluations += 1 + 2 * x.shape[1]
            return self._written(x, True)
        g_x, _, x, _ = self.gradient(x, e, graph=True)
        return g_x.detach(), self._phi_blocks(g_x, x)

    def _written(self, x: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        assert self.written is not None
        gradient, hessian = self.written(row(tree.unflatten(x, self.phi)), second=second)
        return gradient.unsqueeze(0), hessian.unsqueeze(0)

    def _phi_blocks(self, g_x: Tensor, x: Tensor) -> Tensor:
        # row j of every task's block at once: the tasks do not see each other
        return symmetric(self._products(g_x, (x,), unit_vectors(x))[0].transpose(0, 1))

    def _products(self, vector: Tensor, leaves: tuple[Tensor, ...], basis: Tensor) -> list[Tensor]:
        """Products basis[k] . d vector / d leaf, stacked over k, one tensor per leaf."""
        if vector.requires_grad:
            self.evaluations += 2 * len(basis)
        return self.rows([vector], leaves, [basis])


# -- the quadratic model ---------------------------------------------------------------------------


class Convex(NamedTuple):
    """Positive definite models of symmetric matrices `(..., n, n)`.

    M = D^-1 V diag(w) V' D^-1 with D = diag(scale).

    lowest, direction: the smallest eigenvalue of the matrix as it was, equilibrated, and its
    eigenvector in the parameters' units; a unit step along it changes the quadratic by lowest / 2.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor
    lowest: Tensor
    direction: Tensor

    def solve(self, b: Tensor, damping: Tensor | float = 0.0) -> Tensor:
        """(M + damping D^-2)^-1 b for `b` `(..., n, k)`.

        Damping broadcasts against `(..., n, 1)`.
        """
        rotated = self.vectors.mT @ (self.scale.unsqueeze(-1) * b)
        return self.scale.unsqueeze(-1) * (
            self.vectors @ (rotated / (self.values.unsqueeze(-1) + damping))
        )

    def square(self, d: Tensor) -> Tensor:
        """d' M d, `d` `(..., n)`."""
        rotated = (self.vectors.mT @ (d / self.scale).unsqueeze(-1)).squeeze(-1)
        return (rotated.square() * self.values).sum(-1)


def _convex(
    matrix: Tensor, gradient: Tensor, level: Tensor, entry: Tensor, noise: Tensor
) -> Convex:
    """See `minimize_jointly` for what is done to a matrix that is not positive definite.

    gradient `(..., n)`; level `(...)`, what no parameter's predicted decrease may exceed; entry
    `(n,)`, which blocks keep their coupling; noise `(..., n)`: rows whose entries are all smaller
    are rounding errors.
    """
    eps = torch.finfo(matrix.dtype).eps
    # Far out on a plateau curvature vanishes before the slope does and Newton's step is
    # astronomical: g^2 / 2h <= level bounds it.  Near a minimum the term is of second order in g
    # and does not slow convergence.
    least = (gradient.square() / (2 * level.unsqueeze(-1))).clamp(
        max=math.sqrt(torch.finfo(matrix.dtype).max)
    )
    matrix = matrix + torch.diag_embed(
        (least - matrix.diagonal(dim1=-2, dim2=-1).abs()).clamp(min=0)
    )
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
    return Convex(scale, values.clamp(min=1e4 * eps), vectors, lowest, direction)


def _equilibrate(matrix: Tensor, noise: Tensor) -> Tensor:
    """Scales `(..., n)` that bring the largest entry of every row near 1; also where the diagonal
    is 0.
    """
    size = matrix.abs()
    largest = size.amax(-1)
    live = largest > noise
    # from the diagonal on, so that the parameters' units cancel; 0 on it is as small as rounding
    # leaves it
    diagonal = torch.maximum(
        size.diagonal(dim1=-2, dim2=-1), torch.finfo(size.dtype).eps ** 2 * largest
    )
    scale = torch.where(live, torch.where(live, diagonal, 1.0).rsqrt(), 1.0)
    for _ in range(6):
        top = (size * scale.unsqueeze(-1) * scale.unsqueeze(-2)).amax(-1)
        scale = torch.where(live, scale / torch.where(live, top, 1.0).sqrt(), scale)
    return scale


def convex_phi(problem: SharedProblem, g_phi: Tensor, blocks: Tensor, losses: Tensor) -> Convex:
    noise = torch.full_like(g_phi, torch.finfo(g_phi.dtype).tiny)  # nothing was subtracted here
    return _convex(blocks, g_phi, losses.abs().clamp(min=1), problem.entries()[0], noise)


class Quadratic:
    """The model at one point.

    `phi` with phi's blocks A_i, `eta` with the Schur complement, `follow` = A_i^-1 B_i.

    Where a loss or derivative is not finite it has none of these, and `failed` `(tasks,)` tells
    whose it is.
    """

    def __init__(self, problem: SharedProblem, x: Tensor, e: Tensor, losses: Tensor) -> None:
        self.g_phi, g_eta, a, b, c = problem.hessian(x, e)
        parts = (losses, self.g_phi, a, b)
        # the tasks to blame where something is not finite: none, where it is eta's part alone
        self.failed = torch.stack([~t.isfinite().reshape(len(x), -1).all(-1) for t in parts]).any(0)
        self.finite = not bool(self.failed.any()) and all(
            bool(t.isfinite().all()) for t in (g_eta, c)
        )
        if not self.finite:
            return
        self.phi = convex_phi(problem, self.g_phi, a, losses)
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
            # the penalty is eta's to lower: without it a strict one allowed only steps that were
            # far too short
            level = losses.abs().clamp(min=1).sum() + problem.penalty(e).detach().abs()
            self.eta = _convex(schur, self.reduced, level, problem.entries()[1], noise)
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
