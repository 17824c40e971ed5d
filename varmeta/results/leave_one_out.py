"""How the prior predicts unseen tasks: each training task left out in turn.

With a flat hyperprior on eta (as it is learned: logarithms of scales), the density of task i's data
given all others' is

    p(y_i | Y_-i) = int p(y_i | eta) p(eta | Y_-i) d eta,
    p(eta | Y_-i) ~ prod_{j != i} p(y_j | eta).

Draws eta_s come from a multivariate t at the maximum of sum_j log p(y_j | eta), whose curvature is
taken by autograd, and are weighted towards p(eta | Y_-i), the weights Pareto smoothed.  Each p(y_j
| eta) is known where the task's posterior is Gaussian by construction; else it is importance
sampled from the task's guide with draws of theta that are the same for every eta, so that it is a
smooth function of eta.

Beside it, of a regression whose evidence is known, log p(y_i | eta) at the eta of a fit to the
others (`fitting/without_each.py`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.profiled_newton import minimum
from varmeta.fitting.without_each import refitted
from varmeta.guides.closed_form import log_evidence
from varmeta.models.model import TaskModel
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.joint_model import row
from varmeta.numerics.noise import normal
from varmeta.numerics.rows import rowwise
from varmeta.numerics.tree import named_parts
from varmeta.posteriors import psis
from varmeta.posteriors.diagnostics import MIN_DRAWS, NO_DENSITY
from varmeta.posteriors.observer import Observer
from varmeta.priors.factors import PRECISION
from varmeta.priors.start import is_told_apart
from varmeta.strategies.strategy import Eta

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
# Of the logarithm of a learned sd, its standard error: more, and the evidence is as good as highest
# where the sd is 0.
WIDEST = 3.0
NO_MAXIMUM = (
    "the evidence has no maximum in all of the prior's numbers (a precision or a noise scale runs "
    "away, or the guide is too far from the posteriors, see fit.posterior().diagnose()): give a "
    "hyperprior, or fix what runs away"
)


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


def check_factor(model: TaskModel) -> None:
    """Refuse a low-rank prior that several factors describe, whose evidence has no one maximum."""
    size, rank = model.weights.size, model.prior.rank_for(model.weights)
    if rank and not is_told_apart(size, rank):
        most = max(one for one in range(rank) if is_told_apart(size, one))
        give = f"give rank={most}, or " if most else "use "
        raise ValueError(
            f"rank={rank} is more than {size} weights tell apart, so that the evidence is flat "
            f"along some of the prior's numbers: {give}learn_precision='full'"
        )


def leave_one_task_out(
    observer: Observer,
    num_samples: int,
    num_particles: int,
    seed: int,
    profiled: ProfiledEvidence | None = None,
) -> pd.DataFrame:
    """See `Fit.leave_one_task_out`; profiled: the evidence of a regression in closed form."""
    import pandas as pd

    names = observer.q.batch.names
    of_eta = _Evidence(observer, num_particles, seed)
    refits = None if profiled is None else _refitted(profiled, observer.q.eta, names)
    with torch.no_grad():
        columns = {"log_evidence": of_eta(of_eta.start).tolist()}
    columns["left_out"], k = _left_out(of_eta, num_samples, seed, refits is not None)
    if refits is not None:
        columns["refitted"] = refits
    table = pd.DataFrame(columns | {"k_hat": k}, index=pd.Index(names, name="task"))
    total = table.sum(skipna=False)
    total["k_hat"] = table["k_hat"].max(skipna=False)
    table.loc["all"] = total
    table["reading"] = [
        "no maximum" if math.isnan(value) else psis.reading(value, num_samples)
        for value in table["k_hat"]
    ]
    return table


def _left_out(
    of_eta: _Evidence, num_samples: int, seed: int, has_refits: bool
) -> tuple[list[float], list[float]]:
    """log p(y_i | Y_-i) and k-hat of its weights, of every task.

    Raises ValueError where the evidence has no maximum; with a warning and NaN where refits are
    told.
    """
    found = _gaussian(of_eta)
    if found is None and not has_refits:
        raise ValueError(NO_MAXIMUM)
    if found is None or (has_refits and of_eta.runs_away(found[1])):
        warnings.warn(f"left_out is NaN: {NO_MAXIMUM}", RuntimeWarning, stacklevel=4)
        return [math.nan] * of_eta.number, [math.nan] * of_eta.number
    centre, factor = found
    standard, log_q = _student(num_samples, len(centre), seed, centre)
    with torch.no_grad():
        draws = centre + standard @ factor.mT
        values = of_eta.at(draws)  # (draws, tasks)
        penalty = torch.stack([of_eta.penalty(draw) for draw in draws])
    # towards the posterior without task i
    weights = (values.sum(1) - penalty - log_q).unsqueeze(1) - values
    weights = torch.where(weights.isfinite(), weights, -math.inf)  # far out numbers are lost
    smoothed, k = psis.smooth(weights.T.cpu().numpy().astype(float))
    # a draw of no weight may have no value either
    terms = np.where(np.isfinite(smoothed), smoothed + values.T.cpu().numpy(), -np.inf)
    scores = np.logaddexp.reduce(terms, axis=1)
    return scores.tolist(), k.tolist()


def _refitted(profiled: ProfiledEvidence, eta: Eta, names: Sequence[str]) -> list[float] | None:
    """log p(y_i | eta) of every task at the eta of a fit to the others.

    NaN, with a warning, where they have none; None for too many numbers.
    """
    point = profiled.enter(eta)
    best = row(minimum(profiled, point).phi) if point else point
    found = refitted(profiled, best)
    if found is None:
        return None
    lost = [name for name, value in zip(names, found.tolist(), strict=True) if math.isnan(value)]
    if lost:
        shown = ", ".join(map(repr, lost[:3])) + (", ..." if len(lost) > 3 else "")
        warnings.warn(
            f"refitted is NaN of {len(lost)} of {len(names)} tasks, {shown}: without such a task "
            "the others do not determine the prior and the noise (they are too few, or each "
            "follows its own weights without noise, so that the evidence has no maximum): give "
            "hyperpriors, or fix scale= or precision=",
            RuntimeWarning,
            stacklevel=4,
        )
    return found.tolist()


class _Evidence:
    """log p(y_j | eta) of every task as a smooth function of the flat eta `(size,)`, by draws of
    theta that stay.
    """

    def __init__(self, observer: Observer, num_particles: int, seed: int) -> None:
        q = observer.q
        if q.is_point:
            raise ValueError(NO_DENSITY)
        self.observer, self.model, self.eta, self.offset = observer, observer.model, q.eta, q.offset
        self.number = len(q.batch)
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

    def runs_away(self, factor: Tensor) -> bool:
        """Whether the evidence hardly falls towards an sd of 0, by a factor of eta's covariance."""
        named = self.named(factor.norm(dim=-1))
        errors = [error for name, error in named.items() if name.partition(".")[0] == PRECISION]
        return any(bool((0.5 * error > WIDEST).any()) for error in errors)

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
        cells = self.observer.q.batch.support.cells * self.model.weights.size
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


def _gaussian(of_eta: _Evidence) -> tuple[Tensor, Tensor] | None:
    """Where the evidence of all tasks has its maximum, and a factor of the inverse curvature there.

    None where it has no maximum.
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
            return None
        if step < NEWTON_STEPS:
            flat = flat - torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
    # root root' is the curvature, so that root'^-1 z has its inverse as covariance
    identity = torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    return flat, torch.linalg.solve_triangular(root.mT, identity, upper=True)
