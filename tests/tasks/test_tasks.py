"""Tasks of different sizes: what goes in comes out, padding is never seen, and complaints name the
task and the row.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from varmeta.numerics.noise import task_id
from varmeta.tasks import Batch, Data, Task, TaskSet

F64 = torch.float64


def ragged(
    seed: int, features: tuple[int, ...], event: tuple[int, ...], num_tasks: int = 6
) -> list[Task]:
    """Random tasks of 0 to 5 support and query points; at least one has support and one has query
    data.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 6, (num_tasks, 2))
    sizes[rng.integers(num_tasks)] = 3, 2

    def part(size: int) -> tuple[np.ndarray, np.ndarray] | None:
        if size == 0 and rng.random() < 0.5:
            return None
        return rng.normal(size=(size, *features)), rng.normal(size=(size, *event))

    return [Task(part(s), part(q), f"t{i}") for i, (s, q) in enumerate(sizes)]


def two(**kwargs: object) -> list[Task]:
    """A sound task "a" and a task "b" with the given data."""
    return [Task(support=(np.zeros(2), np.zeros(2)), name="a"), Task(name="b", **kwargs)]  # type: ignore[arg-type]


# -- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [(), (1,), (0,), (3, 2)])
@pytest.mark.parametrize("event", [(), (2,)])
@pytest.mark.parametrize("seed", range(5))
def test_stacking_and_reading_back_equals_the_originals(seed, features, event):
    given = ragged(seed, features, event)
    tasks = TaskSet(given)
    rows = np.random.default_rng(seed).permutation(len(given))[: 1 + seed]
    for batch, originals in [(tasks.batch(), given), (tasks.batch(rows), [given[i] for i in rows])]:
        assert len(batch) == len(batch.support) == len(originals)
        for data, name in [(batch.support, "support"), (batch.query, "query")]:
            width = max(
                len(getattr(t, name)[1]) if getattr(t, name) else 0 for t in originals
            )  # of these tasks
            assert data.x.shape == (len(originals), width, *features)
            assert data.y.shape == (len(originals), width, *event)
            assert data.mask.dtype == torch.bool
            for i, original in enumerate(originals):
                x, y = getattr(original, name) or (np.zeros((0, *features)), np.zeros((0, *event)))
                assert int(data.num_points[i]) == len(y)
                assert np.array_equal(data.x[i][data.mask[i]].numpy(), x)
                assert np.array_equal(data.y[i][data.mask[i]].numpy(), y)
                assert bool(data.mask[i, : len(y)].all())  # data first, in their order
            assert not data.x[~data.mask].any()
            assert not data.y[~data.mask].any()


@pytest.mark.parametrize("seed", range(5))
def test_tasks_of_a_set_never_show_padding(seed):
    given = ragged(seed, (2,), ())
    tasks = TaskSet(given)
    tasks.batch()
    for set_, originals in [
        (tasks, given),
        (tasks[1:4], given[1:4]),
        (tasks.to(torch.float64), given),
    ]:
        for task, original in zip(set_, originals, strict=True):
            for part, expected in [(task.support, original.support), (task.query, original.query)]:
                if expected is None or not len(expected[1]):
                    assert part is None
                else:
                    assert np.array_equal(part[0].numpy(), expected[0])
                    assert np.array_equal(part[1].numpy(), expected[1])


def test_a_task_without_data_is_a_row_of_masks():
    batch = TaskSet(
        [Task(support=([[1.0]], [2.0])), Task(), Task(support=(np.zeros((0, 1)), []))]
    ).batch()
    assert batch.support.num_points.tolist() == [1, 0, 0]
    assert batch.query is None
    nothing = TaskSet([Task(), Task(support=([], []))])
    assert nothing.batch().support.x.shape == (2, 0)
    assert repr(nothing) == "TaskSet(2 tasks, no support, no query, x (), float32)"
    # a subset of empty tasks remembers what the data look like
    assert TaskSet([Task(support=(np.ones((2, 3)), np.ones(2))), Task()])[
        [1]
    ].batch().support.x.shape == (1, 0, 3)


