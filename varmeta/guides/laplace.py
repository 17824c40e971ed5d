"""Laplace's approximation per task: a Gaussian at the mode, with the curvature there.

phi is the mode theta_i*, the minimum of the penalised loss m_i(theta) = f_i(theta) - log p(theta |
eta).  With H_i the Hessian of m_i at theta_i*,

    q_i = N(theta_i*, H_i^-1),   -log p(y_i | eta) ~ m_i(theta_i*) - D/2 log 2 pi + 1/2 log det H_i,

the objective "elbo" under this guide, and what lme4's glmer maximises.  It is *not* a bound on the
evidence: it may lie above or below.  It does not have its minimum over theta at the mode, so its
derivative in eta has two parts: the direct one, and one through theta_i*(eta), on which H_i depends
too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from varmeta._checks import counted, one_of
from varmeta.guides.guide import BoundGuide, copies, sample
from varmeta.guides.kl import location, scale
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.models.pyro_program import DATA, TASKS, observed_log_prob
from varmeta.numerics.hessian import Rows, jacobian, symmetric
from varmeta.numerics.tree import Tree
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data

HessianName = Literal["auto", "exact", "gauss_newton"]
HESSIANS: tuple[HessianName, ...] = get_args(HessianName)
# Rows of the exact Hessian cost a second derivative each; beyond this many weights a network takes
# the Gauss-Newton matrix.
MAX_EXACT_SIZE = 64
# Curvature below this share of the prior's is raised to it: the sd of a weight is at most 100 times
# the prior's.
FLOOR = 1e-4


@dataclass(frozen=True, repr=False)
class Laplace(BoundGuide):
    """q_i = N(theta_i*, H_i^-1) at the mode theta_i*; see the head of this module.

    hessian: "exact"; "gauss_newton", J' B J with J the Jacobian of the network's output and B the
        Hessian of an observation's loss in the output (for Gaussian, Bernoulli, Categorical,
        Binomial and Poisson likelihoods also the Fisher information; never indefinite there);
        "auto", exact up to 64 weights, else Gauss-Newton.

    For `Implicit`, `Unrolled` and their kin: `Joint` has no mode to stand at.  Where H is not
    positive definite (a saddle, or an inner loop that has not arrived) it is raised along the
    prior's precision until it is, by `Posterior.diagnose` and a warning of `adapt` said to be so.
    Source: Tierney and Kadane, J. American Statistical Association 81 (1986); Bates et al., J.
        Statistical Software 67 (2015).

    Raises ValueError for an unknown Hessian, and for one that the model does not have.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> vm.fit(model, tasks, vm.Implicit(Laplace("exact"))).strategy.describe()
    'Implicit(laplace(hessian=exact), outer=Laplace evidence)'
    """

    hessian: HessianName = "auto"

    name = "laplace"
    is_point = False
    at_mode = True
    phi_is_loc = True
    # what "elbo" means under this guide, in words
    evidence_name = "Laplace evidence"

    def __post_init__(self) -> None:
        one_of("hessian", self.hessian, HESSIANS)

    def __repr__(self) -> str:
        return self.name if self.hessian == "auto" else f"{self.name}(hessian={self.hessian})"

    def bound(self, model: TaskModel) -> Laplace:
        size = model.weights.size
        # through the output alone a noise scale of the task's own has no derivative
        what = (
            "a Pyro program"
            if model.net is None
            else "noise of each task's own"
            if model.task_weights
            else None
        )
        if what and self.hessian == "gauss_newton":
            raise ValueError(
                f"{what} has no output of which to take a Jacobian: use hessian='exact'"
            )
        if what and self.hessian == "auto" and size > MAX_EXACT_SIZE:
            raise ValueError(
                f"the exact Hessian of {size} weights per task costs {size} second derivatives, "
                f"and {what} has no Gauss-Newton matrix: use hessian='exact' all the same, or "
                "guide='low_rank'"
            )
        return super().bound(model)

    def init(self, model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> Tree:
        return {"loc": copies(location(model.prior_distribution(eta)), data)}

    def __call__(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Any:
        factor, _ = self._factor(phi, eta, data)
        return sample(
            dist.MultivariateNormal(phi["loc"].unsqueeze(-2), scale_tril=factor.unsqueeze(-3))
        )

    def at_gaussian(self, loc: Tensor, factor: Tensor) -> Tree:
        return {"loc": loc}

    def penalised(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """m_i at phi, `(tasks,)`, in nats."""
        theta = phi["loc"].unsqueeze(-2)
        with validation_enabled(False):
            prior, nll = negative_log_likelihood(self.model, theta.unsqueeze(0), eta, data)
            return nll.squeeze(0) - prior.log_prob(theta).squeeze(-1)

    def evidence(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """-log of Laplace's evidence at phi, `(tasks,)`, in nats."""
        factor, _ = self._factor(phi, eta, data)
        log_det = -2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.penalised(phi, eta, data) + 0.5 * (
            log_det - phi["loc"].shape[-1] * math.log(2 * math.pi)
        )

    def doubt(
        self, phi: Tree, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]
    ) -> str | None:
        raised = self.raised(phi, eta, data) > 0
        bad = [name for name, yes in zip(names, raised.tolist(), strict=True) if yes]
        if not bad:
            return None
        return (
            "the Hessian where adaptation ended is not positive definite for "
            f"{counted(len(bad), 'task')} of {len(names)}, {bad[0]!r} first: no mode was reached "
            f"there, and the curvature was raised to {FLOOR:g} of the prior's.  Adapt to "
            "tolerance, raise the prior precision, or use guide='multivariate_normal'"
        )

    def raised(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """By how many of the prior's precisions H was raised, `(tasks,)`.

        0 where it is positive definite.
        """
        with torch.no_grad():
            return self._factor(phi, eta, data)[1]

    # -- the Hessian -------------------------------------------------------------------------------

    def _factor(self, phi: Tree, eta: Mapping[str, Tensor], data: Data) -> tuple[Tensor, Tensor]:
        """Lower triangular L with L L' = H^-1, `(tasks, D, D)`, and by how much H was raised."""
        asked = phi["loc"].requires_grad or any(value.requires_grad for value in eta.values())
        keep = torch.is_grad_enabled() and asked
        # block: the guide's own trace must not see the model run
        with torch.enable_grad(), validation_enabled(False), poutine.block():
            theta = (
                phi["loc"]
                if keep and phi["loc"].requires_grad
                else phi["loc"].detach().requires_grad_()
            )
            h = (
                self._gauss_newton(theta, eta, data)
                if self._uses_outputs
                else self._exact(theta, eta, data)
            )
            p = self.model.prior_distribution(eta)
            root = scale(p)
            assert root is not None
            root = torch.diag_embed(root) if isinstance(p, Independent) else root
            # in the prior's units, where its own curvature is 1 however nearly it is singular
            white = symmetric(root.mT @ h @ root)
            raised = _raised(white.detach())
            identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
            white = white + (1.0 + raised)[:, None, None] * identity
            # the lower factor of the inverse comes from the Cholesky factor with both axes reversed
            reverse = torch.linalg.cholesky_ex(white.flip(-1, -2)).L.flip(-1, -2).mT
            factor = root @ torch.linalg.solve_triangular(
                reverse, identity.expand_as(reverse), upper=False
            )
        return (factor if keep else factor.detach()), raised

    @property
    def _uses_outputs(self) -> bool:
        large = self.model.weights.size > MAX_EXACT_SIZE
        return self.hessian == "gauss_newton" or (self.hessian == "auto" and large)

    def _exact(self, theta: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """The Hessian of f_i, `(tasks, D, D)`."""
        _, nll = negative_log_likelihood(self.model, theta.unsqueeze(-2).unsqueeze(0), eta, data)
        return jacobian(_gradient(nll, theta), theta, Rows(), create_graph=True)

    def _gauss_newton(self, theta: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """J' B J summed over a task's observations, `(tasks, D, D)`."""
        if not data.width:
            return theta.new_zeros(*theta.shape, theta.shape[-1])
        x, y = data.filled
        out = self.model.output(self.model.moved(theta.unsqueeze(-2), eta, data), eta, x)
        flat = out.reshape(*data.mask.shape, -1)  # (tasks, points, channels)
        slopes = jacobian(flat.flatten(1), theta, Rows(), create_graph=True)
        slopes = slopes.reshape(*flat.shape, theta.shape[-1])
        given = out if out.requires_grad else out.detach().requires_grad_()
        with pyro.plate(TASKS, len(data), dim=-2), pyro.plate(DATA, data.width, dim=-1):
            known = self.model.told(eta, data)
            trace = poutine.trace(self.model.observe_output).get_trace(given, known, y, 2)
        losses = torch.where(data.mask, -observed_log_prob(trace), 0.0)
        slope = _gradient(losses, given).reshape(flat.shape)
        # observations do not share outputs, so that a channel of all of them is differentiated at
        # once
        rows = [_gradient(slope[..., c], given).reshape(flat.shape) for c in range(flat.shape[-1])]
        return torch.einsum("tncd,tnce,tnef->tdf", slopes, torch.stack(rows, -2), slopes)


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    return torch.autograd.grad(
        value.sum(), at, create_graph=True, allow_unused=True, materialize_grads=True
    )[0]


def _raised(white: Tensor) -> Tensor:
    """By how many of the prior's precisions a curvature must be raised to stay above `FLOOR`.

    white: the likelihood's, `(tasks, D, D)`, in the prior's units.
    """
    # LAPACK raises on NaN, for all tasks at once
    white = torch.where(
        torch.isfinite(white).all(-1, keepdim=True).all(-2, keepdim=True), white, 0.0
    )
    # in single precision LAPACK gives up on one in a hundred matrices of a task without some of the
    # classes, most of whose eigenvalues are 0
    least: Tensor = torch.linalg.eigvalsh(white.double())[:, 0].to(white)
    return (FLOOR - 1.0 - least).clamp_min(0.0)
