"""How the prior predicts unseen tasks: each training task left out in turn, no refit.

With a flat hyperprior on eta (as it is learned: logarithms of scales), the density of task i's data
given all others' is

    p(y_i | Y_-i) = int p(y_i | eta) p(eta | Y_-i) d eta,
    p(eta | Y_-i) ~ prod_{j != i} p(y_j | eta).

Draws eta_s come from a multivariate t at the maximum of sum_j log p(y_j | eta), whose curvature is
taken by autograd, and are weighted towards p(eta | Y_-i), the weights Pareto smoothed.  Each p(y_j
| eta) is known where the task's posterior is Gaussian by construction; else it is importance
sampled from the task's guide with draws of theta that are the same for every eta, so that it is a
smooth function of eta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.guides.closed_form import log_evidence
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.noise import normal
from varmeta.numerics.rows import rowwise
from varmeta.numerics.tree import named_parts
from varmeta.posteriors import psis
from varmeta.posteriors.diagnostics import MIN_DRAWS, NO_DENSITY
from varmeta.posteriors.observer import Observer

if TYPE_CHECKING:
    import pandas as pd

# Meta-parameters up to which the curvature of the evidence is formed.
MAX_SIZE = 100
# Numbers of the designs that are held at once.
CELLS = 2_000_000
# Of the t from which eta is drawn: its tails must not be lighter than those of a posterior of
# scales under few tasks.
DEGREES = 5
# Newton steps from the fit to the maximum of the importance-sampled evidence.
NEWTON_STEPS = 4


def check(eta: Mapping[str, Tensor], num_tasks: int, num_samples: int, num_particles: int) -> None:
    """Refuse what cannot be left out of, before any work.  Raises ValueError or TypeError."""
    whole_number("num_samples", num_samples, MIN_DRAWS)
    whole_number("num_particles", num_particles, MIN_DRAWS)
    size = sum(value.numel() for value in eta.values())
    if size > MAX_SIZE:
        raise ValueError(
            f"the prior has {size} numbers, but the curvature of their evidence is formed for at "
            f"most {MAX_SIZE}: score held-out tasks instead, fit.adapt(new_tasks).score()"
        )
    if num_tasks < 3:
        raise ValueError(
            f"leaving a task out of {num_tasks} leaves no prior to learn: give three tasks or more"
        )


def leave_one_task_out(
    observer: Observer, num_samples: int, num_particles: int, seed: int
) -> pd.DataFrame:
    """See `Fit.leave_one_task_out`."""
    import pandas as pd

    names = observer.q.batch.names
    size = sum(value.numel() for value in observer.q.eta.values())
    of_eta = _Evidence(observer, num_particles, seed)
    centre, factor = _gaussian(of_eta)
    standard, log_q = _student(num_samples, size, seed, centre)
    with torch.no_grad():
        draws = centre + standard @ factor.mT
        found = of_eta.at(draws)  # (draws, tasks)
        penalty = torch.stack([of_eta.penalty(draw) for draw in draws])
        in_sample = of_eta(of_eta.start)
    # towards the posterior without task i
    weights = (found.sum(1) - penalty - log_q).unsqueeze(1) - found
    smoothed, k = psis.smooth(weights.T.cpu().numpy().astype(float))
    scores = np.logaddexp.reduce(smoothed + found.T.cpu().numpy(), axis=1)
    table = pd.DataFrame(
        {"log_evidence": in_sample.tolist(), "left_out": scores.tolist(), "k_hat": k},
        index=pd.Index(names, name="task"),
    )
    table["reading"] = [psis.reading(value, num_samples) for value in k]
    worst = float(k.max())
    total = [float(in_sample.sum()), float(scores.sum()), worst, psis.reading(worst, num_samples)]
    table.loc["all"] = total
    return table


class _Evidence:
    """log p(y_j | eta) of every task as a smooth function of the flat eta `(size,)`, by draws of
    theta that stay.
    """

    def __init__(self, observer: Observer, num_particles: int, seed: int) -> None:
        q = observer.q
        if q.is_point:
            raise ValueError(NO_DENSITY)
        self.observer, self.model, self.eta, self.offset = observer, observer.model, q.eta, q.offset
        self.start = torch.cat([value.reshape(-1) for value in q.eta.values()])
        # where the tasks' posteriors are Gaussian by construction nothing is drawn
        self.is_known = q.model.is_linear_gaussian
        if self.is_known:
            return
        theta = q.theta(num_particles, seed)
        with torch.no_grad():
            self.log_q = q.distribution.log_prob(theta).squeeze(-1)
        # what stays is the weights less what the features add, which moves with eta
        by = q.offset(q.eta)
        self.centred = theta if by is None else theta - by

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        return named_parts(flat, self.eta)

    def penalty(self, flat: Tensor) -> Tensor:
        return torch.as_tensor(self.model.penalty(self.named(flat))).to(flat)

    def __call__(self, flat: Tensor) -> Tensor:
        eta = self.named(flat)
        if self.is_known:
            return log_evidence(self.model, eta, self.observer.q.batch.support)
        by = self.offset(eta)
        log_prior = self.model.prior_distribution(eta).log_prob(self.centred).squeeze(-1)
        joint = log_prior + self.observer.log_likelihood(
            self.centred if by is None else self.centred + by, eta
        )
        return (joint - self.log_q).logsumexp(0) - math.log(len(self.centred))

    def at(self, draws: Tensor) -> Tensor:
        """The same at draws of eta `(draws, size)`: `(draws, tasks)`."""
        if not self.is_known:
            return torch.stack([self(draw) for draw in draws])
        cells = self.observer.q.batch.support.mask.numel() * self.model.weights.size
        size = max(1, CELLS // max(1, cells))
        return torch.cat([rowwise(self)(some) for some in draws.split(size)])


def _student(number: int, size: int, seed: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Standard multivariate t draws `(number, size)`, and the logarithm of their density up to a
    constant.
    """
    ids = torch.zeros(1, dtype=torch.int64)
    z = normal(seed, 0, ids, number, size + DEGREES, like.dtype)[:, 0].to(like)
    draws = z[:, :size] / z[:, size:].square().mean(1, keepdim=True).sqrt()
    return draws, -0.5 * (DEGREES + size) * torch.log1p(draws.square().sum(1) / DEGREES)


def _gaussian(of_eta: _Evidence) -> tuple[Tensor, Tensor]:
    """Where the evidence of all tasks has its maximum, and a factor of the inverse curvature
    there.
    """

    def total(flat: Tensor) -> Tensor:
        return of_eta.penalty(flat) - of_eta(flat).sum()

    flat = of_eta.start
    for step in range(NEWTON_STEPS + 1):
        leaf = flat.detach().requires_grad_()
        gradient = torch.autograd.grad(total(leaf), leaf)[0]
        hessian = vector_hessian(total, flat)
        root, failed = torch.linalg.cholesky_ex(0.5 * (hessian + hessian.mT))
        if int(failed):
            raise ValueError(
                "the evidence has no maximum in all of the prior's numbers (a precision or a noise "
                "scale runs away, or the guide is too far from the posteriors, see "
                "fit.posterior().diagnose()): give a hyperprior, or fix what runs away"
            )
        if step < NEWTON_STEPS:
            flat = flat - torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
    # root root' is the curvature, so that root'^-1 z has its inverse as covariance
    identity = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    return flat, torch.linalg.solve_triangular(root.mT, identity, upper=True)
