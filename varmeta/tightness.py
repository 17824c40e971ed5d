"""How far a fit's objective lies from the evidence of its own estimates: what the guide costs, in nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from varmeta.bayes.guide import Dense, MeanField
from varmeta.bayes.quadrature import Quadrature
from varmeta.hyper.conditional import conditionals
from varmeta.numerics.quadrature import NODES

if TYPE_CHECKING:
    from varmeta.result import Fit

# Nats by which the objective of all tasks may miss the evidence and still be called it; printed are four decimals.
TIGHT = 1e-4
# Nats that a guide may cost before `print` mentions it.
NOTED = 0.1
# Nats, in all and per task, beyond which the objective says too little of the evidence to be passed over in silence.
FAR, FAR_PER_TASK = 1.0, 0.01
# Numbers that the check by quadrature may make; it then takes a small part of the fit's time.
CHEAP = 2_000_000


def exact_evidence(fit: Fit) -> float | None:
    """log p(y | eta) of all training tasks in nats, by the closed form; None where the model is not known to have one."""
    if not fit.model.is_linear_gaussian:
        return None
    eta = {name: value.unsqueeze(0) for name, value in fit.eta.items()}
    found = conditionals(fit.model, fit.tasks.batch(), eta, gaussian=True)
    return float(found.log_evidence.sum())


def evidence_by_quadrature(fit: Fit) -> float | None:
    """log p(y | eta) of all training tasks in nats, by adaptive quadrature; None where that is not cheap, or has no mode."""
    size, batch = fit.model.weights.size, fit.tasks.batch()
    if size not in NODES or batch.support.mask.numel() * NODES[size] ** size > CHEAP:
        return None
    found = conditionals(
        fit.model, batch, {name: value.unsqueeze(0) for name, value in fit.eta.items()}, gaussian=False
    )
    return float(found.log_evidence.sum()) if bool(found.converged.all()) else None


def far_from_evidence(fit: Fit) -> str | None:
    """A sentence where the objective of a converged fit is far from the evidence of the same estimates."""
    guide = fit.problem.guide
    skipped = fit.is_point or fit.hyper is not None or fit.strategy.outer != "elbo" or isinstance(guide, Quadrature)
    # a program may have several modes, which quadrature around one does not see; a linear-Gaussian model has a closed form
    if skipped or fit.model.is_linear_gaussian or not fit.model.is_linear or fit.model.prior.learn_precision is None:
        return None
    evidence = evidence_by_quadrature(fit)
    if evidence is None or not math.isfinite(evidence):
        return None
    above = excess(fit, evidence)
    if abs(above) <= max(FAR, FAR_PER_TASK * len(fit.tasks)):
        return None
    why = (
        "the guide's family does not hold the tasks' posteriors, so that models cannot be compared by it, and sds of "
        "the prior may be too small"
        if above > 0
        else "it is no bound here, and sds of the prior may be too large"
    )
    return (
        f"the objective, {fit.loss:.5g} nats, lies {abs(above):.3g} nats {'above' if above > 0 else 'below'} -log evidence of "
        f"the same estimates: {why}.  Use vm.Implicit('quadrature'), which takes the evidence itself"
    )


def excess(fit: Fit, evidence: float) -> float:
    """Nats by which the objective, without hyperpriors, lies above -log evidence: KL[q, posterior] where it is a bound."""
    return fit.loss - float(fit.model.penalty(fit.eta)) + evidence


def cost(fit: Fit) -> str | None:
    """What the guide costs, in words; None where it is little, or not known."""
    if not fit.converged or fit.is_point or fit.hyper is not None or fit.strategy.outer != "elbo":
        return None
    evidence = None if can_be_exact(fit) else exact_evidence(fit)
    if evidence is None or excess(fit, evidence) < NOTED:
        return None
    return (
        f"the guide costs {excess(fit, evidence):.4g} nats: the log likelihood of these estimates is {evidence:.4f}, and its "
        "maximum lies elsewhere; guide='multivariate_normal' finds it"
    )


def can_be_exact(fit: Fit) -> bool:
    """Whether the guide's family holds every Gaussian over a task's weights."""
    guide = fit.problem.guide
    return isinstance(guide, Dense) or (isinstance(guide, MeanField) and fit.model.weights.size == 1)


def is_tight(fit: Fit) -> bool:
    """Whether the objective is -log p(y | eta): a linear-Gaussian model under a guide that can be the tasks' posteriors and
    has arrived at them."""
    if not can_be_exact(fit) or fit.strategy.outer != "elbo":
        return False
    evidence = exact_evidence(fit)
    if evidence is None:
        return False
    rounding = 100 * torch.finfo(next(iter(fit.eta.values())).dtype).eps * abs(evidence)
    return abs(excess(fit, evidence)) <= max(TIGHT, rounding)
