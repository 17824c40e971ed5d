"""Groups of alike size: every task is in one, little is padding, and the numbers stay the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import varmeta as vm
from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import Step, eager
from varmeta.tasks import Data, Task, TaskSet
from varmeta.tasks.batch import WORTH
from varmeta.tasks.groups import alike
from varmeta.tasks.rows import Rows

F64 = torch.float64


def uneven(sizes: list[int], queries: list[int] | None = None, seed: int = 0) -> TaskSet:
    """Lines with noise, of as many support rows, and query rows, as are said."""
    rng = np.random.default_rng(seed)

    def part(line: np.ndarray, size: int) -> Any:
        x = rng.normal(size=(size, 1))
        return (x, line[0] + line[1] * x[:, 0] + 0.3 * rng.normal(size=size)) if size else None

    lines = rng.normal(1.0, 0.5, (len(sizes), 2))
    asked = queries or [0] * len(sizes)
    return TaskSet(
        [
            Task(part(line, size), part(line, query), f"t{i}")
            for i, (line, size, query) in enumerate(zip(lines, sizes, asked, strict=True))
        ]
    )


def linear() -> vm.TaskModel:
    prior = vm.GaussianPrior(learn_precision="shared")
    return vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)


def network() -> vm.TaskModel:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    return vm.TaskModel(net.double(), vm.likelihoods.Gaussian(), vm.GaussianPrior(3.0))


# -- which tasks go together -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_at_most_a_third_is_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.floor(np.exp(rng.uniform(0, 7, 200))).astype(int) - 1  # from none to a thousand
    rows = Rows(torch.zeros(sizes.sum(), 1), torch.zeros(sizes.sum()), torch.from_numpy(sizes))
    found = alike([rows.counts], worth=0)
    assert sorted(torch.cat(found).tolist()) == list(range(200))
    for positions in found:
        own = sizes[positions.numpy()]
        assert 2 * (len(own) * own.max() - own.sum()) <= own.sum()
        assert positions.tolist() == sorted(positions.tolist())
    # each begins below where the one before it ends, and they are few: by some threefold in size
    ends = [(sizes[p.numpy()].max(), sizes[p.numpy()].min()) for p in found]
    assert all(low > high for (_, low), (high, _) in pairwise(ends))
    assert len(found) <= 12


def test_a_batch_that_is_even_enough_stays_as_it_is() -> None:
    for sizes in ([5] * 9, [4, 5, 6, 5], [1, 900, 2], [0, 0, 3]):
        batch = uneven(sizes).batch()
        assert [group for _, group in batch.by_size()] == [batch]
    one = uneven([3, WORTH + 10, 4]).batch()
    assert [positions.tolist() for positions, _ in one.by_size()] == [[1], [0, 2]]


def test_queries_are_cut_too() -> None:
    batch = uneven([5, 5, 6, 6], [3, 5000, 3, 3]).batch()
    found = [(positions.tolist(), group.names) for positions, group in batch.by_size()]
    assert found == [([1], ("t1",)), ([0, 2, 3], ("t0", "t2", "t3"))]
    widths = [(group.support.width, group.query.width) for _, group in batch.by_size()]
    assert widths == [(5, 5000), (6, 3)]


def test_a_group_holds_what_its_tasks_hold() -> None:
    tasks = uneven([3, 0, 40, 2, 38, 3], [1, 2, 0, 2, 1, 1])
    batch = tasks.batch()
    for positions, group in batch.by_size(worth=5):
        some = batch.support.take(positions)
        width = group.support.width
        assert torch.equal(group.ids, batch.ids[positions])
        assert torch.equal(group.support.x, some.x[:, :width])
        assert torch.equal(group.support.y, some.y[:, :width])
        assert torch.equal(group.support.mask, some.mask[:, :width])
        assert not some.mask[:, width:].any()
    assert sum(group.total for _, group in batch.by_size(worth=5)) == pytest.approx(6)


# -- rows as a rectangle when somebody looks -------------------------------------------------------


def test_a_batch_is_padded_when_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = uneven([3, 50_000, 2])
    monkeypatch.setattr(Rows, "padded", lambda *_: pytest.fail("padded"))
    batch = tasks.batch()
    assert len(batch.support) == 3 and batch.support.width == batch.support.widest == 50_000
    assert batch.support.num_points.tolist() == [3, 50_000, 2]
    assert batch.support.like.dtype == F64 and batch.support.x_shape == (1,)
    some = tasks.batch([0, 2]).support
    assert (some.width, some.widest, some.cells) == (3, 50_000, 6)
    assert some.flat()[0].shape == (5, 1)


def test_rows_without_padding_are_not_copied() -> None:
    tasks = uneven([4, 4, 4])
    assert tasks.batch().support.x.data_ptr() == tasks.support_rows.x.data_ptr()


def test_flat_and_padded_data_answer_alike() -> None:
    flat = uneven([3, 0, 5]).batch().support
    plain = Data(flat.x, flat.y, flat.mask)
    at = torch.tensor([2, 0])
    for one, other in (
        (flat, plain),
        (flat.take(at), plain.take(at)),
        (flat.part(1, 3), plain.part(1, 3)),
        (flat.first_points(2), plain.first_points(2)),
        (flat.to(torch.float32), plain.to(torch.float32)),
    ):
        assert one.width == other.width and len(one) == len(other)
        assert one.num_points.tolist() == other.num_points.tolist()
        assert one.like.dtype == other.like.dtype == one.x.dtype
        assert (one.x_shape, one.y_shape) == (other.x_shape, other.y_shape)
        for a, b in zip((one.x, one.y, one.mask), (other.x, other.y, other.mask), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(one.flat(), other.flat(), strict=True):
            assert torch.equal(a, b)
    assert flat.widened() is flat and flat.take(at[1:]).width == 3


def test_a_part_of_tasks_without_rows_has_no_rectangle() -> None:
    """Zeros in it would be taken for data where a density is infinite at 0."""
    data = uneven([3, 0, 0]).batch().support
    assert data.part(1, 3).width == 0 and data.part(0, 2).width == 3


# -- everywhere ------------------------------------------------------------------------------------


@pytest.fixture
def paddings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every rectangle that is made its rows of padding, and of data."""
    found: list[tuple[int, int]] = []
    padded = Rows.padded

    def counted(self: Rows, width: int | None = None) -> Any:
        wide = self.largest if width is None else width
        found.append((len(self) * wide - len(self.x), len(self.x)))
        return padded(self, width)

    monkeypatch.setattr(Rows, "padded", counted)
    return found


