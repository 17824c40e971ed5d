"""The Gaussian of eta: q(eta) prod_i q_i(theta_i | eta), fitted by the same bound that fits the prior.

With M(eta) = sum_i min_phi F_i(phi, eta), an upper bound on -log p(y | eta), the bound on -log p(y) is

    E_q[M(eta) - log p(eta)] - H[q],        q(eta) = N(m, L L') in the coordinates of `Coordinates`.

The tasks' guides follow eta, so q is never mean-field between a prior and the weights that it is the prior of.  E_q is
taken by spherical cubature; the guides at all cubature points are rows of one joint problem, (m, L) its shared part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.bayes.prior import unit_lower
from varmeta.buckets import buckets, elbo_losses
from varmeta.hyper.coordinates import Coordinates
from varmeta.hyper.rows import rowwise
from varmeta.numerics.arrowhead import Step, minimize_jointly
from varmeta.numerics.arrowhead_model import Penalty, SharedLosses, SharedProblem
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree, detach, flatten, map_tree, unflatten
from varmeta.problem import Problem
from varmeta.tasks import Batch


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
        found = [losses(map_tree(lambda x, rows=rows: x[:, rows], phi), dict(eta)) for rows, losses in self._parts]
        return torch.cat(found, 1)[:, self._back]


class Curvature:
    """M at (phi, eta) as a function of the coordinates, to second order.

    hessian `(size, size)`: of min_phi sum_i F_i plus the penalty, the Schur complement of phi's blocks.
    follow `(tasks, m, size)`: d phi* = -follow d coordinates.
    """

    def __init__(self, fn: SharedLosses, phi: Tree, point: dict[str, Tensor], penalty: Penalty | None) -> None:
        shared = SharedProblem(fn, phi, point, penalty)
        x, e = shared.start()
        _, _, a, b, c = shared.hessian(x, e)
        self.follow = torch.linalg.solve(a, b)
        schur = c - (b.mT @ self.follow).sum(0)
        self.hessian = 0.5 * (schur + schur.mT)


def shared_losses(problem: Problem, batch: Batch, coordinates: Coordinates) -> SharedLosses:
    """F_i `(tasks,)` as a function of phi and the coordinates."""
    losses = elbo_losses(problem, batch)
    return lambda phi, point: losses(phi, coordinates.eta(point))


def fit_gaussian(
    problem: Problem, batch: Batch, coordinates: Coordinates, start: Mapping[str, Tensor], free: Tensor, *,
    diagonal: bool = False, jacobian: bool = True, tolerance: float = 1e-9, max_steps: int = 200,
    callback: Callable[[Step], object] | None = None,
) -> Gaussian:  # fmt: skip
    """q(eta), from eta = `start`: at the mode first, with the curvature there, and from there to the best bound.

    free: which coordinates get a Gaussian, `(size,)`; the others get their best point.
    diagonal: whether the coordinates are independent under q.
    jacobian: see `Coordinates.log_density`.
    tolerance, max_steps, callback: of the Newton steps on the bound.
    """

    def log_density(point: Mapping[str, Tensor]) -> Tensor:
        return coordinates.log_density(point, jacobian)

    single = shared_losses(problem, batch, coordinates)
    begin = detach(coordinates.of(start))
    mode = minimize_jointly(
        single, detach(problem.start(batch, start)), begin, penalty=lambda e: -log_density(e), max_steps=max_steps
    )
    if mode.result in (Result.NON_FINITE, Result.DIVERGED):
        point = coordinates.vector(mode.eta)
        return Gaussian(point, torch.zeros(len(free), len(free)).to(point), math.nan, mode.result)
    phi, centre = mode.phi, coordinates.vector(mode.eta)
    curvature = Curvature(single, phi, mode.eta, lambda e: -log_density(e))
    hessian, follow = curvature.hessian, curvature.follow
    white = _whiten(hessian, free, diagonal)
    count, size, tasks = int(free.sum()), len(free), len(batch)
    index = free.nonzero().flatten().to(white.device)
    axes = math.sqrt(count) * torch.eye(count).to(white)
    standard = torch.cat([axes, -axes])  # (K, count)
    losses = _Losses(problem, batch)

    def points(parameters: Mapping[str, Tensor]) -> Tensor:
        """Coordinates at the nodes, `(K, size)`."""
        factor = torch.diag_embed(parameters["log_scale"].exp())
        if "tril" in parameters:
            factor = factor @ unit_lower(parameters["tril"], count)
        spread = torch.zeros(len(standard), size).to(white).index_copy(1, index, standard @ factor.mT)
        return centre + (parameters["mean"] + spread) @ white.mT

    def fn(rows: Tree, parameters: Mapping[str, Tensor]) -> Tensor:
        eta = coordinates.eta_of(points(parameters))
        guides = map_tree(lambda x: x.reshape(len(standard), tasks, *x.shape[1:]), rows)
        return losses(guides, eta).reshape(-1) / len(standard)

    def penalty(parameters: dict[str, Tensor]) -> Tensor:
        densities = torch.func.vmap(lambda vector: log_density(coordinates.named(vector)))(points(parameters))
        return -densities.mean() - parameters["log_scale"].sum()

    parameters = {"mean": torch.zeros(size).to(white), "log_scale": torch.zeros(count).to(white)}
    if not diagonal and count > 1:
        parameters["tril"] = torch.zeros(count * (count - 1) // 2).to(white)
    moved = points(parameters) - centre
    rows = flatten(phi) - torch.einsum("tmp,kp->ktm", follow, moved)
    solution = minimize_jointly(
        fn, unflatten(rows.reshape(-1, rows.shape[-1]), phi), parameters, penalty=penalty,
        tolerance=tolerance, max_steps=max_steps, callback=callback,
    )  # fmt: skip
    best = solution.eta
    factor = torch.diag_embed(best["log_scale"].exp())
    if "tril" in best:
        factor = factor @ unit_lower(best["tril"], count)
    whole = torch.zeros(size, size).to(white)
    whole[index[:, None], index] = white[index[:, None], index] @ factor
    entropy = 0.5 * count * (1 + math.log(2 * math.pi)) + float(white.diagonal()[index].log().sum())
    mean = centre + white @ best["mean"]
    return Gaussian(mean, whole, float(solution.stats["loss"][-1]) - entropy, solution.result)


def _whiten(hessian: Tensor, free: Tensor, diagonal: bool) -> Tensor:
    """W, lower triangular, with W' H W near the identity on the free coordinates, and a scale for each of the others."""
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
