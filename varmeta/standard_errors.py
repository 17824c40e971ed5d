"""Standard errors of theta0 and the shared parameters: the curvature of M(eta) = sum_i min_phi F_i(phi, eta) at the optimum.

As lme4's, they are given the variances: the inverse of the Hessian's block of theta0 and the shared parameters.  Exact where
the bound is, in linear-Gaussian models; elsewhere as good as the bound's curvature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.buckets import elbo_losses
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
    if phi is None or fit.is_point or fit.strategy.outer != "elbo" or not fit.converged:
        return None
    if not newton_applies(fit.strategy, fit.problem, batch, fit.eta):
        return None
    wide = in_double(fit.problem, batch, phi, fit.eta)
    batch, phi, eta = (batch, phi, fit.eta) if wide is None else wide
    hessian = Curvature(elbo_losses(fit.problem, batch), phi, eta, fit.model.penalty).hessian
    block = torch.cat([torch.full((value.numel(),), name in names) for name, value in fit.eta.items()]).to(
        hessian.device
    )
    factor, info = torch.linalg.cholesky_ex(hessian[block][:, block])
    if int(info) or not bool(factor.isfinite().all()):
        return None
    errors = torch.cholesky_inverse(factor).diagonal().sqrt().to(next(iter(fit.eta.values())))
    ordered = [name for name in fit.eta if name in names]
    parts = errors.split([fit.eta[name].numel() for name in ordered])
    return {name: part.reshape(fit.eta[name].shape) for name, part in zip(ordered, parts, strict=True)}