def test_what_is_written_into_the_original_does_not_reach_the_set():
    x, y = np.ones(3), torch.ones(3, dtype=F64)
    tasks = TaskSet([Task(support=(x, y))])
    x[:], y[:] = np.nan, np.nan
    assert tasks.batch().support.x.tolist() == tasks.batch().support.y.tolist() == [[1.0] * 3]


def test_data_moves_floating_tensors_only():
    data = Data(
        torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64), torch.tensor([[True, False]])
    ).to(F64)
    assert (data.x.dtype, data.y.dtype, data.mask.dtype) == (F64, torch.int64, torch.bool)


# -- batches, names, positions ---------------------------------------------------------------------


def test_batch_tells_rows_names_and_ids():
    tasks = TaskSet(ragged(0, (), ()))
    batch = tasks.batch(torch.tensor([4, 1]))
    assert isinstance(batch, Batch)
    assert batch.rows.tolist() == [4, 1]
    assert batch.names == ("t4", "t1")
    assert batch.ids.tolist() == [task_id("t4"), task_id("t1")]
    assert batch.total == 6
    assert tasks.batch([-1]).rows.tolist() == [5]
    assert tasks.batch().ids.tolist() == [task_id(name) for name in tasks.names]


def test_require_query_says_what_to_do():
    with pytest.raises(ValueError, match=r"no query data.*split"):
        TaskSet([Task(support=([1.0], [1.0]))]).batch().require_query()


def test_positions_names_slices_and_masks():
    tasks = TaskSet(ragged(0, (), ()))
    assert tasks[2].name == tasks[-4].name == tasks["t2"].name == tasks[np.int64(2)].name == "t2"
    assert tasks[1:3].names == ("t1", "t2")
    assert (
        tasks[[3, 0]].names
        == tasks[np.array([3, 0])].names
        == tasks[torch.tensor([3, 0])].names
        == ("t3", "t0")
    )
    mask = np.arange(6) % 2 == 0
    assert (
        tasks[mask].names
        == tasks[mask.tolist()].names
        == tasks[torch.from_numpy(mask)].names
        == ("t0", "t2", "t4")
    )
    assert [task.name for task in tasks] == list(tasks.names)
    with pytest.raises(IndexError, match="position 6: the set has 6 tasks"):
        tasks[6]
    with pytest.raises(IndexError, match="mask has 2 entries but the set has 6"):
        tasks[[True, False]]
    with pytest.raises(KeyError, match="no task is called 'x'"):
        tasks["x"]
    with pytest.raises(TypeError, match="list of positions"):
        tasks[[0.5]]
    with pytest.raises(ValueError, match="no tasks"):
        tasks[6:]
    with pytest.raises(ValueError, match="'t1' first"):
        tasks[[1, 1]]
    with pytest.raises(ValueError, match="rows is empty"):
        tasks.batch([])


def test_unnamed_tasks_are_numbered_and_names_are_unique():
    part = ([1.0], [1.0])
    assert TaskSet([Task(part), Task(part, name="x"), Task(part)]).names == (
        "task 0",
        "x",
        "task 2",
    )
    with pytest.raises(ValueError, match="'x' first"):
        TaskSet([Task(part, name="x"), Task(part), Task(part, name="x")])


def test_repr():
    tasks = TaskSet([Task(support=(np.zeros((5, 1)), np.zeros(5))) for _ in range(30)])
    assert (
        repr(tasks)
        == "TaskSet(30 tasks, 150 support points (5 to 5 per task), no query, x (1,), float64)"
    )
    labels = TaskSet([Task(support=(np.zeros((2, 1)), [0, 1]), query=(np.zeros((1, 1)), [1]))])
    assert repr(labels) == (
        "TaskSet(1 task, 2 support points (2 to 2 per task), 1 query points (1 to 1 per task), x "
        "(1,), float64, y int64)"
    )
    assert repr(labels[0]) == "Task('task 0', support=2 points, query=1 points)"
    assert (
        repr(Task(support=np.zeros(3))) == "Task(None, support=ndarray)"
    )  # wrong, but can be looked at


