"""How far a fit's objective lies from its estimates' evidence: the guide's cost in nats."""

from __future__ import annotations

import math

import torch

from varmeta.guides.closed_form import log_evidence_in_parts
from varmeta.hyper.conditional import conditionals
from varmeta.models.model import TaskModel
from varmeta.numerics.quadrature import NODES
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch

# Nats by which the objective of all tasks may miss the evidence and still be called it; printed are
# four decimals.
TIGHT = 1e-4
# Nats that a guide may cost before `print` mentions it.
NOTED = 0.1
# Numbers that the check by quadrature may make; it then takes a small part of the fit's time.
CHEAP = 2_000_000


def exact_evidence(model: TaskModel, batch: Batch, eta: Eta) -> float | None:
    """log p(y | eta) of the batch's tasks in nats, by the closed form.

    None where the model is not known to have one.
    """
    if not model.is_linear_gaussian:
        return None
    evidence = sum(
        float(log_evidence_in_parts(model, eta, group.support).double().sum())
        for _, group in batch.by_size()
    )
    return evidence if math.isfinite(evidence) else None


def evidence_by_quadrature(model: TaskModel, batch: Batch, eta: Eta) -> float | None:
    """log p(y | eta) of the batch's tasks in nats, by adaptive quadrature.

    None where that is not cheap, or has no mode.
    """
    size = model.weights.size
    if size not in NODES or batch.cells * NODES[size] ** size > CHEAP:
        return None
    found = conditionals(
        model, batch, {name: value.unsqueeze(0) for name, value in eta.items()}, gaussian=False
    )
    return float(found.log_evidence.sum()) if bool(found.converged.all()) else None


def excess(model: TaskModel, eta: Eta, loss: float, evidence: float) -> float:
    """Nats by which the objective, without hyperpriors, lies above -log evidence.

    Where it is a bound that is KL[q, posterior].
    """
    return loss - float(model.penalty(eta)) + evidence


def cost(model: TaskModel, batch: Batch, eta: Eta, loss: float) -> str | None:
    """What a guide costs whose family does not hold the posteriors, in words.

    None where it is little, or not known.
    """
    evidence = exact_evidence(model, batch, eta)
    if evidence is None or excess(model, eta, loss, evidence) < NOTED:
        return None
    return (
        f"the guide costs {excess(model, eta, loss, evidence):.4g} nats: the log likelihood of "
        f"these estimates is {evidence:.4f}, and its maximum lies elsewhere; "
        "guide='multivariate_normal' finds it"
    )


def is_tight(model: TaskModel, batch: Batch, eta: Eta, loss: float) -> bool:
    """Whether the objective is -log p(y | eta) to rounding.

    It is, of a linear-Gaussian model, at its tasks' posteriors.
    """
    evidence = exact_evidence(model, batch, eta)
    if evidence is None:
        return False
    rounding = 100 * torch.finfo(next(iter(eta.values())).dtype).eps * abs(evidence)
    return abs(excess(model, eta, loss, evidence)) <= max(TIGHT, rounding)