PER_POINT = vm.GradientDescent(0.01, per_point=True)
STRATEGIES = {
    "dense": (linear, lambda: vm.Joint("multivariate_normal"), None),
    "mean-field": (linear, lambda: vm.Joint("normal"), None),
    "implicit": (linear, lambda: vm.Implicit("multivariate_normal"), None),
    "network": (network, lambda: vm.Joint("normal", adapt_steps=2), 2),
    "maml": (network, lambda: vm.Unrolled("delta", "query", 1, PER_POINT), 2),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_large_task_makes_no_others_large(name: str, paddings: list[tuple[int, int]]) -> None:
    model, strategy, steps = STRATEGIES[name]
    tasks = uneven([5] * 30 + [4000], [2] * 31)
    fit = vm.fit(model(), tasks, strategy(), steps, compile=False, progress=False)
    posterior = fit.adapt(tasks)
    if name != "maml":
        fit.posterior()
    posterior.predict([[0.5]]).mean  # noqa: B018
    posterior.score()
    if model is linear:
        posterior.score(TaskSet([Task(t.support, None, t.name) for t in tasks]))
    assert paddings
    for padding, data in paddings:
        assert padding <= max(WORTH, data // 2)


@pytest.mark.parametrize("guide", ["delta", "normal"])
@pytest.mark.parametrize("rows", [None, [0, 2, 3, 5]])
def test_a_step_in_groups_is_the_step(
    guide: str, rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = network(), uneven([3, 40, 0, 2, 38, 3, 5], [2, 1, 30, 2, 1, 1, 1])
    strategy = vm.Joint(guide) if guide == "normal" else vm.Unrolled("delta", inner_steps=2)
    problem = strategy.problem(model, tasks, 0)
    start = model.init(tasks.batch().support.like)
    eta = {name: value.detach().requires_grad_() for name, value in start.items()}
    state = strategy.init(problem, tasks.batch(), eta)
    whole = eager(strategy, problem, tasks.batch(rows), eta, state)
    monkeypatch.setattr("varmeta.tasks.batch.WORTH", 5)
    parts = Step(strategy, False, 1)(problem, tasks.batch(rows), eta, state)
    assert len(chunks.pieces(problem, tasks.batch(rows), 9)) > 1
    torch.testing.assert_close(parts.value, whole.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.stats.losses, whole.stats.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.gradient, whole.gradient, rtol=1e-10, atol=1e-12)
    if whole.state.phi is not None:
        torch.testing.assert_close(parts.state.phi, whole.state.phi, rtol=1e-10, atol=1e-12)


def test_scores_of_groups_are_those_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = uneven([4, 6, 5, 9], [3, 40, 0, 2])
    posterior = vm.fit(linear(), tasks).posterior()
    whole = posterior.score()
    x = [np.zeros((n, 1)) for n in (3, 40, 1, 2)]
    mean, samples = posterior.predict(x).mean, posterior.predict(x, 3).samples
    monkeypatch.setattr("varmeta.tasks.batch.WORTH", 5)
    parts = posterior.score()
    assert list(whole.index) == ["t0", "t1", "t3", "all"]
    assert np.allclose(parts, whole, rtol=1e-12)
    torch.testing.assert_close(posterior.predict(x).mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior.predict(x, 3).samples, samples, rtol=1e-12, atol=1e-12)
    for name in ("t0", "t1", "t3"):
        alone = posterior.take([name]).score()
        assert np.allclose(whole.loc[name], alone.loc["all"], rtol=1e-12)