# -- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "x_dtype", "y_dtype"),
    [
        (np.ones(2), np.ones(2), F64, F64),
        (np.ones(2, np.float32), np.ones(2, np.float32), torch.float32, torch.float32),
        ([1.0, 2.0], [1, 2], torch.float32, torch.int64),
        ([np.float64(1.0), np.float64(2.0)], [1, 2], F64, torch.int64),
        ([np.ones(2), np.ones(2)], [True, False], F64, torch.int64),
        (
            [torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)],
            np.array([1, 2], np.uint16),
            F64,
            torch.int64,
        ),
        ([1, 2], [1, 2], F64, torch.int64),  # no floating data anywhere
        ([1, 2], np.ones(2, np.float32), torch.float32, torch.float32),
        (torch.tensor([True, False]), torch.ones(2), torch.float32, torch.float32),
        # bytes are images, whose 256 values any precision holds
        (np.array([[0], [255]], np.uint8), np.array([1, 2], np.uint8), torch.float32, torch.int64),
        ([torch.ones(2, dtype=torch.uint8)] * 2, [1, 2], torch.float32, torch.int64),
        (np.array([0, 255], np.uint8), np.ones(2), F64, F64),
        (pd.Series([1, 2]), pd.Series([0.5, 1.5]), F64, F64),
        (
            np.arange(4.0)[::-2],
            np.ones(2, ">f8"),
            F64,
            F64,
        ),  # strides and bytes that torch does not read
    ],
)
def test_dtypes_are_never_lowered(x, y, x_dtype, y_dtype):
    data = TaskSet([Task(support=(x, y))]).batch().support
    assert (data.x.dtype, data.y.dtype) == (x_dtype, y_dtype)


def test_values_survive_conversion():
    support = TaskSet([Task(support=(np.arange(4.0)[::-2], np.array([0.1, 2.0], ">f8")))])[
        0
    ].support
    assert support[0].tolist() == [3.0, 1.0]
    assert support[1].tolist() == [0.1, 2.0]


def test_bytes_beside_whole_numbers_are_numbers():
    bytes_ = Task(support=(np.array([0, 255], np.uint8), [0, 1]))
    tasks = TaskSet([bytes_, Task(support=(np.array([2**30 + 1]), [1]))])
    assert tasks.dtype == F64
    assert tasks[1].support[0].tolist() == [2**30 + 1]
    query = Task(query=(np.array([7], np.uint8), [1]))
    assert TaskSet([bytes_, query]).batch().support.x.tolist() == [[0, 255], [0, 0]]
    assert TaskSet([bytes_], dtype=F64).dtype == F64


def test_one_task_with_floating_y_makes_all_y_floating():
    tasks = TaskSet(
        [Task(support=(np.ones(2), [1, 2])), Task(support=(np.ones(1), [0.5]))], dtype=F64
    )
    assert tasks.batch().support.y.tolist() == [[1.0, 2.0], [0.5, 0.0]]
    assert tasks.batch().support.y.dtype == F64


def test_to_casts_floating_data_only():
    tasks = TaskSet([Task(support=(np.ones(2), [0, 1]), query=(np.ones(1), [1]))]).to(torch.float32)
    batch = tasks.batch()
    assert tasks.dtype == batch.support.x.dtype == batch.query.x.dtype == torch.float32
    assert batch.support.y.dtype == torch.int64
    with pytest.raises(TypeError, match=r"torch\.int64"):
        tasks.to(torch.int64)


def test_graphs_are_left_outside():
    assert (
        not TaskSet([Task(support=(torch.ones(1, requires_grad=True), [1.0]))])[0]
        .support[0]
        .requires_grad
    )


# -- complaints ------------------------------------------------------------------------------------

