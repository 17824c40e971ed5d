"""Numbers that a conversion would change: under a mask, beyond int64, beyond the dtype asked for.
Each is refused by its row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm

X = np.arange(3.0)
MASKED = np.ma.masked_array([1.0, 999.0, 2.0], [False, True, False])
LARGE = np.array([1, 2**63, 5], np.uint64)


def tasks(x: Any = X, y: Any = X, **kwargs: Any) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((x, y), name="a")], **kwargs)


REFUSED: dict[str, tuple[Any, str]] = {
    "masked y": (
        lambda: tasks(y=MASKED),
        "task 'a': support y, row 1 .* is masked, 1 of 3 numbers",
    ),
    "masked x of two columns": (
        lambda: tasks(x=np.ma.masked_array(np.ones((3, 2)), [[0, 0], [0, 0], [0, 1]])),
        "support x, row 2 .* is masked",
    ),
    "a list of masked arrays": (
        lambda: tasks(x=[MASKED, MASKED, MASKED]),
        "support x, row 1 .* is masked",
    ),
    "a masked number in a list": (
        lambda: tasks(y=[1.0, 2.0, np.ma.masked]),
        "support y, row 2 .* is masked",
    ),
    "uint64": (
        lambda: tasks(y=LARGE),
        f"task 'a': support y, row 1 .* is {2**63}, beyond the integers that are kept",
    ),
    "uint64 x": (lambda: tasks(x=LARGE), f"support x, row 1 .* is {2**63}, beyond"),
    "a torch uint64": (
        lambda: tasks(y=torch.from_numpy(LARGE)),
        f"support y, row 1 .* is {2**63}, beyond",
    ),
    "Python integers": (lambda: tasks(y=[2**63] * 3), f"row 0 .* is {2**63}, beyond"),
    "a column of uint64": (
        lambda: vm.TaskSet.from_frame(
            pd.DataFrame({"g": [1, 1, 1], "x": X, "y": LARGE}), "g", "x", "y"
        ),
        f"column 'y' is {2**63} in row 1",
    ),
    "dtype": (
        lambda: tasks(y=np.array([1.0, 2.0, 1e300]), dtype=torch.float32),
        r"task 'a': support y, row 2 .* is 1e\+300, which float32 cannot hold",
    ),
    "whole numbers in x": (
        lambda: tasks(x=[1, 70000, 2], dtype=torch.float16),
        "support x, row 1 .* is 70000, which float16",
    ),
    "tokens in single precision": (
        lambda: tasks(x=[[1, 2], [3, 2**24 + 1], [0, 0]], dtype=torch.float32),
        r"task 'a': support x, row 1 \(counted from 0\), is 16777217, which float32 rounds to "
        r"16777216: it holds whole numbers up to 16777216, so use float64",
    ),
    "tokens beside floats in single precision": (
        lambda: tasks(x=[0, -(2**24) - 1, 2], y=X.astype(np.float32)),
        "support x, row 1 .* is -16777217, which float32 rounds to -16777216",
    ),
    "counts beside another task's floats": (
        lambda: vm.TaskSet(
            [
                vm.Task((X, [1, 2, 2**53 + 1]), name="a"),
                vm.Task((X, np.array([0.5, 1.0, 2.0])), name="b"),
            ]
        ),
        f"task 'a': support y, row 2 .* is {2**53 + 1}, which float64 rounds to {2**53}",
    ),
    "a column of tokens": (
        lambda: vm.TaskSet.from_frame(
            pd.DataFrame({"g": [1, 1], "x": [1, 2**24 + 1], "y": np.float32([0, 1])}), "g", "x", "y"
        ),
        "task '1': support x, row 1 .* is 16777217, which float32 rounds",
    ),
    "the largest integer": (
        lambda: tasks(x=[0, 2**63 - 1, 2]),
        f"row 1 .* is {2**63 - 1}, which float64 rounds",
    ),
    "to": (
        lambda: tasks(x=np.array([1.0, -1e39, 0.0])).to(torch.float32),
        r"support x, row 1 .* is "
        r"-1e\+39, which float32",
    ),
    "a list in the default dtype": (
        lambda: tasks(y=[1e39, 0.0, 1.0]),
        r"support y, row 0 .* is "
        r"1e\+39, which float32",
    ),
    "a feature": (
        lambda: vm.TaskSet(
            [vm.Task((torch.ones(2), torch.ones(2)), features={"dose": 1e300})]
        ).batch(),
        "feature 'dose' of the tasks, row 0 .* which float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_conversion_would_change_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_points_to_predict_at() -> None:
    model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    some = vm.TaskSet([vm.Task((torch.ones(2, 1), torch.ones(2)), name="a")])
    posterior = vm.fit(model, some, vm.Joint("delta"), num_steps=1).posterior()
    with pytest.raises(ValueError, match=r"x of task 'a', row 1 .* which float32 cannot hold"):
        posterior.predict(np.array([[1.0], [1e300]]))
    with pytest.raises(
        ValueError, match=r"x of task 'a', row 1 .* is 16777217, which float32 rounds"
    ):
        posterior.predict(np.array([[1], [2**24 + 1]]))
    with pytest.raises(ValueError, match=r"x, row 0 .* is masked"):
        posterior.predict(np.ma.masked_array([[1.0]], [[True]]))


def test_what_loses_nothing_passes() -> None:
    """A mask that hides nothing, the largest int64, the largest float32."""
    free = tasks(y=np.ma.masked_array([1.0, 2.0, 3.0], False))
    assert free[0].support[1].tolist() == [1.0, 2.0, 3.0]
    assert tasks(y=np.array([0, 2**63 - 1, 1], np.uint64))[0].support[1].tolist() == [
        0,
        2**63 - 1,
        1,
    ]
    largest = float(torch.finfo(torch.float32).max)
    assert tasks(y=np.array([largest, 0.0, -largest])).to(torch.float32)[0].support[1].tolist() == [
        largest,
        0.0,
        -largest,
    ]
    assert vm.TaskSet([vm.Task(([[]], [1.0]))]).to(torch.float64).x_shape == (0,)
    # every whole number up to 2^24, and those above it that single precision has
    some = [2**24, -(2**24), 2**24 + 2]
    assert tasks(x=some, dtype=torch.float32)[0].support[0].tolist() == some
    assert tasks(x=[-(2**63), 2**53, 0])[0].support[0].tolist() == [-(2**63), 2**53, 0]
