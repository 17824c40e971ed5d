"""Odd data: sizes from nothing, offsets and units by powers of ten, columns that repeat each
other.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import varmeta as vm
from tests.fuzz.outcome import COUNTS

TOTAL = int(os.environ.get("VARMETA_FUZZ", "500"))


def examples(share: float) -> Callable[[Any], Any]:
    """This share of all examples goes to the test."""

    def given_so_many(test: Any) -> Any:
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> None:
            COUNTS["examples"] += 1
            inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        return settings(max_examples=max(1, round(TOTAL * share)))(test)

    return given_so_many


@dataclass
class Rows:
    """Support data of every task: designs `(n_i, D)` with the intercept last, ys `(n_i,)`."""

    xs: list[np.ndarray]
    ys: list[np.ndarray]

    @property
    def designs(self) -> list[np.ndarray]:
        return [np.concatenate([x, np.ones((len(x), 1))], 1) for x in self.xs]

    @property
    def tasks(self) -> vm.TaskSet:
        pairs = zip(self.xs, self.ys, strict=True)
        return vm.TaskSet(
            [vm.Task((x, y) if len(y) else None, name=f"t{i}") for i, (x, y) in enumerate(pairs)]
        )

    def describe(self) -> str:
        return (
            f"sizes {[len(y) for y in self.ys]}, first x {self.xs[0].tolist()}, y "
            f"{self.ys[0].tolist()}"
        )


@st.composite
def rows(draw: st.DrawFn, most_tasks: int = 5, columns: int | None = None) -> Rows:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=most_tasks))
    if not any(sizes):
        sizes[0] = 2
    width = draw(st.integers(1, 3)) if columns is None else columns
    unit = 10.0 ** draw(st.sampled_from([0, 0, 0, -6, -3, 3, 6]))
    offset = draw(st.sampled_from([0.0, 0.0, 0.0, 1.0, 100.0, 1e4, 1e6]))
    near = draw(st.sampled_from([None, None, None, 0.0, 1e-8, 1e-3]))
    y_unit = 10.0 ** draw(st.sampled_from([0, 0, 0, -6, 3, 6]))
    y_offset = draw(st.sampled_from([0.0, 0.0, 1.0, 1e4, 1e6]))
    xs, ys = [], []
    for size in sizes:
        x = random.normal(size=(size, width)) + offset
        if near is not None and width > 1:
            x[:, 1] = x[:, 0] + near * random.normal(size=size)
        w = random.normal(size=width)
        y = (x - offset) @ w + random.normal() + 0.5 * random.normal(size=size) + y_offset
        xs.append(x * unit)
        ys.append(y * y_unit)
    return Rows(xs, ys)
