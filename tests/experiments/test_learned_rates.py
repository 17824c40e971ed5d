"""The experiment on learned inner rates: what is judged against what."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.learned_rates import GRID, LEARNED, errors, rows


def test_a_learned_rate_is_held_against_the_best_fixed_one() -> None:
    """Two seeds, three tasks; the best in the mean, 0.01, is not the best of either seed."""
    fixed = {"0.005": [[1.0] * 3, [9.0] * 3], "0.01": [[4.0] * 3] * 2, "0.02": [[7.0] * 3] * 2}
    better = [[0.0, 1.0, 2.0], [3.0, 3.0, 6.0]]
    found = {name: np.array(cells) for name, cells in fixed.items()}
    found |= {"0.04": np.full((2, 3), np.nan), "learned by layer": np.array(better)}
    table = {row["rate"]: row for row in rows(found)}
    assert table["0.01"]["mse"] == "4.000" and table["0.04"]["mse"] == "nan"
    own = table["learned by layer"]
    assert own["mse"] == "2.500" and own["less 0.01"] == "-1.500"
    # of the second seed alone nothing fixed is as good as 4; of the first 0.005 has 1, as it has
    assert own["seeds won"] == "0 of 2"
    found["learned by layer"][1] -= 1.0
    assert {row["rate"]: row for row in rows(found)}["learned by layer"]["seeds won"] == "1 of 2"


def test_every_method_is_scored_on_every_task_and_seed() -> None:
    found = errors(seeds=2, num_steps=2, num_train=4, num_test=3)
    assert list(found) == [f"{rate:g}" for rate in GRID] + list(LEARNED)
    for cells in found.values():
        assert cells.shape == (2, 3) and bool(np.isfinite(cells).all())
    # the same starts: after two steps at 3e-3 no rate has moved far from the grid's middle
    middle = found[f"{GRID[2]:g}"]
    assert found["learned by layer"] == pytest.approx(middle, rel=0.02)
    assert not np.allclose(found["learned by layer"], middle, rtol=1e-6)