NAN = np.array([0.0, 1.0, np.nan])
BAD = [
    (
        {"support": (np.zeros(3), np.zeros(2))},
        ValueError,
        "task 'b': support x has 3 rows but y has 2",
    ),
    (
        {"support": (NAN, np.zeros(3))},
        ValueError,
        r"task 'b': support x, row 2 \(counted from "
        r"0\), is nan; 1 of 3",
    ),
    ({"support": (np.zeros(3), -1 / (NAN + 1e-300))}, ValueError, "task 'b': support y, row 2"),
    ({"query": ([1.0], [np.inf])}, ValueError, "task 'b': query y, row 0 .*is inf"),
    (
        {"support": (np.zeros((2, 3)), np.zeros(2))},
        ValueError,
        r"task 'b' .support.: a row of x "
        r"has shape \(3,\)",
    ),
    (
        {"support": (np.zeros(2), np.zeros((2, 1)))},
        ValueError,
        r"task 'b' .support.: a row of y "
        r"has shape \(1,\)",
    ),
    ({"query": (np.zeros((2, 1)), np.zeros(2))}, ValueError, "task 'b' .query.: a row of x"),
    (
        {"support": (np.float32([1]), np.zeros(1))},
        ValueError,
        "float64 in x of task 'a'.*float32 in x of task 'b'",
    ),
    (
        {"support": (["u", "v"], np.zeros(2))},
        TypeError,
        "task 'b': support x has dtype <U1, expected real numbers",
    ),
    (
        {"support": (np.array([1, None]), np.zeros(2))},
        TypeError,
        "task 'b': support x has dtype object",
    ),
    (
        {"support": (np.zeros(2), np.zeros(2, "M8[s]"))},
        TypeError,
        "task 'b': support y has dtype datetime64",
    ),
    ({"support": (np.zeros(2), np.zeros(2, complex))}, TypeError, "task 'b': support y is complex"),
    (
        {"support": (torch.zeros(2, dtype=torch.complex64), [1, 2])},
        TypeError,
        "task 'b': support x is complex",
    ),
    (
        {"support": ([[1.0], [1.0, 2.0]], [1, 2])},
        ValueError,
        "task 'b': support x is not one array",
    ),
    (
        {"support": ([torch.zeros(1), torch.zeros(2)], [1, 2])},
        ValueError,
        "task 'b': support x is not one array",
    ),
    ({"support": (1.0, [1.0])}, ValueError, r"task 'b': support x is a single number.*\[1.0\]"),
    (
        {"support": np.zeros(3)},
        TypeError,
        r"task 'b': support is a ndarray, expected a pair \(x, "
        r"y\)",
    ),
    (
        {"support": ([1.0], [1.0, 2.0], [3.0])},
        TypeError,
        r"task 'b': support is a tuple of length "
        "3, expected a pair",
    ),
]


@pytest.mark.parametrize(("kwargs", "error", "match"), BAD)
def test_bad_data_are_refused_by_name(kwargs, error, match):
    with pytest.raises(error, match=match):
        TaskSet(two(**kwargs))


def test_unnamed_bad_tasks_are_named_by_position():
    with pytest.raises(ValueError, match="task 'task 1': support x has 1 rows but y has 2"):
        TaskSet([Task(support=([1.0], [1.0])), Task(support=([1.0], [1.0, 2.0]))])


def test_a_set_is_made_of_tasks():
    with pytest.raises(ValueError, match="no tasks"):
        TaskSet([])
    with pytest.raises(TypeError, match="single Task"):
        TaskSet(Task(support=([1.0], [1.0])))
    with pytest.raises(TypeError, match="entry 1 is a tuple"):
        TaskSet([Task(), ([1.0], [1.0])])


def test_dtype_argument_settles_mixed_precision():
    mixed = two(support=(np.ones(1, np.float32), np.ones(1)))
    assert TaskSet(mixed, dtype=torch.float32).batch().support.y.dtype == torch.float32


# -- long tables -----------------------------------------------------------------------------------


