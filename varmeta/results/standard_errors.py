"""Standard errors of theta0 and the shared parameters: the curvature of M at the optimum.

M(eta) = sum_i min_phi F_i(phi, eta).

As lme4's, they are given the variances: the inverse of the Hessian's block of theta0 and the shared
parameters.  Exact where the bound is, in linear-Gaussian models; elsewhere as good as the bound's
curvature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.fitting.float64 import doubled, in_double
from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.fitting.profiled_at_eta import covariance_of_places
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.guides.closed_form import log_evidence
from varmeta.guides.quadrature import Quadrature
from varmeta.hyper.conditional import log_joint
from varmeta.hyper.family import Curvature
from varmeta.models.hyper_posterior import HyperPosterior
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.tree import Tree, cast, named_parts, take
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch


def of_hyper(hyper: HyperPosterior, eta: Eta, names: list[str]) -> dict[str, Tensor]:
    """Of a posterior of eta: its sds by parameter name.

    Under "reml" those of its Gaussian, exact for a linear model; else those of the weighted draws,
    as in `Fit.hyperparameters`: the Gaussian's coordinates are not eta's where a hyperprior's
    support has an edge.
    """
    if hyper.hyperguide != "reml":
        return {name: _sd(hyper.points[name], hyper.log_weights.exp()) for name in names}
    named = named_parts(hyper.factor.square().sum(1).sqrt(), eta)
    return {name: named[name] for name in names}


def _sd(points: Tensor, weights: Tensor) -> Tensor:
    """Of points `(N, ...)` whose weights `(N,)` add up to 1."""
    weights = weights.to(points)
    mean = torch.tensordot(weights, points, 1)
    variance: Tensor = torch.tensordot(weights, (points - mean).square(), 1)
    return variance.sqrt()


def in_closed_form(found: ProfiledEvidence, eta: Eta) -> dict[str, Tensor] | None:
    """By generalised least squares."""
    if not found.places:
        return {}
    errors = covariance_of_places(found, eta).diagonal().sqrt()
    if not bool(errors.isfinite().all()):
        return None
    return named_parts(errors.to(eta[found.places[0]]), {name: eta[name] for name in found.places})


def of_bound(
    problem: Problem, batch: Batch, phi: Tree, eta: Eta, names: list[str]
) -> dict[str, Tensor] | None:
    """By the curvature of the bound minimised over phi, in double precision.

    None where this is no minimum.
    """
    wide = in_double(problem, batch, phi, eta)
    batch, phi, at = (batch, phi, eta) if wide is None else wide
    return _from(
        Curvature(elbo_losses(problem, batch), phi, at, problem.model.penalty).hessian, names, eta
    )


def of_known_evidence(
    problem: Problem, batch: Batch, eta: Eta, names: list[str]
) -> dict[str, Tensor] | None:
    """By the curvature of the evidence where every task's is known, in all of eta.

    None where this is no maximum.
    """
    model, groups = problem.model, doubled(batch).by_size()
    at = cast({name: value.detach() for name, value in eta.items()}, torch.float64)

    def total(vector: Tensor) -> Tensor:
        here = named_parts(vector, at)
        parts = [log_evidence(model, here, group.support).sum() for _, group in groups]
        return model.penalty(here) - torch.stack(parts).sum()

    hessian = vector_hessian(total, torch.cat([value.reshape(-1) for value in at.values()]))
    return _from(hessian, names, eta)


def of_evidence(
    problem: Problem, batch: Batch, phi: Tree, eta: Eta, names: list[str]
) -> dict[str, Tensor] | None:
    """By the curvature of the evidence by quadrature, -log p(y | eta), in all of eta.

    None where this is no minimum.

    The nodes stay where they are: the integral does not depend on where it is looked at.
    """
    guide, model = problem.guide, problem.model
    assert isinstance(guide, Quadrature)
    eta = {name: value.detach() for name, value in eta.items()}
    parts = []
    with torch.no_grad():
        for rows, group in batch.by_size():
            theta, log_p = guide.at_nodes(take(phi, rows), eta, group.support)
            constant = log_p - log_joint(model, theta, eta, group.support)
            parts.append((theta, constant, group.support))

    def total(vector: Tensor) -> Tensor:
        here = named_parts(vector, eta)
        evidence = [
            (constant + log_joint(model, theta, here, data)).logsumexp(0).sum()
            for theta, constant, data in parts
        ]
        return model.penalty(here) - torch.stack(evidence).sum()

    at = torch.cat([value.reshape(-1) for value in eta.values()])
    return _from(vector_hessian(total, at), names, eta)


def _from(hessian: Tensor, names: list[str], eta: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Standard errors from a Hessian in all of eta, the parameters that are not named held
    fixed.
    """
    block = torch.cat(
        [torch.full((value.numel(),), name in names) for name, value in eta.items()]
    ).to(hessian.device)
    factor, info = torch.linalg.cholesky_ex(hessian[block][:, block])
    if int(info) or not bool(factor.isfinite().all()):
        return None
    errors = torch.cholesky_inverse(factor).diagonal().sqrt().to(next(iter(eta.values())))
    return named_parts(errors, {name: value for name, value in eta.items() if name in names})
