"""What compares fitted models: information criteria, and likelihood ratios of nested ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from varmeta.results.doubts import is_singular
from varmeta.results.likelihood_ratio import Ratio, likelihood_ratio
from varmeta.results.log_likelihood import (
    LogLikelihood,
    has_hidden_layers,
    number_of_observations,
)
from varmeta.results.nested import Nested, nested
from varmeta.results.result import Fit


@dataclass(frozen=True)
class Fitted:
    """A fit, what it is called, and its log likelihood."""

    name: str
    fit: Fit
    known: LogLikelihood


@dataclass(frozen=True)
class Criteria:
    """aic, bic: NaN where they are not defined.  rows: the n of bic."""

    aic: float
    bic: float
    rows: int | None


def information_criteria(fitted: list[Fitted]) -> tuple[list[Criteria], list[str]]:
    """AIC and BIC of each fit; and why there are none, in sentences, which hold for tests too."""
    found: list[Criteria] = []
    why: dict[str, list[str]] = {}
    for one in fitted:
        reason = _no_criteria(one)
        rows = number_of_observations(one.fit) if one.known.criterion == "ML" else None
        deviance, count = -2.0 * one.known.value, one.known.parameters
        aic = math.nan if reason else deviance + 2.0 * count
        bic = math.nan if reason or not rows else deviance + math.log(rows) * count
        found.append(Criteria(aic, bic, rows))
        if reason:
            why.setdefault(f"no AIC, BIC and test of {{}}: {reason}", []).append(one.name)
        elif not rows:
            several = "the number of observations that its n is has no one definition"
            why.setdefault(f"no BIC of {{}}: {several} here", []).append(one.name)
    return found, [sentence.format(", ".join(names)) for sentence, names in why.items()]


def _no_criteria(one: Fitted) -> str | None:
    if not one.known.is_exact:
        return (
            "how far an approximation lies from the log likelihood differs between models "
            "(leave_one_task_out=True compares them)"
        )
    if one.known.criterion == "penalised":
        return "hyperpriors have moved the estimates from the likelihood's maximum"
    if has_hidden_layers(one.fit.model):
        return "the data do not determine each weight of a network's hidden layers"
    return None


def likelihood_ratios(
    fitted: list[Fitted], told: bool
) -> tuple[dict[str, tuple[str, Ratio]], list[str]]:
    """By the larger model's name: against which it is tested, and the test; and why others are not.

    fitted: in ascending order of their parameters.  told: whether the user says that each is nested
    in those with more.
    """
    found: dict[str, tuple[str, Ratio]] = {}
    notes: list[str] = []
    maxima = [one for one in fitted if one.known.is_maximum and _no_criteria(one) is None]
    if any(one.known.criterion == "REML" for one in fitted):
        notes.append("no test under REML: fit without hyperguide='reml'")
    for i, large in enumerate(maxima):
        smaller = [one for one in maxima[:i] if one.known.parameters < large.known.parameters]
        if not smaller:
            continue
        against, how = _nearest(smaller, large)
        if isinstance(how, str) and not told:
            notes.append(
                f"{large.name} is not tested, since that it contains {against.name} is not known "
                f"({how}): nested=True says so"
            )
            continue
        shape = how if isinstance(how, Nested) else None
        edge = is_singular(against.fit)
        ratio = likelihood_ratio(against.known, large.known, shape, edge)
        found[large.name] = against.name, ratio
        if ratio.note:
            notes.append(f"{large.name} against {against.name}: {ratio.note}")
    return found, notes


def _nearest(smaller: list[Fitted], large: Fitted) -> tuple[Fitted, Nested | str]:
    """The largest of the smaller models that is nested in the larger one, and how.

    Where none is known to be, the largest, and why not.
    """
    ways = [(one, nested(one.fit, large.fit)) for one in reversed(smaller)]
    return next(((one, how) for one, how in ways if isinstance(how, Nested)), ways[0])
