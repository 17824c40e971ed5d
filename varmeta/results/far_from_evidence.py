"""Whether a converged objective says too little of its own estimates' evidence."""

from __future__ import annotations

import math
from dataclasses import replace

from varmeta.fitting import chunks
from varmeta.guides.quadrature import Quadrature
from varmeta.numerics.quadrature import EVIDENCE
from varmeta.results.evidence_gap import evidence_by_quadrature, excess
from varmeta.results.result import Fit

# Nats, in all and per task, beyond which it does.
FAR, FAR_PER_TASK = 1.0, 0.01
# The same of the error of a quadrature, which is called the evidence itself.
ROUGH, ROUGH_PER_TASK = 0.1, 0.001
# Numbers that a finer quadrature may make.
CHEAP = 20_000_000


def far_from_evidence(fit: Fit) -> str | None:
    """A sentence where a converged fit's objective is far from the same estimates' evidence."""
    guide = fit.problem.guide
    skipped = (
        fit.is_point
        or fit.run.hyper is not None
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


def rough_quadrature(fit: Fit) -> str | None:
    """A sentence where half as many nodes again for each weight give another evidence."""
    guide, size = fit.problem.guide, fit.model.weights.size
    if not isinstance(guide, Quadrature) or fit.strategy.outer != "elbo":
        return None
    batch = fit.tasks.batch()
    number = guide.num_nodes or EVIDENCE[size]
    finer = 3 * number // 2
    if batch.cells * finer**size > CHEAP:
        return None
    problem = replace(fit.problem, guide=replace(guide, num_nodes=finer).bound(fit.model))
    state = fit.strategy.init(problem, batch, fit.eta)
    off = fit.loss - chunks.value(fit.strategy, problem, batch, fit.eta, state)
    if not abs(off) > max(ROUGH, ROUGH_PER_TASK * len(fit.tasks)):
        return None
    return (
        f"the evidence by quadrature is {abs(off):.2g} nats "
        f"{'lower' if off > 0 else 'higher'} with {number} nodes for each weight than with {finer}:"
        " tasks' posteriors are far from Gaussian, so that its maximum may lie elsewhere and models"
        " cannot be compared by it.  Give more: "
        f"vm.Implicit(vm.guides.Quadrature(num_nodes={finer}))"
    )
