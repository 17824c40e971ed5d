"""How a derivative passes an inner minimum: implicitly, by unrolling, or not at all.

`phi*(eta) = argmin_phi inner(phi, eta)`, per task; wanted is the derivative of `outer(phi*(eta),
eta)`.  Nothing here knows how phi* was found, and `unrolled` alone cares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varmeta.graphs.pieces import Graphed, call, run
from varmeta.numerics import tree
from varmeta.numerics.hessian import pulled_back
from varmeta.numerics.linear_solve import CG, Direct, LinearSolver, Matvec, Neumann
from varmeta.numerics.solution import Result, Solution, checked
from varmeta.numerics.tree import Tree

# Up to here the Hessian is formed: it costs about what CG does, and the units of the parameters do
# not matter.
MAX_DIRECT_SIZE = 32

Objective = Callable[[Tree, dict[str, Tensor]], Tensor]
"""fn(phi, eta) -> losses `(tasks,)`; loss i depends on row i of phi and on eta, which has no
task axis.
"""

Quadratic = Callable[[Tree], Tensor]
"""v -> v' M v `(tasks,)` for a tree v shaped as phi and a positive definite M."""


@dataclass(frozen=True)
class ImplicitAdjoint:
    """The implicit function theorem at the inner minimum.

    With v = d_phi outer and the linear system (d2 inner / dphi2) u = v, solved for every task,

        d outer / d eta = d_eta outer - (d2 inner / dphi deta)^T u.

    It is the derivative of the Lagrangian outer - <u, d_phi inner> with u held fixed, and that is
    how it is built: the value of the losses is outer, their gradient is the line above, and each
    task may be weighted afterwards. If `inner is outer` the gradient at the minimum is d_eta outer
    alone (envelope theorem) and no system is left.

    The gradient is exact only at a minimum, and as good as the linear solve: look at the stats.
    Far from the minimum it can be wrong by any factor, and "curvature" may be negative.  It is a
    first derivative: u does not depend on eta, so differentiating it once more gives a wrong
    answer.

    linear_solver: solves with the Hessian of `inner`, given products only; None takes `Direct`
        where a task has at most 32 numbers (in any units), else `CG`.
    certify: also solve for the distance to the minimum, H^-1 d_phi inner, so that "decrement"
        says about how far off in the unit of the loss phi is.

    Source: Rajeswaran et al. 2019 (iMAML); Lorraine, Vicol and Duvenaud 2020; Blondel et al. 2022.

    The inner loss (phi - theta0)^2 / 2 + (phi - 2)^2 / 2 has its minimum at phi = (theta0 + 2) / 2,
    so the derivative of phi^2 / 2 with respect to theta0 is phi / 2:

    >>> near = lambda w, to: 0.5 * (w - to) ** 2
    >>> inner = lambda phi, eta: near(phi["w"], eta["theta0"]) + near(phi["w"], 2.0)
    >>> outer = lambda phi, eta: 0.5 * phi["w"] ** 2
    >>> eta = {"theta0": torch.tensor(0.0, requires_grad=True)}
    >>> losses, stats = ImplicitAdjoint()(inner, outer, {"w": torch.tensor([1.0])}, eta)
    >>> torch.autograd.grad(losses.sum(), eta["theta0"]), stats["curvature"]
    ((tensor(0.5000),), tensor([2.]))
    """

    linear_solver: LinearSolver | None = None
    certify: bool = True

    def __call__(
        self,
        inner: Objective,
        outer: Objective,
        phi: Tree,
        eta: dict[str, Tensor],
        guess: Tree | None = None,
        units: Tree | None = None,
        ceiling: Quadratic | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The outer losses, whose gradient with respect to eta goes through the minimum.

        `torch.autograd.grad(losses.sum(), eta)` costs less than `losses.sum().backward()`: the
        latter also carries derivatives back to the copy of phi that is made here, and drops them.

        inner, outer: see `Objective`; `inner` twice differentiable at `phi`.
        phi: the inner minimum, tensors `(tasks, ...)`; its graph is not used.
        eta: tensors of any shape, some of which ask for a gradient.  Either objective may
            ignore any of them.
        guess: of u, where `CG` starts: the u of a problem nearby.
        units: the size of a usual change of each entry of phi, shaped as phi: a `CG` without a
            preconditioner of its own takes their squares for one.
        ceiling: a quadratic form v' M v that v' H^-1 v is nowhere above, H the Hessian of
            `inner` in phi at *any* phi; None where none is known.

        Returns losses `(tasks,)`, and the stats that certify them, `(tasks,)` each:

        gradient_norm: |g| with g = d_phi inner.
        decrement: an estimate of 1/2 g' H^-1 g, what the inner loss can still fall by as far as it
            is quadratic; NaN where it was not asked for.  CG finds nine tenths of it as a rule and
            can miss directions too weak to show in its first steps.
        decrement_bound: 1/2 g' M g, which the inner loss lies above its minimum by at most; NaN
            without a ceiling.
        residual, linear_result: of the linear solve; 0 and CONVERGED where the envelope theorem
            made it unnecessary.
        linear_error: an estimate of the relative error of u in the norm of H, |r| / sqrt(curvature
            u'v) with r = v - H u.
        linear_bound: what that error is at most, sqrt(r' M r / (u'v + u'r)); NaN without a ceiling.
        curvature: the smallest that the solves met; NaN where none was made.
        products: how many with H.
        solution: given a guess, the tree u.

        Raises ValueError where an objective does not return one loss per task.
        """
        if isinstance(inner, Graphed) and isinstance(outer, Graphed):
            return self._by_graphs(inner, outer, tree.detach(phi), eta, guess, units, ceiling)
        point = tree.leaves(phi)
        with torch.enable_grad():
            envelope = inner is outer
            losses = _losses(
                inner if envelope else outer, point, eta, "inner" if envelope else "outer"
            )
            known = losses if envelope else _losses(inner, point, eta, "inner")
            gradient = _gradient(
                known, point, create_graph=self.certify or not envelope, retain_graph=True
            )
            g = tree.detach(gradient)
            stats = _nothing_solved(g, ceiling)
            if self.certify or not envelope:
                # one graph of the gradient serves all the products and the last derivative with
                # respect to eta
                v = None if envelope else _gradient(losses, point, retain_graph=True)
                u, solved = self._certified(
                    lambda x: _pull_back(gradient, point, x), v, g, point, guess, units, ceiling
                )
                stats |= solved
                if u is not None:
                    slope = tree.dot(u, gradient)
                    # the parenthesis is exactly 0, unless the gradient is not finite; then the loss
                    # shows it
                    losses = losses - (slope - slope.detach())
        return losses, stats

    def _by_graphs(
        self,
        inner: Graphed,
        outer: Graphed,
        point: Tree,
        eta: dict[str, Tensor],
        guess: Tree | None,
        units: Tree | None,
        ceiling: Quadratic | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The same, each derivative by its compiled graph."""
        known = tree.detach(eta)
        flat = tree.flatten(point)
        u, envelope = None, inner is outer
        losses, v = outer.run(losses_and_gradient, point, known)
        if self.certify or not envelope:
            g_rows, product = inner.linearize(_gradient_and_products, flat, point, known)
            g = tree.unflatten(g_rows, point)

            def matvec(x: Tree) -> Tree:
                return tree.unflatten(run(product, call, tree.flatten(x)), point)

            u, solved = self._certified(
                matvec, None if envelope else v, g, point, guess, units, ceiling
            )
            stats = _nothing_solved(g, ceiling) | solved
        else:
            stats = _nothing_solved(v, ceiling)
        learned = tuple(name for name, value in eta.items() if value.requires_grad)

        def pull(weights: Tensor) -> list[Tensor]:
            direct = outer.run(_EtaGradient(learned), point, known, weights)
            if u is None:
                return list(direct.values())
            through = inner.run(_MixedGradient(learned), point, known, u, weights)
            return [direct[name] - through[name] for name in learned]

        return _Pulled.apply(losses, pull, *(eta[name] for name in learned)), stats

    def _certified(
        self,
        product: Matvec,
        v: Tree | None,
        g: Tree,
        point: Tree,
        guess: Tree | None,
        units: Tree | None,
        ceiling: Quadratic | None,
    ) -> tuple[Tree | None, dict[str, Any]]:
        """u with H u = v (None without v), and the stats that the solves give."""
        solutions = self._solve(_in_units(self.solver(g), units), product, v, g, guess)
        curvature, products = solutions[0].stats["curvature"], solutions[0].stats["products"]
        for solution in solutions[1:]:
            curvature = torch.fmin(curvature, solution.stats["curvature"])
            products = products + solution.stats["products"]
        stats: dict[str, Any] = {"curvature": curvature, "products": products}
        if self.certify:
            hidden = _hidden_by_rounding(product, point, curvature, ceiling)
            stats["decrement"] = 0.5 * tree.dot(solutions[-1].value, g) + hidden
            stats["products"] = products + 1
        if v is None:
            return None, stats
        u, residual = solutions[0].value, solutions[0].stats["residual"]
        energy, size = tree.dot(u, v), residual * tree.norm(v)
        tiny = torch.finfo(size.dtype).tiny
        error = size / (curvature * energy).clamp(min=tiny).sqrt()
        if ceiling is not None:
            # of any u, solution or not: v' H^-1 v is u'v + u'r + r' H^-1 r
            r = tree.add(v, tree.detach(product(u)), -1.0)
            bound = (ceiling(r) / (energy + tree.dot(u, r)).clamp(min=tiny)).sqrt()
            stats["linear_bound"] = torch.where(size > 0, bound, size)
            stats["products"] = products + 1
        stats |= {
            "residual": residual,
            "linear_result": solutions[0].result,
            "linear_error": torch.where(size > 0, error, size),
        }
        if guess is not None:
            stats["solution"] = u
        return u, stats

    def solver(self, point: Tree) -> LinearSolver:
        """What solves systems of the size of `point`."""
        if self.linear_solver is not None:
            return self.linear_solver
        return Direct() if sum(x[0].numel() for x in point.values()) <= MAX_DIRECT_SIZE else CG()

    def _solve(
        self, solver: LinearSolver, product: Matvec, v: Tree | None, g: Tree, guess: Tree | None
    ) -> list[Solution]:
        """The solutions for v and, to certify, for g."""
        if isinstance(solver, Direct):
            return solver.solve_all(
                product, [b for b in (v, g if self.certify else None) if b is not None]
            )
        if v is None:
            solutions = []
        elif isinstance(solver, CG):
            solutions = [solver.solve(product, v, guess)]
        else:
            stats = ("residual", "curvature", "products")
            found = checked(solver.solve(product, v), solver, stats, v)
            solutions = [found if type(solver) is Neumann else _looked_at(found, product, v)]
        if self.certify:
            # its order of magnitude is enough, at no more than what the other solve may cost;
            # judged by the energy, since weak directions, where most of it may lie, hardly show in
            # the residual
            known = (
                solver
                if isinstance(solver, CG)
                else CG(max_steps=getattr(solver, "num_terms", None))
            )
            rough = replace(known, rtol=None, energy_rtol=0.1)
            solutions.append(rough.solve(product, g))
        return solutions


def _looked_at(solution: Solution, product: Matvec, v: Tree) -> Solution:
    """The solution with the residual that it has, at one product more.

    What a solver of one's own says of itself is a recursion's as a rule, which follows another x
    than a slip returns.
    """
    u = solution.value
    applied = tree.detach(product(u))
    size, length = tree.norm(v), tree.dot(u, u)
    off = tree.norm(tree.add(v, applied, -1.0))
    met = torch.where(length > 0, tree.dot(u, applied) / length, torch.inf)
    stats = {
        "residual": torch.where(size > 0, off / size, off),
        "curvature": torch.fmin(solution.stats["curvature"], met),
        "products": solution.stats["products"] + 1,
    }
    return solution._replace(stats=solution.stats | stats)


def _hidden_by_rounding(
    product: Matvec, point: Tree, curvature: Tensor, ceiling: Quadratic | None
) -> Tensor:
    """Nats of a decrement that no gradient tells: what its rounding comes to in weak directions.

    A gradient is a sum of terms as large as |H| |phi|, and carries eps of their size, in whatever
    direction; how large H is a direction of no meaning tells, which hardly ever is a weak one.
    """
    flat = tree.flatten(point).detach()
    way = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device) + 0.5)
    way = (way / way.norm()).expand_as(flat)
    stretched = tree.unflatten(flat.norm(dim=1, keepdim=True) * way, point)
    lost = torch.finfo(flat.dtype).eps * tree.norm(tree.detach(product(stretched)))
    if ceiling is not None:
        return 0.5 * ceiling(tree.unflatten(lost[:, None] * way, point))
    weakest = curvature.clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.where(curvature > 0, 0.5 * lost.square() / weakest, 0.0)


def _in_units(solver: LinearSolver, units: Tree | None) -> LinearSolver:
    """The solver; a `CG` without a preconditioner takes the diagonal of the units' squares for
    one.
    """
    if units is None or not isinstance(solver, CG) or solver.preconditioner is not None:
        return solver
    squares = tree.map_tree(lambda x: x.detach().square(), units)
    return replace(solver, preconditioner=lambda v: tree.map_tree(torch.mul, squares, v))


def losses_and_gradient(fn: Objective, phi: Tree, eta: dict[str, Tensor]) -> tuple[Tensor, Tree]:
    """fn's losses and their derivative with respect to phi, without a graph."""
    point = tree.leaves(phi)
    with torch.enable_grad():
        losses = _losses(fn, point, eta, "outer")
        return losses.detach(), _gradient(losses, point)


def _gradient_and_products(
    fn: Objective, flat: Tensor, like: Tree, eta: dict[str, Tensor]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """d fn / d phi and the products with d2 fn / dphi2, on rows `(tasks, size)`."""
    point = tree.leaves(tree.unflatten(flat, like))
    with torch.enable_grad():
        gradient = _gradient(_losses(fn, point, eta, "inner"), point, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return tree.flatten(_pull_back(gradient, point, tree.unflatten(v, like)))

    return tree.flatten(tree.detach(gradient)), product


@dataclass(frozen=True)
class _EtaGradient:
    """The piece d (weights' losses) / d eta, by name; names: those that are asked for."""

    names: tuple[str, ...]

    def __call__(
        self, fn: Objective, phi: Tree, eta: dict[str, Tensor], weights: Tensor
    ) -> dict[str, Tensor]:
        eta = eta | {name: eta[name].detach().requires_grad_() for name in self.names}
        with torch.enable_grad():
            value = (weights * fn(phi, eta)).sum()
        return gradient_by_name(value, eta, self.names)


@dataclass(frozen=True)
class _MixedGradient:
    """The piece d (sum_i weights_i <u_i, d losses_i / d phi_i>) / d eta, by name."""

    names: tuple[str, ...]

    def __call__(
        self, fn: Objective, phi: Tree, eta: dict[str, Tensor], u: Tree, weights: Tensor
    ) -> dict[str, Tensor]:
        eta = eta | {name: eta[name].detach().requires_grad_() for name in self.names}
        point = tree.leaves(phi)
        with torch.enable_grad():
            gradient = _gradient(fn(point, eta), point, create_graph=True)
            value = (weights * tree.dot(u, gradient)).sum()
        return gradient_by_name(value, eta, self.names)


def gradient_by_name(
    value: Tensor, eta: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """d value / d eta[name] of each name.

    It is 0 for what a scalar does not depend on (a constant has no graph at all).
    """
    names = tuple(names)
    if not value.requires_grad:
        return {name: torch.zeros_like(eta[name]) for name in names}
    found = torch.autograd.grad(value, [eta[name] for name in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


class _Pulled(torch.autograd.Function):
    """Losses `(tasks,)` whose derivative with respect to eta is a function of their weights."""

    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, pull: Callable[[Tensor], list[Tensor]], *eta: Tensor
    ) -> Tensor:
        ctx.pull = pull
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return (None, None, *ctx.pull(outputs[0].contiguous()))


def unrolled(outer: Objective, phi: Tree, eta: dict[str, Tensor]) -> Tensor:
    """Outer losses `(tasks,)` at `phi`, differentiated through whatever graph `phi` carries (MAML).

    >>> theta0 = torch.tensor([1.0], requires_grad=True)
    >>> phi = {"w": theta0 - 0.1 * theta0}  # one step of gradient descent on theta^2 / 2
    >>> torch.autograd.grad(unrolled(lambda phi, eta: phi["w"] ** 2, phi, {}).sum(), theta0)
    (tensor([1.6200]),)
    """
    return _losses(outer, phi, eta, "outer")


def detached(outer: Objective, phi: Tree, eta: dict[str, Tensor]) -> Tensor:
    """Outer losses `(tasks,)` at `phi` taken as a constant.

    Only the direct dependence on eta is differentiated.

    >>> scale = torch.tensor(3.0, requires_grad=True)
    >>> phi = {"w": scale * torch.tensor([2.0])}
    >>> fn = lambda phi, eta: eta["scale"] * phi["w"]
    >>> torch.autograd.grad(detached(fn, phi, {"scale": scale}).sum(), scale)
    (tensor(6.),)
    """
    return _losses(outer, tree.detach(phi), eta, "outer")


def _nothing_solved(g: Tree, ceiling: Quadratic | None) -> dict[str, Tensor]:
    norm = tree.norm(g)
    unknown = torch.full_like(norm, math.nan)
    nothing = torch.zeros_like(norm, dtype=torch.int64)
    return {
        "gradient_norm": norm,
        "decrement": unknown,
        # by strong convexity; no solve is needed for it
        "decrement_bound": unknown if ceiling is None else 0.5 * ceiling(g),
        "residual": torch.zeros_like(norm),
        "linear_error": torch.zeros_like(norm),
        "linear_bound": unknown if ceiling is None else torch.zeros_like(norm),
        "curvature": unknown,
        "linear_result": nothing + int(Result.CONVERGED),
        "products": nothing,
    }


def _losses(fn: Objective, phi: Tree, eta: dict[str, Tensor], name: str) -> Tensor:
    return tree.one_for_each(fn(phi, eta), phi, f"the {name} objective")


def _gradient(
    losses: Tensor, point: Tree, retain_graph: bool = False, create_graph: bool = False
) -> Tree:
    """d losses / d point, 0 where there is no dependence; row i is the gradient of loss i."""
    if not losses.requires_grad:
        return tree.zeros_like(point)
    found = torch.autograd.grad(
        losses.sum(),
        list(point.values()),
        retain_graph=retain_graph or create_graph,
        create_graph=create_graph,
        materialize_grads=True,
    )
    return dict(zip(point, found, strict=True))


def _pull_back(outputs: Tree, point: Tree, v: Tree) -> Tree:
    """(d outputs / d point)^T v.

    Where `outputs` is a gradient, the product of its Hessian with v.
    """
    found = pulled_back(list(outputs.values()), list(point.values()), [v[name] for name in outputs])
    return dict(zip(point, found, strict=True))
