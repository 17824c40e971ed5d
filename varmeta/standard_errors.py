"""Standard errors of theta0 and the shared parameters: the curvature of M(eta) = sum_i min_phi F_i(phi, eta) at the optimum.

As lme4's, they are given the variances: the inverse of the Hessian's block of theta0 and the shared parameters.  Exact where
the bound is, in linear-Gaussian models; elsewhere as good as the bound's curvature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.bayes.quadrature import Quadrature
from varmeta.buckets import elbo_losses
from varmeta.hyper.conditional import log_joint
from varmeta.hyper.family import Curvature
from varmeta.in_double import in_double
from varmeta.joint_newton import newton_applies

if TYPE_CHECKING:
    from varmeta.result import Fit


def standard_errors(fit: Fit) -> dict[str, Tensor] | None:
    """By parameter name, in the parameter's shape; of a posterior of eta the standard deviations of its Gaussian.

    None where they are not known: for points, noisy objectives, networks, an outer objective on other data, or at a place
    that is no minimum.
    """
    names = [name for name in fit.model.start if name in fit.eta]  # theta0 that is held fixed has none
    if fit.hyper is not None:
        # of the Gaussian, exact under "reml" for a linear model; the weighted draws are those of `hyperparameters`
        sds = fit.hyper.factor.square().sum(1).sqrt().split([value.numel() for value in fit.eta.values()])
        named = dict(zip(fit.eta, sds, strict=True))
        return {name: named[name].reshape(fit.eta[name].shape) for name in names}
    phi, batch = fit.run.state.phi, fit.tasks.batch()
    if isinstance(fit.problem.guide, Quadrature) and fit.strategy.outer == "elbo" and fit.converged:
        return _from(_evidence_hessian(fit, fit.problem.guide), names, fit.eta)
    if phi is None or fit.is_point or fit.strategy.outer != "elbo" or not fit.converged:
        return None
    if not newton_applies(fit.strategy, fit.problem, batch, fit.eta):
        return None
    wide = in_double(fit.problem, batch, phi, fit.eta)
    batch, phi, eta = (batch, phi, fit.eta) if wide is None else wide
    return _from(Curvature(elbo_losses(fit.problem, batch), phi, eta, fit.model.penalty).hessian, names, fit.eta)


def _evidence_hessian(fit: Fit, guide: Quadrature) -> Tensor:
    """Of -log p(y | eta) in all of eta, `(p, p)`.

    The nodes stay where they are: the integral does not depend on where it is looked at.
    """
    eta, data = {name: value.detach() for name, value in fit.eta.items()}, fit.tasks.batch().support
    with torch.no_grad():
        theta, log_p, _ = guide.at_nodes(fit.posterior().phi, eta, data)
        constant = log_p - log_joint(fit.model, theta, eta, data)

    def total(vector: Tensor) -> Tensor:
        parts = vector.split([value.numel() for value in eta.values()])
        here = {name: part.reshape(value.shape) for (name, value), part in zip(eta.items(), parts, strict=True)}
        evidence = (constant + log_joint(fit.model, theta, here, data)).logsumexp(0)
        return fit.model.penalty(here) - evidence.sum()

    at = torch.cat([value.reshape(-1) for value in eta.values()])
    return torch.autograd.functional.hessian(total, at)


def _from(hessian: Tensor, names: list[str], eta: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Standard errors from a Hessian in all of eta, the parameters that are not named held fixed."""
    block = torch.cat([torch.full((value.numel(),), name in names) for name, value in eta.items()]).to(hessian.device)
    factor, info = torch.linalg.cholesky_ex(hessian[block][:, block])
    if int(info) or not bool(factor.isfinite().all()):
        return None
    errors = torch.cholesky_inverse(factor).diagonal().sqrt().to(next(iter(eta.values())))
    ordered = [name for name in eta if name in names]
    parts = errors.split([eta[name].numel() for name in ordered])
    return {name: part.reshape(eta[name].shape) for name, part in zip(ordered, parts, strict=True)}
