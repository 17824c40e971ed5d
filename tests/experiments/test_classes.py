"""The comparison of heads for classes runs, and its parts hold what they say."""

from __future__ import annotations

import pytest
import torch

from experiments.classes import HELD_OUT, WAYS, joined, made, methods, run, tasks_of


@pytest.mark.parametrize("name", methods())
def test_a_method_is_fitted_and_judged(name: str) -> None:
    parts = [tasks_of(made, 4, seed) for seed in range(3)]
    error, log_density, calibration, seconds = run(name, parts, 2, 0)
    assert 0 <= error <= 1 and log_density < 0 and 0 <= calibration <= 1 and seconds > 0
    assert HELD_OUT in methods()


def test_query_rows_join_the_support_and_are_other_rows() -> None:
    tasks = tasks_of(made, 2, 0)
    (x, y), (more, labels) = tasks[0].support, tasks[0].query
    assert y.tolist() == list(range(WAYS)) and len(labels) == 5 * WAYS
    assert not (x.unsqueeze(1) == more).all(-1).any()
    both = joined(tasks)[0]
    assert torch.equal(both.support[0], torch.cat([x, more])) and both.query is None
