"""Chen et al. (2019): where joint MAP collapses and stops, and what the other estimates of the
prior's variance find.
"""

from __future__ import annotations

import math

import pytest

from experiments.per_module import basins, head, many_weights, thresholds


def error_of_predictive(variance: float, num_tasks: int, half: int = 5) -> float:
    """sd of the predictive estimate: that of the slope w = sigma^2 / (sigma^2 + 1/n) of one half's
    mean on the other's, turned into one of sigma^2 by d sigma^2 / d w = (1/n) / (1 - w)^2.
    """
    w = variance / (variance + 1 / half)
    slope = math.sqrt(((1 - w) * variance + 1 / half) / (num_tasks * (variance + 1 / half)))
    return slope / half / (1 - w) ** 2


def test_collapse_thresholds() -> None:
    """Gradient flow on the joint MAP objective ends where Corollary 1 says, for the S of the data;
    a Gaussian guide's optimum is S - 1/N.
    """
    for row in thresholds(num_tasks=500, seeds=1):
        assert row["joint_map"] == pytest.approx(row["corollary"], rel=1e-5)
        assert row["gaussian_guide"] == pytest.approx(row["marginal"], rel=1e-4)
        assert abs(row["predictive"] - row["marginal"]) <= 4 * error_of_predictive(row["true"], 500)
        assert (row["joint_map"] == 0) == (row["true"] < 0.3) or 0.28 < row["true"] < 0.32


def test_starts_on_both_sides_of_the_edge() -> None:
    below, above = basins(num_tasks=500)
    assert below["joint_map"] == 0.0 < above["joint_map"]


def test_per_module_precision_finds_the_module_that_differs() -> None:
    for row in head(num_tasks=60, points=10, seeds=1):
        assert row["ratio"] >= 100, row
        # the predictive loss hardly depends on it where the support almost determines the weights
        assert row["method"] == "predictive" or row["head"] == pytest.approx(1.0, rel=0.3), row


def test_predictive_estimates_recover_the_linear_experiments_scales() -> None:
    only = ("predictive, per weight", "predictive, one", "ELBO, dense, per weight")
    rows = {
        row["method"]: row
        for row in many_weights("linear", num_tasks=300, seeds=1, held_out=200, only=only)
    }
    for method in ("predictive, per weight", "ELBO, dense, per weight"):
        sds = [rows[method][f"sd_{i}"] for i in range(8)]
        assert sum(sds[:4]) / 4 == pytest.approx(8.0, rel=0.12), method
        assert sum(sds[4:]) / 4 == pytest.approx(2.0, rel=0.35), method
    assert rows["predictive, per weight"]["loss"] < rows["predictive, one"]["loss"]
