"""The Gaussian of eta: q(eta) prod_i q_i(theta_i | eta), by the bound that fits the prior.

With M(eta) = sum_i min_phi F_i(phi, eta), an upper bound on -log p(y | eta), the bound on -log p(y)
is

    E_q[M(eta) - log p(eta)] - H[q],        q(eta) = N(m, L L') in the coordinates of `Coordinates`.

The tasks' guides follow eta, so q is never mean-field between a prior and the weights that it is
the prior of.  E_q is taken by spherical cubature; the guides at all cubature points are rows of one
joint problem, (m, L) its shared part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.hyper.coordinates import Coordinates
from varmeta.hyper.gaussian import Gaussian, Nodes
from varmeta.numerics.joint import Step, minimize_jointly
from varmeta.numerics.joint_model import Penalty, SharedLosses, SharedProblem
from varmeta.numerics.rows import rowwise
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, detach, flatten, map_tree, unflatten
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch


class _Losses:
    """F_i of K eta at once: `(K, tasks)` from phi `(K, tasks, ...)` and eta `(K, ...)`."""

    def __init__(self, problem: Problem, batch: Batch) -> None:
        groups = batch.by_size()
        self._parts = [(rows, rowwise(problem.losses("elbo", group, 0))) for rows, group in groups]
        self._back = torch.cat([rows for rows, _ in groups]).argsort()

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
        found = [
            losses(map_tree(lambda x, rows=rows: x[:, rows], phi), dict(eta))
            for rows, losses in self._parts
        ]
        return torch.cat(found, 1)[:, self._back]


class Curvature:
    """M at (phi, eta) as a function of the coordinates, to second order.

    hessian `(size, size)`: of min_phi sum_i F_i plus the penalty, the Schur complement of phi's
        blocks.
    follow `(tasks, m, size)`: d phi* = -follow d coordinates.
    Both are NaN where rounding has left a task's block singular.
    """

    def __init__(
        self, fn: SharedLosses, phi: Tree, point: dict[str, Tensor], penalty: Penalty | None
    ) -> None:
        shared = SharedProblem(fn, phi, point, penalty)
        x, e = shared.start()
        _, _, a, b, c = shared.hessian(x, e)
        follow, singular = torch.linalg.solve_ex(a, b)
        self.follow = torch.where((singular != 0)[:, None, None], math.nan, follow)
        schur = c - (b.mT @ self.follow).sum(0)
        self.hessian = 0.5 * (schur + schur.mT)


def shared_losses(problem: Problem, batch: Batch, coordinates: Coordinates) -> SharedLosses:
    """F_i `(tasks,)` as a function of phi and the coordinates."""
    losses = elbo_losses(problem, batch)
    return lambda phi, point: losses(phi, coordinates.eta(point))


def fit_gaussian(
    problem: Problem,
    batch: Batch,
    coordinates: Coordinates,
    start: Mapping[str, Tensor],
    free: Tensor,
    *,
    diagonal: bool = False,
    jacobian: bool = True,
    tolerance: float = 1e-9,
    max_steps: int = 200,
    callback: Callable[[Step], object] | None = None,
) -> Gaussian:
    """q(eta) at its best bound, from eta = `start`.

    It is put at the mode first, with the curvature there, and goes from there to the best bound.
    Its result is NON_FINITE where no place has a finite bound.

    free: which coordinates get a Gaussian, `(size,)`; the others get their best point.
    diagonal: whether the coordinates are independent under q.
    jacobian: see `Coordinates.log_density`.
    tolerance, max_steps, callback: of the Newton steps on the bound.
    """

    def penalty(point: Mapping[str, Tensor]) -> Tensor:
        return -coordinates.log_density(point, jacobian)

    single = shared_losses(problem, batch, coordinates)
    begin, guides = detach(coordinates.of(start)), detach(problem.start(batch, start))
    mode = minimize_jointly(single, guides, begin, penalty=penalty, max_steps=max_steps)
    if mode.result in (Result.NON_FINITE, Result.DIVERGED):
        point = coordinates.vector(mode.eta)
        return Gaussian.lost(point, mode.result)
    # the mode of a density may lie far from its mass, even at an edge of its support, where the
    # start is the better place
    still = minimize_jointly(lambda phi, _: single(phi, begin), guides, {}, max_steps=max_steps)
    bounds = [
        _Bound(problem, batch, coordinates, penalty, place, free, diagonal, single)
        for place in ((mode.phi, mode.eta), (still.phi, begin))
    ]
    best = min(bounds, key=lambda bound: bound.value)
    return best.minimum(tolerance, max_steps, callback)


class _Bound:
    """The bound as a joint problem: its rows are the guides at the nodes of the cubature, its
    shared part is (m, L).
    """

    def __init__(
        self,
        problem: Problem,
        batch: Batch,
        coordinates: Coordinates,
        penalty: Callable[[Mapping[str, Tensor]], Tensor],
        place: tuple[Tree, dict[str, Tensor]],
        free: Tensor,
        diagonal: bool,
        single: SharedLosses,
    ) -> None:
        """place: phi and the coordinates where the Gaussian starts, by the curvature there."""
        self._losses, self.tasks = _Losses(problem, batch), len(batch)
        phi, point = place
        curvature = Curvature(single, phi, point, penalty)
        self.nodes = Nodes(coordinates, penalty, point, curvature.hessian, free, diagonal)
        self._phi, self._follow = phi, curvature.follow
        self.parameters, self.value = self.nodes.begin(self._start_value)
        self.rows = self._rows(self.parameters)

    def _rows(self, parameters: Mapping[str, Tensor]) -> Tree:
        """Where the guides at the nodes start."""
        moved = self.nodes.points(parameters) - self.nodes.centre
        flat = flatten(self._phi) - torch.einsum("tmp,kp->ktm", self._follow, moved)
        return unflatten(flat.reshape(-1, flat.shape[-1]), self._phi)

    def fn(self, rows: Tree, parameters: Mapping[str, Tensor]) -> Tensor:
        number = len(self.nodes)
        phi = map_tree(lambda x: x.reshape(number, self.tasks, *x.shape[1:]), rows)
        return self._losses(phi, self.nodes.eta(parameters)).reshape(-1) / number

    def _start_value(self, parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            loss = self.fn(self._rows(parameters), parameters).sum() + self.nodes.penalty(
                parameters
            )
            return float(loss) - self.nodes.entropy

    def minimum(
        self, tolerance: float, max_steps: int, callback: Callable[[Step], object] | None
    ) -> Gaussian:
        solution = minimize_jointly(
            self.fn,
            self.rows,
            self.parameters,
            penalty=self.nodes.penalty,
            tolerance=tolerance,
            max_steps=max_steps,
            callback=callback,
        )
        return self.nodes.gaussian(solution.eta, float(solution.stats["loss"][-1]), solution.result)
