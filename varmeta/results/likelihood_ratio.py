"""Twice the difference of two maxima, and how probable so much is where the smaller model holds.

A variance that is 0 lies on the edge of what it may be, where twice the difference is a mixture of
chi-squares: for one variance, with any number of other parameters, half of df - 1 and half of df.
Source: Self and Liang, J. American Statistical Association 82 (1987), cases 5 and 6; Stram and
Lee, Biometrics 50 (1994).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from varmeta._checks import counted
from varmeta.results.log_likelihood import LogLikelihood
from varmeta.results.nested import Nested

# Nats by which the larger model's maximum may lie below the smaller's and be called the same.
SLACK = 1e-3


@dataclass(frozen=True)
class Ratio:
    """A likelihood-ratio test.

    chi2: twice the difference of the log likelihoods; df: how many parameters are tested.
    p: how probable as large a chi2 is where the smaller model holds; NaN where that is not known.
    note: why p is not chi-squared's, or NaN; None where it is.
    """

    chi2: float
    df: int
    p: float
    note: str | None = None


def likelihood_ratio(
    small: LogLikelihood, large: LogLikelihood, how: Nested | None, at_edge: bool = False
) -> Ratio:
    """The test of a nested model against a larger one; both at their maxima.

    how: how the one is nested in the other; None: as the user says, in a way that is not known.
    at_edge: whether an sd of the smaller fit has run to 0, or a correlation to 1.
    """
    chi2, df = 2.0 * (large.value - small.value), large.parameters - small.parameters
    if chi2 < -SLACK:
        why = f"the larger's log likelihood is lower by {-0.5 * chi2:.3g} nats: it is no maximum"
        return Ratio(chi2, df, math.nan, f"no p, since {why}")
    chi2 = max(0.0, chi2)
    spread = large.covariance != small.covariance
    if spread and at_edge:
        why = "the smaller fit is singular itself, on the edge of what its variances may be"
        return Ratio(chi2, df, math.nan, f"no p, since {why}")
    plain = tail(chi2, df)
    if how is None:
        if spread or large.noise != small.noise:
            edge = "whether variances are 0 in the smaller model is not known"
            return Ratio(chi2, df, math.nan, f"no p, since {edge}; it is at most {plain:.3g}")
        return Ratio(chi2, df, plain)
    if not how.is_regular:
        why = "what turns a direction is not determined where the direction is 0"
        return Ratio(chi2, df, math.nan, f"no p, since {why}")
    if not how.variances:
        return Ratio(chi2, df, plain)
    named = ", ".join(how.zero)
    if how.variances > 1:
        edge = f"{counted(how.variances, 'variance')} ({named}) are 0 in the smaller model"
        why = f"no p, since {edge}, a mixture that is not known; it is at most {plain:.3g}"
        return Ratio(chi2, df, math.nan, why)
    halves = "half of chi-squared's" if df == 1 else f"of half chi-squared {df - 1}, half {df}"
    edge = f"the variance of {named} is 0 in the smaller model, the edge of what it may be"
    return Ratio(chi2, df, mixture(chi2, df), f"p is {halves}, since {edge}")


def tail(chi2: float, df: int) -> float:
    """The probability that chi-squared on df >= 0 degrees of freedom is at least chi2.

    On none it is 0.

    >>> round(tail(3.841459, 1), 6), tail(0.1, 0), tail(0.0, 0)
    (0.05, 0.0, 1.0)
    """
    from scipy.stats import chi2 as distribution  # ArviZ brings it

    return float(distribution.sf(chi2, df)) if df else float(chi2 <= 0.0)


def mixture(chi2: float, df: int) -> float:
    """The same of half chi-squared on df - 1 and half on df degrees of freedom.

    >>> round(mixture(2.705543, 1), 6)  # half of 0.1
    0.05
    """
    return 0.5 * (tail(chi2, df - 1) + tail(chi2, df))
