"""Tasks are rows one after another: what every task holds is what loops over tasks would give it,
no rectangle is made for it, and no work is done task by task.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from varmeta import likelihoods
from varmeta.tasks import Task, TaskSet
from varmeta.tasks.rows import Rows

F64 = torch.float64
Pair = tuple[np.ndarray, np.ndarray] | None


def sizes_of(seed: int) -> np.ndarray:
    """Support and query sizes of seven tasks, of which some have neither."""
    sizes = np.random.default_rng(seed).integers(0, 5, (7, 2))
    sizes[seed % 7], sizes[(seed + 3) % 7] = (4, 3), (0, 0)
    return sizes


def given(
    seed: int, features: tuple[int, ...] = (2,), event: tuple[int, ...] = (), y: type = float
) -> list[Task]:
    """Ragged tasks; where one has no rows, None and empty parts by turns."""
    rng = np.random.default_rng(seed)

    def part(size: int, empty: bool) -> Pair:
        if not size and not empty:
            return None
        return rng.normal(size=(size, *features)), (9 * rng.normal(size=(size, *event))).astype(y)

    return [
        Task(part(s, bool(i % 2)), part(q, not i % 2), f"t{i}", {"age": float(i), "dose": -0.5 * i})
        for i, (s, q) in enumerate(sizes_of(seed))
    ]


def numbers(task: Task) -> tuple[Any, ...]:
    """All that a task holds, bit by bit; None and an empty part are the same, no data."""

    def part(pair: Any) -> Any:
        if pair is None or not len(pair[1]):
            return None
        return [(str(v.dtype), tuple(v.shape), v.contiguous().numpy().tobytes()) for v in pair]

    return task.name, part(task.support), part(task.query), dict(task.features or {})


def assert_same(tasks: TaskSet, expected: list[Task]) -> None:
    assert [numbers(task) for task in tasks] == [numbers(task) for task in expected]
    assert list(tasks.names) == [task.name for task in expected]


def as_tensors(tasks: list[Task]) -> list[Task]:
    """By a loop, the tensors of given arrays."""

    def part(pair: Pair) -> Any:
        return None if pair is None else tuple(torch.from_numpy(values) for values in pair)

    return [Task(part(t.support), part(t.query), t.name, t.features) for t in tasks]


SHAPES = [((), ()), ((1,), (2,)), ((0,), ()), ((3, 2), (2, 2))]


# -- the rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [float, np.int64])
@pytest.mark.parametrize(("features", "event"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_rows_stand_task_by_task(
    seed: int, features: tuple[int, ...], event: tuple[int, ...], y: type
) -> None:
    tasks = TaskSet(given(seed, features, event, y))
    for what, rows in (("support", tasks.support_rows), ("query", tasks.query_rows)):
        own = [getattr(t, what) for t in given(seed, features, event, y)]
        own = [
            (np.zeros((0, *features)), np.zeros((0, *event), y)) if p is None else p for p in own
        ]
        assert np.array_equal(rows.x.numpy(), np.concatenate([x for x, _ in own]))
        assert np.array_equal(rows.y.numpy(), np.concatenate([y for _, y in own]))
        assert rows.y.dtype == (F64 if y is float else torch.int64)
        assert rows.counts.tolist() == [len(y) for _, y in own]
        assert rows.owner.tolist() == [i for i, (_, y) in enumerate(own) for _ in y]
        assert rows.offsets.tolist() == [sum(len(y) for _, y in own[:i]) for i in range(8)]
        assert rows.counts.dtype == rows.owner.dtype == rows.offsets.dtype == torch.int64
    assert_same(tasks, as_tensors(given(seed, features, event, y)))


@pytest.mark.parametrize(("features", "event"), SHAPES)
def test_padding_is_a_loop_over_tasks(features: tuple[int, ...], event: tuple[int, ...]) -> None:
    tasks = TaskSet(given(1, features, event))
    for what, data in (("support", tasks.batch().support), ("query", tasks.batch().query)):
        assert data is not None
        width = max(len(getattr(t, what)[1]) if getattr(t, what) else 0 for t in tasks)
        x, y = torch.zeros(7, width, *features, dtype=F64), torch.zeros(7, width, *event, dtype=F64)
        mask = torch.zeros(7, width, dtype=torch.bool)
        for i, task in enumerate(tasks):
            for row in range(0 if getattr(task, what) is None else len(getattr(task, what)[1])):
                x[i, row], y[i, row] = (values[row] for values in getattr(task, what))
                mask[i, row] = True
        assert torch.equal(data.x, x) and torch.equal(data.y, y) and torch.equal(data.mask, mask)


def test_a_set_without_data_has_no_rows_but_their_shapes() -> None:
    subset = TaskSet([Task((np.ones((2, 3)), [1, 2])), Task()])[[1]]
    assert subset.support_rows.x.shape == subset.query_rows.x.shape == (0, 3)
    assert subset.query_rows.y.dtype == torch.int64
    assert subset.support_rows.owner.tolist() == []
    assert TaskSet([Task(), Task()]).support_rows.counts.tolist() == [0, 0]


# -- new sets from old -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "index",
    [
        slice(None, None, -1),
        slice(1, 6, 2),
        slice(2, 4),
        [6, 0, 3],
        np.arange(7) % 2 == 0,
        torch.tensor([-1, 2]),
    ],
    ids=repr,
)
def test_a_subset_is_a_list_of_tasks(seed: int, index: Any) -> None:
    tasks = TaskSet(given(seed))
    positions = np.arange(7)[index.numpy() if isinstance(index, torch.Tensor) else index]
    expected = [as_tensors(given(seed))[i] for i in positions]
    assert_same(tasks[index], expected)
    assert tasks[index].query_rows.counts.tolist() == [
        0 if t.query is None else len(t.query[1]) for t in expected
    ]


@pytest.mark.parametrize("num_support", [0, 1, 2, 99, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_split_is_a_loop_over_tasks(seed: int, num_support: int | float) -> None:
    tasks = TaskSet(given(seed, (2,), (2,)))
    expected = []
    for task, number in zip(tasks, tasks.batch().ids.tolist(), strict=True):
        if task.support is None:
            expected.append(task)
            continue
        x, y = task.support
        n = len(y)
        keep = min(int(num_support), n)
        if isinstance(num_support, float):
            keep = min(max(round(num_support * n), 1), max(n - 1, 1))
        rows = np.random.default_rng((5, number)).permutation(n)[:keep]
        kept = np.isin(np.arange(n), rows)
        old = (x[:0], y[:0]) if task.query is None else task.query
        asked = torch.cat([old[0], x[~kept]]), torch.cat([old[1], y[~kept]])
        expected.append(Task((x[kept], y[kept]), asked, task.name, task.features))
    assert_same(tasks.split(num_support, seed=5), expected)


@pytest.mark.parametrize("seed", range(3))
def test_merged_is_a_loop_over_tasks(seed: int) -> None:
    tasks = TaskSet(given(seed))
    nothing = torch.zeros(0, 2, dtype=F64), torch.zeros(0, dtype=F64)
    expected = [
        Task(
            tuple(torch.cat(p) for p in zip(t.support or nothing, t.query or nothing, strict=True)),
            None,
            t.name,
            t.features,
        )
        for t in tasks
    ]
    assert_same(tasks.merged(), expected)
    assert tasks.merged().batch().query is None


@pytest.mark.parametrize("y", [float, np.int64])
def test_scaling_is_a_loop_over_tasks(y: type) -> None:
    tasks = TaskSet(given(2, y=y))
    scaled, scaling = tasks.standardized(likelihoods.Gaussian())
    age = np.arange(7.0)

    def part(pair: Any) -> Any:
        if pair is None:
            return None
        x, y = pair
        y = (y.to(F64) - scaling.y_loc) / scaling.y_scale
        return (x - scaling.x_loc) / scaling.x_scale, y

    expected = [
        Task(
            part(t.support),
            part(t.query),
            t.name,
            {
                name: (t.features[name] - scaling.features[name][0]) / scaling.features[name][1]
                for name in t.features or {}
            },
        )
        for t in tasks
    ]
    assert_same(scaled, expected)
    assert scaling.features["age"] == pytest.approx((age.mean(), age.std()), rel=1e-14)


def test_first_difference_names_the_first_task_that_differs() -> None:
    tasks = TaskSet(given(0))
    assert tasks.first_difference(TaskSet(given(0))) is None
    assert tasks.first_difference(pickle.loads(pickle.dumps(tasks))) is None
    for changed, said in (
        (Task(([[1.0, 2.0]], [0.5]), None, "t3"), "the support of 't3' has other numbers"),
        (Task(None, None, "t9"), "'t9' where it had 't3'"),
    ):
        others = given(0)
        others[3] = Task(changed.support, others[3].query, changed.name, others[3].features)
        assert tasks.first_difference(TaskSet(others, dtype=F64)) == said
    others = given(0)
    others[5] = Task(others[5].support, others[5].query, "t5", {"age": 5.0, "dose": 0.0})
    assert "the features of 't5'" in str(tasks.first_difference(TaskSet(others)))


def test_what_a_scaling_makes_infinite_is_refused_by_its_task() -> None:
    small, zeros = np.array([0.0, 1e-100]), np.zeros(2)
    _, scaling = TaskSet([Task((small, zeros))]).standardized()
    more = TaskSet([Task((zeros[:1], zeros[:1])), Task((1e300 * small / 1e-100, zeros), name="b")])
    with pytest.raises(ValueError, match=r"task 'b': support x, row 1 .* is inf; 1 of 2 rows"):
        scaling.apply(more)
    with pytest.raises(ValueError, match="one of x and y for each: of 3 came 2 and 2"):
        more.mapped(lambda part, name: (part[0][1:], part[1][1:]), dict, False)


# -- long tables -----------------------------------------------------------------------------------


def table(rows: int = 60) -> pd.DataFrame:
    """Groups that do not stand together, of a label of every kind."""
    rng = np.random.default_rng(3)
    code = rng.integers(0, 9, rows)
    return pd.DataFrame(
        {
            "int": code,
            "str": [f"s{c}" for c in code],
            "object": np.array([f"s{c}" for c in code], object),
            "category": pd.Categorical([f"s{c}" for c in code]),
            "bool": code > 4,
            "float": code / 2,
            "Int64": pd.array(code, dtype="Int64"),
            "a": rng.normal(size=rows),
            "b": rng.normal(size=rows).astype(np.float32),
            "half": rng.normal(size=rows).astype(np.float16),
            "foreign": rng.normal(size=rows).astype(">f8"),
            "count": rng.integers(0, 9, rows),
            "byte": rng.integers(0, 255, rows).astype(np.uint8),
            "asked": rng.random(rows) < 0.4,
            "level": code * 1.5,
        },
        index=10 * np.arange(rows),
    )


def by_groups(
    frame: pd.DataFrame, task: str, x: Any, y: Any, query: str | None, dtype: torch.dtype
) -> TaskSet:
    """The same tasks one by one, of pandas' groups in order of first appearance."""
    frame = frame.astype({"foreign": float})  # pandas cannot group foreign bytes
    tasks = []
    for label in frame[task].unique().tolist():
        group = frame[frame[task] == label]
        asked = np.zeros(len(group), bool) if query is None else group[query].to_numpy(bool)
        parts = [
            tuple(np.array(group[rows][c].to_numpy(), order="C") for c in (x, y))
            for rows in (~asked, asked)
        ]
        tasks.append(Task(parts[0], parts[1], str(label), {"level": group["level"].iloc[0]}))
    return TaskSet(tasks, dtype=dtype)


