"""What the evidence in closed form says at an eta: of every task, of the places, of the prior."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.guides.prior_parts import prior_parts
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.tree import cast, named_parts
from varmeta.numerics.triangular import cholesky
from varmeta.strategies.strategy import Eta


def log_evidence(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """log p(y | eta) of all tasks at any eta, nats, float64; differentiable."""
    wide = cast(eta, torch.float64)
    return of.log_evidence(wide, of.sums_of(_factor(of, wide)), of.white(wide))


def reach(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """The widest that a task's weights move its rows under the prior, in units of the noise.

    Its square is what I is added to, so that beyond 1e4 half of the digits are lost.
    """
    own = of.tasks.triangles[:, : of.size, : of.size]
    return (own @ _factor(of, cast(eta, torch.float64))).abs().amax()


def _factor(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """K at any eta, in float64, whatever its prior is made of."""
    _, root = prior_parts(of.model, eta)
    return of.own_whitening @ root.matrix * torch.exp(-of.log_scale(eta))


def losses(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """-log p(y_i | eta) `(T,)`, nats."""
    coordinates, at = of.enter(eta), of.white(cast(eta, torch.float64))
    white, log_det = of.whitened(of.factor(coordinates), of.tasks.triangles)
    rest = of.tasks.triangles[:, of.size :] @ at
    squares = (white @ at).square().sum(-1) + rest.square().sum(-1)
    return of.normal(coordinates, squares, log_det, of.tasks.counts, of.tasks.log_weights)


def covariance_of_places(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """Of the estimates of theta0 and the other linear parameters, given the variances, `(F, F)`.

    In the order of `places`: that of generalised least squares, or with a hyperprior on them
    the inverse of their Hessian.
    """
    coordinates = of.enter(eta)
    if of.profiles_places:
        scale = of.log_scale(coordinates).exp()
        return of.free.covariance(of.sums(coordinates).quadratic, scale)
    at = torch.cat([coordinates[name].reshape(-1) for name in of.places])
    known = {name: coordinates[name] for name in of.places}
    hessian = vector_hessian(lambda flat: of({**coordinates, **named_parts(flat, known)}), at)
    inverse: Tensor = torch.cholesky_inverse(cholesky(hessian))
    return inverse


def correlation(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """The prior's correlations `(D, D)` between the weights of whitened columns."""
    rows = torch.nn.functional.normalize(of.factor(of.enter(eta)), dim=-1)
    return rows @ rows.mT


def information(of: ProfiledEvidence, eta: Eta) -> Tensor:
    """What the best-informed task's data say about each weight alone, as a precision `(D,)`.

    In units of 1 / (the weight's unit)^2.
    """
    coordinates = of.enter(eta)
    factor = of.factor(coordinates)
    moved = of.tasks.triangles[:, : of.size, : of.size] @ factor
    root = cholesky(moved.mT @ moved + torch.eye(of.size).to(factor))
    # in the weights' units
    prior = torch.linalg.solve_triangular(of.own_whitening, factor, upper=True)
    after = torch.linalg.solve_triangular(root, prior.mT.expand_as(root), upper=False)
    before = prior.square().sum(-1)
    gained = after.square().sum(-2).reciprocal() - before.reciprocal()
    largest: Tensor = gained.amax(0)
    return largest * torch.exp(-2.0 * of.log_scale(coordinates))
