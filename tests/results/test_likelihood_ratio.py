"""Likelihood ratios beside scipy's tails, and on the edge of what a variance may be."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from varmeta.results.likelihood_ratio import likelihood_ratio, mixture, tail
from varmeta.results.log_likelihood import LogLikelihood
from varmeta.results.nested import Nested


def maximum(value: float, fixed: int = 2, covariance: int = 1, noise: int = 1) -> LogLikelihood:
    return LogLikelihood(value, "ML", "closed form", fixed, covariance, noise)


@pytest.mark.parametrize("df", [1, 2, 5, 30])
@pytest.mark.parametrize("chi2", [1e-8, 0.3, 3.84, 60.0, 900.0])
def test_tails_are_scipy_s(chi2: float, df: int) -> None:
    assert tail(chi2, df) == pytest.approx(stats.chi2.sf(chi2, df), rel=1e-12)
    below = stats.chi2.sf(chi2, df - 1) if df > 1 else 0.0  # on no degrees of freedom it is 0
    assert mixture(chi2, df) == pytest.approx(0.5 * (below + tail(chi2, df)), rel=1e-12)


def test_nothing_between_two_models_is_no_evidence() -> None:
    assert mixture(0.0, 1) == mixture(0.0, 2) == tail(0.0, 1) == 1.0


SMALL, SLOPE = maximum(-100.0), Nested(("slope",), 1)
CASES = {
    "a coefficient": (maximum(-97.0, fixed=3), Nested(), stats.chi2.sf(6, 1), None),
    "a correlation": (maximum(-97.0, covariance=2), Nested(), stats.chi2.sf(6, 1), None),
    "a variance": (maximum(-97.0, covariance=2), SLOPE, stats.chi2.sf(6, 1) / 2, "p is half of"),
    "a variance and its correlation": (
        maximum(-97.0, covariance=3),
        SLOPE,
        (stats.chi2.sf(6, 1) + stats.chi2.sf(6, 2)) / 2,
        "half chi-squared 1, half 2",
    ),
    "two variances": (
        maximum(-97.0, covariance=3), Nested(("a", "b"), 2), math.nan, "at most 0.0498"
    ),
    "a direction": (
        maximum(-97.0, covariance=3), Nested(is_regular=False), math.nan, "direction is 0"
    ),
    "lower": (maximum(-100.1, fixed=3), Nested(), math.nan, "lower by 0.1 nats"),
    "lower by rounding": (maximum(-100.0 - 1e-9, fixed=3), Nested(), 1.0, None),
    "told, a coefficient": (maximum(-97.0, fixed=3), None, stats.chi2.sf(6, 1), None),
    "told, a covariance": (maximum(-97.0, covariance=2), None, math.nan, "at most 0.0143"),
    "told, the noise": (maximum(-97.0, noise=2), None, math.nan, "at most 0.0143"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_p_is_what_theory_knows(case: str) -> None:
    large, how, p, said = CASES[case]
    found = likelihood_ratio(SMALL, large, how)
    assert found.p == pytest.approx(p, rel=1e-9, nan_ok=True)
    assert found.note is None if said is None else said in str(found.note)
    assert found.df == large.parameters - SMALL.parameters


def test_a_singular_smaller_fit_leaves_no_p_of_variances() -> None:
    at_edge = likelihood_ratio(SMALL, maximum(-97.0, covariance=2), SLOPE, at_edge=True)
    assert math.isnan(at_edge.p) and "singular" in str(at_edge.note)
    mean = likelihood_ratio(SMALL, maximum(-97.0, fixed=3), Nested(), at_edge=True)
    assert mean.p == pytest.approx(stats.chi2.sf(6, 1))