@pytest.mark.parametrize("query", [None, "asked"])
@pytest.mark.parametrize("task", ["int", "str", "object", "category", "bool", "float", "Int64"])
def test_a_table_is_its_groups(task: str, query: str | None) -> None:
    frame = table()
    frame["level"] = frame.groupby(task, observed=True)["level"].transform("first")
    tasks = TaskSet.from_frame(frame, task, ["a", "count"], "b", query, features=["level"])
    assert_same(tasks, list(by_groups(frame, task, ["a", "count"], "b", query, F64)))
    assert tasks.x_names == ("a", "count")


@pytest.mark.parametrize("y", ["a", "b", "count", "foreign", ["a", "count"], ["count", "byte"]])
@pytest.mark.parametrize("x", ["a", "b", "half", "byte", "foreign", ["b"], ["half", "b"], []])
def test_columns_of_every_kind(x: Any, y: Any) -> None:
    frame = table()
    if set([x] if isinstance(x, str) else x) & set([y] if isinstance(y, str) else y):
        with pytest.raises(ValueError, match="is among x and among y"):
            TaskSet.from_frame(frame, "str", x, y)
        return
    tasks = TaskSet.from_frame(frame, "str", x, y, "asked", features=["level"])
    kinds = [
        np.result_type(*(frame[c].dtype for c in ([block] if isinstance(block, str) else block)))
        for block in (x, y)
        if len(block)
    ]
    floating = [kind for kind in kinds if kind.kind == "f"]
    kind = np.result_type(*floating) if floating else np.dtype(float)
    dtype = torch.from_numpy(np.zeros(0, kind.newbyteorder("="))).dtype
    assert tasks.dtype == dtype
    # a table's bytes are whole numbers, an array's an image, which is kept as it is
    frame = frame.astype({"byte": np.int64})
    assert_same(tasks, list(by_groups(frame, "str", x, y, "asked", dtype)))


