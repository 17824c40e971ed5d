"""`print(fit)`: how a fit ended, and the prior that it learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from varmeta._words import counted

if TYPE_CHECKING:
    from varmeta.result import Fit


def method(fit: Fit) -> str:
    """The strategy in words; a point has no evidence lower bound, whatever the option is called."""
    text = fit.strategy.describe()
    return text.replace("query_elbo", "query loss + prior").replace("elbo", "loss + prior") if fit.is_point else text


def long(fit: Fit) -> str:
    points = int(fit.tasks.batch().support.mask.sum())
    lines = [
        f"{method(fit)}, {counted(len(fit.tasks), 'task')}, {counted(points, 'support observation')}",
        f"{fit.loss_name}: {fit.loss:.4f} nats" if fit.run.history else "not run",
        fit.stop if fit.stop.startswith("converged") else f"{'' if fit.converged else 'not '}converged: {fit.stop}",
        "",
        str(fit.prior),
    ]
    return "\n".join(lines)


def short(fit: Fit) -> str:
    return (
        f"<Fit: {method(fit)}, {counted(len(fit.tasks), 'task')}, {'converged' if fit.converged else 'not converged'}>"
    )
