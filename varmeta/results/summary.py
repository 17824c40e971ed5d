"""The parts of `print(fit)`: how a fit was made, how it ended, and what is known of its prior."""

from __future__ import annotations

from typing import TYPE_CHECKING

from varmeta.hyper.importance import GOOD_K
from varmeta.models.hyper_posterior import HyperPosterior
from varmeta.models.learned_prior import ROWS
from varmeta.models.model import TaskModel
from varmeta.strategies.inner_rates import learned_rates, rates_by_name
from varmeta.strategies.strategy import Eta, Strategy

if TYPE_CHECKING:
    import pandas as pd

FEW = 6  # rates that are shown
STEPS = 10  # whose rates a line shows

NO_ERRORS = (
    "(no standard errors: Laplace's evidence has no second derivative here; those of "
    "vm.Joint('multivariate_normal') are of the same model's bound)"
)


def method(strategy: Strategy, is_point: bool) -> str:
    """The strategy in words; a point has no evidence lower bound, whatever the option is called."""
    text = strategy.describe()
    if not is_point:
        return text
    return text.replace("query_elbo", "query loss + prior").replace("elbo", "loss + prior")


def ending(stop: str, converged: bool, seconds_compiling: float) -> str:
    line = (
        stop if stop.startswith("converged") else f"{'' if converged else 'not '}converged: {stop}"
    )
    return line + (f"; compiling took {seconds_compiling:.1f} s" if seconds_compiling > 0.1 else "")


def importance(hyper: HyperPosterior) -> str:
    near = "near the posterior" if hyper.pareto_k <= GOOD_K else "corrected by importance weights"
    return (
        f"posterior of eta: {hyper.hyperguide}, k-hat {hyper.pareto_k:.2f} ({near}), "
        f"{hyper.ess:.0f} effective draws"
    )


def inner_rates(strategy: Strategy, model: TaskModel, eta: Eta) -> list[str]:
    """The learned rates of inner steps, a line for each entry of eta; none where none are."""
    learned = learned_rates(strategy)
    if learned is None:
        return []
    rates = rates_by_name(strategy, model, eta)
    width = max(map(len, rates))
    by_step = ", from the first step to the last" if learned.per_step else ""
    lines = ["", f"learned rates of the inner steps{by_step}"]
    for name, value in list(rates.items())[:FEW]:
        numbers = value.reshape(-1)
        # the weights of a tensor are too many to read
        if learned.per == "weight" and numbers.numel() > 1:
            low, middle, high = map(float, (numbers.min(), numbers.median(), numbers.max()))
            shown = f"{low:.4g} to {high:.4g}, median {middle:.4g}"
        else:
            shown = " ".join(f"{float(x):.4g}" for x in numbers[:STEPS])
            shown += " ..." if len(numbers) > STEPS else ""
        lines.append(f"{name:<{width}} {shown}")
    return lines + ([f"... and {len(rates) - FEW} more"] if len(rates) > FEW else [])


def hyperparameters(table: pd.DataFrame, level: float) -> str:
    """The posterior of eta, a table as of `Fit.hyperparameters(level)`, as aligned text."""
    shown, width = table.head(ROWS), max(len("quantity"), *map(len, table.index))
    low, high = (f"{100 * q:g} %" for q in ((1 - level) / 2, (1 + level) / 2))
    lines = [
        f"{'quantity':<{width}} " + " ".join(f"{name:>12}" for name in ("mean", "sd", low, high))
    ]
    for name, row in shown.iterrows():
        lines.append(
            f"{name:<{width}} "
            + " ".join(f"{row[key]:>12.5g}" for key in ("mean", "sd", "low", "high"))
        )
    return "\n".join(
        [*lines, *([f"... and {len(table) - ROWS} more"] if len(table) > ROWS else [])]
    )
