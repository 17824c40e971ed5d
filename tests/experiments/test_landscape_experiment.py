"""The measures of `experiments.landscape_sums`, on curves whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments import landscape_sums
from experiments.landscape_sums import ANCHORS, HIGH, LOW, ends_of_descent

ANCHOR = np.linspace(LOW, HIGH, ANCHORS)


def test_descent_rests_where_the_slope_turns() -> None:
    left, right = ends_of_descent(np.array([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0]))
    # between 1 and 2, or out at the right end
    assert left.tolist() == [1, 1, 1, 1, 5, 5]
    assert right.tolist() == [2, 2, 2, 2, 5, 5]
    left, _ = ends_of_descent(np.array([1.0, 1.0, -1.0]))
    assert left.tolist() == [0, 0, 2]


def test_jumps_are_no_slope() -> None:
    """A bowl, cut and moved up by 3 at the right: descent walks over the step, and the gradient
    does not know of it.
    """
    bowl, slope = 0.5 * ANCHOR**2, ANCHOR
    cut = bowl + 3.0 * (ANCHOR > 1.005)
    numbers = landscape_sums._numbers(bowl, slope, bowl)
    assert numbers["share of starts that end within 1 %"] == 1.0
    assert numbers["share of the variation in jumps"] == pytest.approx(0.0, abs=1e-12)
    assert numbers["error of the gradient"] == pytest.approx(0.0, abs=1e-12)
    numbers = landscape_sums._numbers(cut, slope, bowl)
    assert numbers["share of starts that end within 1 %"] == 1.0  # its well is at 0
    assert numbers["share of the variation in jumps"] == pytest.approx(3 / (3 + 16), abs=1e-6)
    assert numbers["error of the gradient"] > 0.5
    assert numbers["resting places"] == 1


def test_families_are_nested_and_seeded() -> None:
    torch.testing.assert_close(landscape_sums.family(4, 1)[:2], landscape_sums.family(2, 1))
    assert not torch.equal(landscape_sums.family(2, 0), landscape_sums.family(2, 1))


def test_the_study_at_its_smallest() -> None:
    numbers, curves = landscape_sums.study(1, (1, 2))
    assert set(numbers) == {"imaml", "variational", "variational - imaml"}
    assert len(curves["imaml 2"]) == ANCHORS
    # the envelope is continuous, so its gradient is all there is to know
    assert numbers["variational"][2]["error of the gradient"]["mean"] < 0.05
    assert numbers["imaml"][1]["error of the gradient"]["mean"] > 0.5