@pytest.fixture
def frame() -> pd.DataFrame:
    """Unequal groups, interleaved, with an index that is not 0, 1, 2."""
    return pd.DataFrame(
        {
            "county": ["LAKE", "CASS", "LAKE", "CASS", "LAKE", "AITKIN"],
            "floor": [0, 1, 0, 0, 1, 0],
            "uppm": [0.5, -0.5, 0.5, -0.5, 0.5, 1.0],
            "size": [1.5, -0.5, 0.5, -0.5, 0.5, 1.0],
            "radon": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "kind": [0, 1, 2, 0, 1, 2],
            "held": [False, False, True, False, False, False],
        },
        index=[10, 20, 30, 40, 50, 60],
    )


@pytest.mark.parametrize("x", ["floor", ["floor"], ["floor", "uppm"], []])
@pytest.mark.parametrize("y", ["radon", ["radon", "size"], "kind"])
def test_from_frame_agrees_with_groupby(frame, x, y):
    tasks = TaskSet.from_frame(frame, task="county", x=x, y=y)
    assert tasks.names == ("LAKE", "CASS", "AITKIN")  # first appearance
    for name, group in frame.groupby("county"):
        got_x, got_y = tasks[name].support
        assert got_x.dtype == F64
        assert np.array_equal(got_x.numpy(), group[x].to_numpy(float))
        assert np.array_equal(got_y.numpy(), group[y].to_numpy())
        assert got_y.dtype == (torch.int64 if y == "kind" else F64)


def test_from_frame_keeps_the_order_of_rows_in_a_long_table():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"g": rng.integers(0, 7, 3000), "y": np.arange(3000.0)})
    for name, group in frame.groupby("g"):
        got = TaskSet.from_frame(frame, task="g", x=[], y="y")[str(name)].support[1]
        assert got.tolist() == group["y"].tolist()


def test_from_frame_query_column(frame):
    tasks = TaskSet.from_frame(frame, task="county", x="floor", y="radon", query="held")
    assert tasks["LAKE"].support[1].tolist() == [1.0, 5.0]
    assert tasks["LAKE"].query[1].tolist() == [3.0]
    assert tasks["CASS"].query is None
    frame["held"] = [1, 1, 1, 0, 1, 0]
    tasks = TaskSet.from_frame(frame, task="county", x="floor", y="radon", query="held")
    assert tasks["LAKE"].support is None
    assert tasks["LAKE"].query[1].tolist() == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("kind", ["category", "string", "object"])
def test_from_frame_task_column_of_any_kind(frame, kind):
    frame["county"] = frame["county"].astype(kind)
    assert TaskSet.from_frame(frame[1:], task="county", x=[], y="radon").names == (
        "CASS",
        "LAKE",
        "AITKIN",
    )


def test_from_frame_numbers_of_any_kind(frame):
    frame["floor"] = frame["floor"].astype("Int64")
    frame["uppm"] = frame["uppm"].astype("float32")
    frame["county"] = [3, 1, 3, 1, 3, 2]
    tasks = TaskSet.from_frame(frame, task="county", x=["floor", "held", "uppm"], y="radon")
    assert tasks.names == ("3", "1", "2")
    assert tasks["3"].support[0].tolist() == [[0, 0, 0.5], [0, 1, 0.5], [1, 0, 0.5]]
    assert tasks.dtype == F64
    assert TaskSet.from_frame(frame, task="county", x="uppm", y="kind").dtype == torch.float32
    # float32 beside float64 in one table is no mistake: the common precision is taken
    assert TaskSet.from_frame(frame, task="county", x="uppm", y="radon").dtype == F64


