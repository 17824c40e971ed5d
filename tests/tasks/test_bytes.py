"""Images of bytes are kept as bytes, and are numbers where a model sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import adam

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 2), np.uint8)
Y = np.arange(4) % 2


def tasks_of(kind: type = np.uint8, dtype: torch.dtype | None = None) -> vm.TaskSet:
    x = IMAGES.astype(kind)
    parts = [vm.Task((one, Y), (one[:n], Y[:n])) for n, one in zip((4, 2, 3), x, strict=False)]
    return vm.TaskSet(parts, dtype=dtype)


def test_bytes_are_kept_and_cast_by_batch() -> None:
    tasks = tasks_of()
    assert repr(tasks).endswith("x (2,) uint8, float32, y int64)")
    assert repr(tasks_of(np.float32)).endswith("x (2,), float32, y int64)")
    assert tasks.support_rows.x.dtype == tasks.query_rows.x.dtype == torch.uint8
    assert tasks.dtype == torch.float32
    for batch in (tasks.batch(), tasks.batch([2, 0]), tasks[1:].batch()):
        assert batch.query is not None
        for data in (batch.support, batch.query):
            assert data.x.dtype == data.filled[0].dtype == torch.float32
    assert tasks.batch([2]).support.x[0].tolist() == IMAGES[2].tolist()
    support = tasks[0].support
    assert support is not None and support[0].dtype == torch.uint8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_precision_is_that_of_the_batch(dtype: torch.dtype) -> None:
    for tasks in (tasks_of(dtype=dtype), tasks_of().to(dtype)):
        assert tasks.dtype == dtype
        assert tasks.support_rows.x.dtype == torch.uint8
        for some in (tasks, tasks[:2], tasks.split(1), tasks.merged(), tasks.with_query()):
            assert some.batch().support.x.dtype == some.dtype == dtype


def test_scaled_images_are_numbers() -> None:
    scaled, scaling = tasks_of().standardized()
    expected, numbers = tasks_of(np.float32).standardized()
    assert scaled.dtype == scaled.support_rows.x.dtype == torch.float32
    assert torch.equal(scaled.support_rows.x, expected.support_rows.x)
    assert torch.equal(scaling.x_loc, numbers.x_loc)


def test_a_fit_of_bytes_is_that_of_the_numbers(tmp_path: Path) -> None:
    model = vm.TaskModel(nn.Linear(2, 2), vm.likelihoods.Categorical(2), vm.GaussianPrior(100.0))

    def fit(tasks: vm.TaskSet) -> vm.Fit:
        return vm.fit(model, tasks, vm.Joint("delta"), 5, adam, batch_size=2, progress=False)

    found, expected = fit(tasks_of()), fit(tasks_of(np.float32))
    assert found.loss == expected.loss
    assert found.adapt(tasks_of()).score().equals(found.adapt(tasks_of(np.float32)).score())
    found.save(tmp_path / "fit.vm")
    back = vm.load(tmp_path / "fit.vm", model)
    assert back.tasks.support_rows.x.dtype == torch.uint8
    assert back.loss == found.loss
