"""Whether a converged objective says too little of its own estimates' evidence."""

from __future__ import annotations

import math

from varmeta.guides.quadrature import Quadrature
from varmeta.results.evidence_gap import evidence_by_quadrature, excess
from varmeta.results.result import Fit

# Nats, in all and per task, beyond which it does.
FAR, FAR_PER_TASK = 1.0, 0.01


def far_from_evidence(fit: Fit) -> str | None:
    """A sentence where a converged fit's objective is far from the same estimates' evidence."""
    guide = fit.problem.guide
    skipped = (
        fit.is_point
        or fit.hyper is not None
        or fit.strategy.outer != "elbo"
        or isinstance(guide, Quadrature)
    )
    # a program may have several modes, which quadrature around one does not see; a linear-Gaussian
    # model has a closed form
    if (
        skipped
        or fit.model.is_linear_gaussian
        or not fit.model.is_linear
        or fit.model.prior.learn_precision is None
    ):
        return None
    evidence = evidence_by_quadrature(fit.model, fit.tasks.batch(), fit.eta)
    if evidence is None or not math.isfinite(evidence):
        return None
    above = excess(fit.model, fit.eta, fit.loss, evidence)
    if abs(above) <= max(FAR, FAR_PER_TASK * len(fit.tasks)):
        return None
    why = (
        "the guide's family does not hold the tasks' posteriors, so that models cannot be compared "
        "by it, and sds of the prior may be too small"
        if above > 0
        else "it is no bound here, and sds of the prior may be too large"
    )
    return (
        f"the objective, {fit.loss:.5g} nats, lies {abs(above):.3g} nats "
        f"{'above' if above > 0 else 'below'} -log evidence of the same estimates: {why}.  Use "
        "vm.Implicit('quadrature'), which takes the evidence itself"
    )