def spoil(frame: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    frame[column] = frame[column].astype(object if isinstance(value, (str, type(None))) else float)
    frame.loc[40, column] = value
    return frame


@pytest.mark.parametrize(
    ("change", "arguments", "error", "match"),
    [
        (lambda f: f.assign(county=f["county"].where(f.index != 40)), {}, ValueError, "'county' "
            "is missing .*row 40"),
        (lambda f: spoil(f, "radon", np.nan), {}, ValueError, r"'radon' is missing in 1 .* row 40 "
            r"\(task 'CASS'\)"),
        (lambda f: spoil(f, "floor", np.inf), {}, ValueError, r"'floor' is inf in row 40 \(task "
            r"'CASS'\)"),
        (lambda f: spoil(f, "held", 2.0), {"query": "held"}, ValueError, r"is 2.0 in row 40 "
            r"\(task 'CASS'\)"),
        (lambda f: f.assign(kind="a"), {"y": "kind"}, TypeError, "column 'kind' has dtype .*"
            "cat.codes.*vm.from_formula"),
        (lambda f: f, {"y": "county"}, ValueError, "'county' says which task .* among y too"),
        (lambda f: f, {"x": ["floor", "county"]}, ValueError, "'county' says .* among x too"),
        (lambda f: f, {"x": ["floor", "floor"]}, ValueError, "x names the column 'floor' twice"),
        (lambda f: f, {"x": ["floor", "radon"]}, ValueError, "'radon' is among x and among y"),
        (lambda f: f.assign(floor=pd.Timestamp("2024-01-01")), {}, TypeError, "'floor' holds dates "
            "or times.*Timedelta"),
        (lambda f: f.assign(floor=pd.Timestamp("2024-01-01", tz="UTC")), {}, TypeError, "dates"),
        (lambda f: f.astype({"floor": "category"}), {}, TypeError, "column 'floor' has dtype "
            "category"),
        (lambda f: f, {"x": ["floor", "flor"]}, ValueError, "no column 'flor'; its columns are"),
        (lambda f: f.set_index("county"), {}, ValueError, r"no column 'county': .*reset_index"),
        (lambda f: f, {"task": ["county", "kind"]}, TypeError, "expected one column name"),
        (lambda f: f[["county", "floor", "floor", "radon"]], {}, ValueError, "several columns "
            "called 'floor'"),
        (lambda f: f, {"y": []}, ValueError, r"y=\[\] has no columns"),
        (lambda f: f[:0], {}, ValueError, "no rows"),
        (lambda f: f.to_dict(), {}, TypeError, "pandas DataFrame, got dict"),
    ],
)  # fmt: skip
def test_from_frame_complaints_name_the_row_and_the_task(frame, change, arguments, error, match):
    with pytest.raises(error, match=match):
        TaskSet.from_frame(
            change(frame), **{"task": "county", "x": "floor", "y": "radon", **arguments}
        )


# -- split and scale -------------------------------------------------------------------------------


def numbered(sizes: list[int], first_query: bool = False) -> TaskSet:
    query = ([-1.0], [-1.0]) if first_query else None
    rows = [list(map(float, range(n))) for n in sizes]
    return TaskSet([Task((r, r), query, f"t{i}") for i, r in enumerate(rows)])


@pytest.mark.parametrize(
    ("num_support", "kept"),
    [
        (2, [1, 2, 2, 2]),
        (0, [0, 0, 0, 0]),
        (99, [1, 2, 5, 40]),
        (0.5, [1, 1, 2, 20]),
        (0.99, [1, 1, 4, 39]),
        (0.01, [1] * 4),
    ],
)
def test_split_moves_rows_and_loses_none(num_support, kept):
    tasks = numbered([1, 2, 5, 40], first_query=True)
    for task, before, keep in zip(tasks.split(num_support, seed=3), tasks, kept, strict=True):
        support = task.support[1].tolist() if task.support else []
        query = task.query[1].tolist()
        assert len(support) == keep
        assert query[0] == -1.0  # what was there comes first
        assert sorted(support + query[1:]) == before.support[1].tolist()
        assert support == sorted(support)
        assert query == sorted(query)
        assert torch.equal(task.query[0], task.query[1])  # x goes with its y


def test_split_depends_on_seed_and_name_only():
    tasks = numbered([40, 40, 40])

    def kept(tasks: TaskSet, seed: int) -> dict[str, list[float]]:
        return {task.name: task.support[1].tolist() for task in tasks.split(10, seed)}

    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002  # the global one, which must not move
    torch_state = torch.get_rng_state()
    whole = kept(tasks, 0)
    assert kept(tasks, 0) == whole
    assert kept(tasks[[2, 0]], 0) == {name: whole[name] for name in ("t2", "t0")}
    assert whole["t0"] != whole["t1"]
    assert kept(tasks, 1)["t0"] != whole["t0"]
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())


