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
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.fitting.groups_by_size import buckets, elbo_losses
from varmeta.hyper.coordinates import Coordinates
from varmeta.numerics.joint import Step, minimize_jointly
from varmeta.numerics.joint_model import Penalty, SharedLosses, SharedProblem
from varmeta.numerics.rows import rowwise
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, detach, flatten, map_tree, unflatten
from varmeta.priors.factors import unit_lower
from varmeta.strategies.problem import Problem
from varmeta.tasks import Batch

# Times that the Gaussian's scale may be narrowed, by half a unit of its logarithm, where it starts.
_NARROWER = 8


@dataclass(frozen=True)
class Gaussian:
    """mean `(size,)` and lower factor `(size, size)` in the coordinates; rows of zeros are points.

    bound: on -log p(y), nats (of the hyperpriors up to their constants).
    """

    mean: Tensor
    factor: Tensor
    bound: float
    result: Result


class _Losses:
    """F_i of K eta at once: `(K, tasks)` from phi `(K, tasks, ...)` and eta `(K, ...)`."""

    def __init__(self, problem: Problem, batch: Batch) -> None:
        groups = buckets(batch)
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
        return Gaussian(point, torch.zeros(len(free), len(free)).to(point), math.nan, mode.result)
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

    (m, L) are in units in which L is the identity where the Gaussian is that of the curvature at
    `place`, (phi, coordinates).
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
        self.coordinates, self._penalty, self._losses = (
            coordinates,
            penalty,
            _Losses(problem, batch),
        )
        phi, point = place
        curvature = Curvature(single, phi, point, penalty)
        self.centre = coordinates.vector(point)
        self.white = _whiten(curvature.hessian, free, diagonal)
        self.index, self.size, self.tasks = (
            free.nonzero().flatten().to(self.white.device),
            len(free),
            len(batch),
        )
        self.count = len(self.index)
        axes = math.sqrt(self.count) * torch.eye(self.count).to(self.white)
        self.standard = torch.cat([axes, -axes])  # (K, count)
        self.parameters = {
            "mean": torch.zeros(self.size).to(axes),
            "log_scale": torch.zeros(self.count).to(axes),
        }
        if not diagonal and self.count > 1:
            self.parameters["tril"] = torch.zeros(self.count * (self.count - 1) // 2).to(axes)
        self.value = math.inf
        self._begin(phi, curvature.follow)

    def _begin(self, phi: Tree, follow: Tensor) -> None:
        """Start the rows and the scale: narrower than the curvature says as long as that helps.

        A curvature is no width where the loss is not quadratic, and a hyperprior's support may end
        between the nodes.
        """
        widest = self.parameters["log_scale"]
        for narrower in range(_NARROWER + 1):
            parameters = self.parameters | {"log_scale": widest - 0.5 * narrower}
            moved = self.points(parameters) - self.centre
            flat = flatten(phi) - torch.einsum("tmp,kp->ktm", follow, moved)
            rows = unflatten(flat.reshape(-1, flat.shape[-1]), phi)
            value = self._start_value(rows, parameters)
            if value < self.value or narrower == 0:
                self.parameters, self.rows = parameters, rows
                self.value = value if math.isfinite(value) else math.inf
            elif math.isfinite(self.value):
                break

    def factor(self, parameters: Mapping[str, Tensor]) -> Tensor:
        diagonal = torch.diag_embed(parameters["log_scale"].exp())
        return (
            diagonal @ unit_lower(parameters["tril"], self.count)
            if "tril" in parameters
            else diagonal
        )

    def points(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Coordinates at the nodes, `(K, size)`."""
        moved = self.standard @ self.factor(parameters).mT
        spread = torch.zeros(len(moved), self.size).to(moved).index_copy(1, self.index, moved)
        return self.centre + (parameters["mean"] + spread) @ self.white.mT

    def fn(self, rows: Tree, parameters: Mapping[str, Tensor]) -> Tensor:
        eta, number = self.coordinates.eta_of(self.points(parameters)), len(self.standard)
        phi = map_tree(lambda x: x.reshape(number, self.tasks, *x.shape[1:]), rows)
        return self._losses(phi, eta).reshape(-1) / number

    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        density = rowwise(lambda vector: self._penalty(self.coordinates.named(vector)))
        return density(self.points(parameters)).mean() - parameters["log_scale"].sum()

    def _start_value(self, rows: Tree, parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return float(self.fn(rows, parameters).sum() + self.penalty(parameters)) - self._entropy

    @property
    def _entropy(self) -> float:
        """Of the Gaussian with L the identity."""
        return 0.5 * self.count * (1 + math.log(2 * math.pi)) + float(
            self.white.diagonal()[self.index].log().sum()
        )

    def minimum(
        self, tolerance: float, max_steps: int, callback: Callable[[Step], object] | None
    ) -> Gaussian:
        solution = minimize_jointly(
            self.fn,
            self.rows,
            self.parameters,
            penalty=self.penalty,
            tolerance=tolerance,
            max_steps=max_steps,
            callback=callback,
        )
        factor, at = torch.zeros_like(self.white), (self.index[:, None], self.index)
        factor[at] = self.white[at] @ self.factor(solution.eta)
        mean = self.centre + self.white @ solution.eta["mean"]
        return Gaussian(
            mean, factor, float(solution.stats["loss"][-1]) - self._entropy, solution.result
        )


def _whiten(hessian: Tensor, free: Tensor, diagonal: bool) -> Tensor:
    """W, lower triangular, with W' H W near the identity on the free coordinates, and a scale for
    each of the others.
    """
    free = free.to(hessian.device)
    size = hessian.diagonal().abs().clamp(min=1e-12)
    unit = size.rsqrt()
    white = torch.diag(unit)
    index = free.nonzero().flatten()
    if diagonal or not len(index):
        return white
    block = (unit[:, None] * hessian * unit)[index[:, None], index]
    values, vectors = torch.linalg.eigh(block)
    covariance = (vectors / values.abs().clamp(min=1e-6)) @ vectors.mT
    white[index[:, None], index] = unit[index][:, None] * torch.linalg.cholesky(covariance)
    return white