def test_what_the_common_dtype_cannot_hold_is_refused_by_its_task() -> None:
    frame = pd.DataFrame({"g": list("abab"), "x": [1, 2, 3, 70_000], "y": np.zeros(4, np.float16)})
    with pytest.raises(ValueError, match=r"task 'b': support x, row 1 .* is 70000, which float16"):
        TaskSet.from_frame(frame, "g", "x", "y")


def test_what_is_written_into_the_table_does_not_reach_the_set() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([1, 2, 3])
    frame = pd.DataFrame({"g": [0, 0, 1], "x": x, "y": y}, copy=False)
    tasks = TaskSet.from_frame(frame, "g", "x", "y")
    x[:], y[:] = 0, 0
    assert frame["x"].tolist() == frame["y"].tolist() == [0, 0, 0]
    assert tasks.support_rows.x.tolist() == tasks.support_rows.y.tolist() == [1, 2, 3]


# -- costs -----------------------------------------------------------------------------------------


def forbidden(rows: Rows) -> Any:
    raise AssertionError(f"a rectangle of {len(rows)} tasks was made")


def one_large() -> TaskSet:
    """1,000 tasks of 5 rows and one of 10^6, of which a rectangle has 10^9."""
    sizes = [5] * 1000 + [10**6]
    codes = np.repeat(np.arange(1001), sizes)
    columns = {"g": codes, "a": codes * 0.5, "b": np.arange(len(codes)) * 1.0, "y": codes * 0.5}
    return TaskSet.from_frame(pd.DataFrame(columns), "g", ["a", "b"], "y")