def test_split_chooses_every_row_alike():
    tasks = numbered([5])
    counts = np.zeros(5)
    for seed in range(2000):
        counts[tasks.split(2, seed)[0].support[1].long().numpy()] += 1
    # each row is kept with probability 2/5: 800 of 2000, standard deviation 22
    assert np.abs(counts - 800).max() < 5 * 22


@pytest.mark.parametrize("bad", [-1, 1.5, 0.0, 1.0, float("nan"), True, "2", None])
def test_split_refuses(bad):
    with pytest.raises(ValueError, match="num_support is"):
        numbered([3]).split(bad)


def test_standardized_agrees_with_numpy():
    rng = np.random.default_rng(0)
    given = [
        Task(
            (rng.normal(3, 5, (n, 2)) * [1, 0] + [0, 0.1], rng.normal(size=n)),
            (np.ones((1, 2)), [2.0]),
            f"t{n}",
        )
        for n in (1, 4, 7)
    ]
    tasks, scaling = TaskSet(given, dtype=F64).standardized()
    x, y = (np.concatenate([t.support[i] for t in given]) for i in (0, 1))
    assert np.allclose(scaling.x_loc.numpy(), x.mean(0), rtol=1e-14)
    assert scaling.x_scale[0].item() == pytest.approx(x[:, 0].std(), rel=1e-14)
    assert scaling.x_scale[1].item() == 1.0  # a constant column, although its computed sd is 1e-17
    got_x, got_y = (torch.cat([t.support[i] for t in tasks]).numpy() for i in (0, 1))
    assert np.allclose(got_x[:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std())
    assert np.abs(got_x[:, 1]).max() < 1e-15
    assert np.allclose([got_y.mean(), got_y.std()], [0, 1])
    assert tasks[0].query[1].item() == pytest.approx((2 - y.mean()) / y.std())
    assert np.allclose(scaling.y_inverse(torch.from_numpy(got_y)).numpy(), y)
    assert scaling.y_inverse(torch.zeros(3, 4, dtype=F64)).shape == (3, 4)


def test_scaling_serves_further_tasks():
    train = TaskSet([Task(support=(np.array([[0.0], [2.0]]), np.array([10.0, 30.0])))])
    _, scaling = train.standardized()
    # whole numbers in a new task's y are scaled too; a task without data passes
    new = scaling.apply(
        TaskSet([Task(support=(np.array([[3.0]]), [40]), name="n"), Task(name="empty")])
    )
    assert new["n"].support[0].tolist() == [[2.0]]
    assert new["n"].support[1].tolist() == [2.0]
    assert new["empty"].support is None
    with pytest.raises(ValueError, match=r"task 'task 0': a row of x has shape \(2,\).*\(1,\)"):
        scaling.apply(TaskSet([Task(support=(np.zeros((1, 2)), np.zeros(1)))]))
    with pytest.raises(ValueError, match="no task has support data"):
        TaskSet([Task()]).standardized()


def test_repr_of_a_scaling():
    _, scaling = TaskSet([Task(support=([[1.0, 2.0], [3.0, 2.0]], [10.0, 14.0]))]).standardized()
    assert repr(scaling) == "Scaling(x: loc [2., 2.], scale [1., 1.]; y: loc 12., scale 2.)"
    _, scaling = TaskSet([Task(support=([1.0, 3.0], [0, 1]))]).standardized()
    assert repr(scaling) == "Scaling(x: loc 2., scale 1.; y: left alone)"


def test_classes_are_not_standardized():
    tasks, scaling = TaskSet([Task(support=([[0.0], [1.0]], [0, 3]))]).standardized()
    assert tasks[0].support[1].tolist() == [0, 3]
    assert tasks.batch().support.y.dtype == torch.int64
    assert scaling.y_inverse(torch.tensor([0.5])).tolist() == [0.5]


def test_module_imports_no_pandas():
    code = (
        "import sys; sys.modules['pandas'] = None\n"  # any import of pandas now raises
        "import varmeta.tasks\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
