"""`print(fit)`: how a fit ended, and the prior that it learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from varmeta._words import counted
from varmeta.bayes.quadrature import Quadrature
from varmeta.hyper.importance import GOOD_K
from varmeta.learned_prior import ROWS

if TYPE_CHECKING:
    from varmeta.hyper.result import HyperPosterior
    from varmeta.result import Fit

NO_ERRORS = (
    "(no standard errors: Laplace's evidence has no second derivative here; those of vm.Joint('multivariate_normal') are of the "
    "same model's bound)"
)


def method(fit: Fit) -> str:
    """The strategy in words; a point has no evidence lower bound, whatever the option is called."""
    text = fit.strategy.describe()
    return text.replace("query_elbo", "query loss + prior").replace("elbo", "loss + prior") if fit.is_point else text


def long(fit: Fit) -> str:
    points = int(fit.tasks.batch().support.mask.sum())
    lines = [
        f"{method(fit)}, {counted(len(fit.tasks), 'task')}, {counted(points, 'support observation')}",
        evidence(fit),
        fit.stop if fit.stop.startswith("converged") else f"{'' if fit.converged else 'not '}converged: {fit.stop}",
    ]
    if fit.seconds_compiling > 0.1:
        lines[-1] += f"; compiling took {fit.seconds_compiling:.1f} s"
    hyper = fit.hyper
    if hyper is None or hyper.hyperguide == "reml":
        table = fit.prior.table(fit.standard_errors)
        quadrature = isinstance(fit.problem.guide, Quadrature)  # it has them, once it has converged
        by_laplace = fit.problem.guide.at_mode and not quadrature
        return "\n".join([*lines, "", table, *([NO_ERRORS] if by_laplace else [])])
    return "\n".join([*lines, importance(hyper), "", hyperparameters(fit)])


def evidence(fit: Fit) -> str:
    """The objective, and what it is worth as a log likelihood."""
    if not fit.run.history:
        return "not run"
    line = f"{fit.loss_name}: {fit.loss:.4f} nats"
    if fit.hyper is not None and fit.hyper.hyperguide != "reml":
        return f"{line}; log evidence by importance weights: {fit.hyper.log_evidence:.4f}"
    if fit.log_likelihood is None:
        return "\n".join(filter(None, (line, fit.guide_cost)))
    return f"{line}, so the {'REML ' if fit.hyper else ''}log likelihood is {fit.log_likelihood:.4f}"


def importance(hyper: HyperPosterior) -> str:
    near = "near the posterior" if hyper.pareto_k <= GOOD_K else "corrected by importance weights"
    return f"posterior of eta: {hyper.hyperguide}, k-hat {hyper.pareto_k:.2f} ({near}), {hyper.ess:.0f} effective draws"


def hyperparameters(fit: Fit, level: float = 0.9) -> str:
    """The posterior of eta as aligned text."""
    table = fit.hyperparameters(level)
    shown, width = table.head(ROWS), max(len("quantity"), *map(len, table.index))
    low, high = (f"{100 * q:g} %" for q in ((1 - level) / 2, (1 + level) / 2))
    lines = [f"{'quantity':<{width}} " + " ".join(f"{name:>12}" for name in ("mean", "sd", low, high))]
    for name, row in shown.iterrows():
        lines.append(f"{name:<{width}} " + " ".join(f"{row[key]:>12.5g}" for key in ("mean", "sd", "low", "high")))
    return "\n".join([*lines, *([f"... and {len(table) - ROWS} more"] if len(table) > ROWS else [])])


def short(fit: Fit) -> str:
    return (
        f"<Fit: {method(fit)}, {counted(len(fit.tasks), 'task')}, {'converged' if fit.converged else 'not converged'}>"
    )