def test_one_large_task_makes_no_rectangle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "padded", forbidden)
    tasks = one_large()
    rows = tasks.support_rows
    held = [values.untyped_storage().nbytes() for values in (rows.x, rows.y, rows.counts)]
    assert held == [2 * 8 * 1_005_000, 8 * 1_005_000, 8 * 1001]
    assert rows.owner[[0, 4, 5, 4999, 5000, -1]].tolist() == [0, 0, 1, 999, 1000, 1000]
    assert rows.offsets[[1, 1000, 1001]].tolist() == [5, 5000, 1_005_000]
    last = tasks[-1].support
    assert last is not None and last[1].shape == (10**6,)
    assert last[0].untyped_storage().data_ptr() == rows.x.untyped_storage().data_ptr()  # a view
    scaled, _ = tasks.standardized()
    for new in (scaled, tasks.to(torch.float32), tasks[::-1], tasks.split(0.5), tasks.merged()):
        assert len(new) == 1001
    assert len(tasks.split(0.5).with_query()) == 1001
    assert tasks.first_difference(tasks[:]) is None
    assert "1005000 support points (5 to 1000000 per task)" in repr(tasks)


def test_a_task_is_pickled_without_its_set() -> None:
    task = one_large()[3]
    sent = pickle.dumps(task)
    assert len(sent) < 2000
    assert numbers(pickle.loads(sent)) == numbers(task)
    lists = Task(([1.0], [2.0]), name="as it was given")
    assert pickle.loads(pickle.dumps(lists)).support == ([1.0], [2.0])


def calls(work: Callable[[], object]) -> int:
    """How many Python functions are entered."""
    count = 0

    def hear(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(hear)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_no_work_is_done_task_by_task() -> None:
    def frame(tasks: int) -> pd.DataFrame:
        codes = np.arange(3 * tasks) % tasks
        return pd.DataFrame({"g": codes, "x": codes * 0.5, "z": codes % 5, "y": codes * 1.0})

    def made(data: pd.DataFrame) -> TaskSet:
        return TaskSet.from_frame(data, "g", ["x", "z"], "y", "q", features=["y"])

    works: dict[str, Callable[[TaskSet], object]] = {
        "standardized": lambda tasks: tasks.standardized(),
        "to": lambda tasks: tasks.to(torch.float32),
        "slice": lambda tasks: tasks[::2],
        "merged": lambda tasks: tasks.merged(),
        "with_query": lambda tasks: tasks.with_query(),
        "first_difference": lambda tasks: tasks.first_difference(tasks[:]),
        "repr": repr,
    }
    found: dict[str, list[int]] = {name: [] for name in ("from_frame", *works)}
    for number in (10, 10, 1000):  # once more, for what the first call alone does
        data = frame(number).assign(q=np.arange(3 * number) >= 2 * number)
        tasks = made(data)
        found["from_frame"].append(calls(lambda data=data: made(data)))
        for name, work in works.items():
            found[name].append(calls(lambda work=work, tasks=tasks: work(tasks)))
    # comprehensions of names and numbers are one call each
    assert {name: many <= few + 20 for name, (_, few, many) in found.items()} == dict.fromkeys(
        found, True
    ), found
