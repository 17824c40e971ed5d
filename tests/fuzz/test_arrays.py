"""What a TaskSet keeps is what it was given, value by value, or it says why it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import varmeta as vm
from tests.fuzz.made import examples
from tests.fuzz.outcome import attempt

KINDS = ["f8", "f4", "f2", "i1", "i8", "u1", "u2", "u8", "?", "O", "U3", "M8[D]", "m8[s]", "c8"]
sizes = st.integers(0, 4)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Any, Any]:
    size = draw(sizes)
    dtype = np.dtype(draw(st.sampled_from(KINDS)))
    shape = draw(st.sampled_from([(size,), (size, 1), (size, 2), (size + 1, 2), ()]))
    values = st.one_of(st.floats(width=16), st.integers(-3, 3)) if dtype.kind == "O" else None
    x = draw(arrays.arrays(dtype, shape, elements=values))
    y = draw(arrays.arrays(np.dtype(draw(st.sampled_from(KINDS[:9]))), (size,)))
    form = draw(st.sampled_from(["array", "list", "masked", "reversed", "read-only"]))
    if form == "list":
        x = x.tolist()
    elif form == "masked" and np.ndim(x):
        x = np.ma.masked_array(x, mask=draw(arrays.arrays(bool, x.shape)))
    elif form == "reversed" and np.ndim(x):
        x = x[::-1]
    elif form == "read-only":
        x.flags.writeable = False
    return x, y


def kept(stored: Any, given_values: Any) -> bool:
    """As exactly as the dtype that is said to be stored can hold it."""
    expected = np.asarray(given_values)
    if expected.dtype.kind == "O":
        expected = expected.astype(np.float64)
    if expected.dtype.kind not in "fiub" or expected.shape != tuple(stored.shape):
        return False
    with np.errstate(over="ignore"):
        nearest = expected.astype(stored.numpy().dtype)
    # a whole number beyond 2^53 is the nearest float; one beyond int64 would turn negative
    whole = not stored.is_floating_point() and expected.dtype.kind == "u" and expected.size
    fits = not whole or int(expected.max()) < 2**63
    return (
        bool(np.array_equal(stored.numpy(), nearest)) and fits and bool(np.isfinite(nearest).all())
    )


@examples(0.35)
@given(st.lists(parts(), min_size=1, max_size=3))
def test_arrays(given_parts: list[tuple[Any, Any]]) -> None:
    outcome = attempt(lambda: vm.TaskSet([vm.Task(support=part) for part in given_parts]), "arrays")
    if outcome.value is None:
        return
    right = True
    for task, (x, y) in zip(outcome.value, given_parts, strict=True):
        if task.support is None:
            right &= len(y) == 0
            continue
        masked = isinstance(x, np.ma.MaskedArray) and bool(np.ma.getmaskarray(x).any())
        right &= not masked and kept(task.support[0], x) and kept(task.support[1], y)
    outcome.must_be(right, "arrays")


COLUMNS = {
    "numbers": st.floats(-1e6, 1e6),
    "any float": st.floats(),
    "counts": st.integers(0, 9),
    "big": st.integers(-(2**63), 2**63 - 1),
    "yes": st.booleans(),
    "words": st.sampled_from(["a", "b", "1.5"]),
    "dates": st.dates(),
    "mixed": st.one_of(st.none(), st.integers(0, 3), st.just("x")),
}


@examples(0.35)
@given(
    st.data(), st.integers(0, 6), st.sampled_from(sorted(COLUMNS)), st.sampled_from(sorted(COLUMNS))
)
def test_tables(data: st.DataObject, size: int, x_kind: str, y_kind: str) -> None:
    def column(kind: str) -> list[Any]:
        return data.draw(st.lists(COLUMNS[kind], min_size=size, max_size=size))

    keys = data.draw(st.lists(st.sampled_from(["a", "b", 3, None]), min_size=size, max_size=size))
    frame = pd.DataFrame(
        {"g": pd.Series(keys, dtype=object), "x": column(x_kind), "y": column(y_kind)}
    )
    if data.draw(st.booleans()):
        frame = frame.astype({"g": "category"})
    outcome = attempt(lambda: vm.TaskSet.from_frame(frame, task="g", x=["x"], y="y"), "table")
    if outcome.value is None:
        return
    right = True
    for name, part in frame.groupby(frame["g"].astype(str), sort=False):
        x, y = outcome.value[name].support
        right &= kept(x, part[["x"]].to_numpy()) and kept(y, part["y"].to_numpy())
    right &= len(outcome.value) == frame["g"].astype(str).nunique() and not frame["g"].isna().any()
    outcome.must_be(right, "table")
