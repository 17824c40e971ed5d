"""How far a fit's objective lies from the evidence of its own estimates: what the guide costs, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from varmeta.bayes.guide import Dense, MeanField
from varmeta.hyper.conditional import conditionals, is_linear_gaussian

if TYPE_CHECKING:
    from varmeta.result import Fit

# Nats by which the objective of all tasks may miss the evidence and still be called it; printed are four decimals.
TIGHT = 1e-4
# Nats that a guide may cost before `print` mentions it.
NOTED = 0.1


def exact_evidence(fit: Fit) -> float | None:
    """log p(y | eta) of all training tasks in nats, by the closed form; None where the model is not known to have one."""
    if not is_linear_gaussian(fit.model):
        return None
    eta = {name: value.unsqueeze(0) for name, value in fit.eta.items()}
    found = conditionals(fit.model, fit.tasks.batch(), eta, gaussian=True)
    return float(found.log_evidence.sum())


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
