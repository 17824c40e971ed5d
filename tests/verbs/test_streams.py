"""Fits to streams of tasks: what they are given, that nothing is kept, and that they go on."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import varmeta as vm

ROOT = Path(vm.__file__).parents[1]
PLAIN = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.05, per_point=True))


def line(number: int, name: str | None = None, rows: int = 6) -> vm.Task:
    """One task, of its number alone."""
    generator = torch.Generator().manual_seed(number)
    a, b = torch.randn(2, generator=generator)
    x = torch.randn(rows, 1, generator=generator)
    y = a + b * x[:, 0] + 0.1 * torch.randn(rows, generator=generator)
    return vm.Task((x[:3], y[:3]), (x[3:], y[3:]), name)


class Lines(Dataset[vm.Task]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> vm.Task:
        return line(number)


class Endless:
    def __getitem__(self, number: int) -> vm.Task:
        return line(number, f"line {number}")


class ByTurns(IterableDataset[vm.Task]):
    def __iter__(self) -> Iterator[vm.Task]:
        return (line(number, f"line {number}") for number in range(20))


def by_step(step: int, generator: torch.Generator) -> list[vm.Task]:
    return [line(4 * step + i, f"line {4 * step + i}") for i in range(4)]


def one_by_one() -> Iterator[vm.Task]:
    number = 0
    while True:
        yield line(number, f"line {number}")
        number += 1


def model(net: nn.Module | None = None) -> vm.TaskModel:
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    return vm.TaskModel(net, vm.likelihoods.Gaussian(0.3), vm.GaussianPrior(1.0))


def fit(tasks: Any, num_steps: int = 12, strategy: vm.Strategy = PLAIN, **options: Any) -> vm.Fit:
    options = {"schedule": "constant"} | options
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the inner steps diverge")
        return vm.fit(options.pop("model", None) or model(), tasks, strategy, num_steps, **options)


def same(one: vm.Fit, other: vm.Fit) -> None:
    assert one.eta.keys() == other.eta.keys()
    for name, value in one.eta.items():
        assert torch.equal(value, other.eta[name]), name
    assert [row["loss"] for row in one.run.history] == [row["loss"] for row in other.run.history]


# each gives lines 0 to 3 at the first step, 4 to 7 at the second, ...
ENDLESS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "function": lambda: (by_step, {}),
    "function that yields": lambda: ((lambda step, generator: iter(by_step(step, generator))), {}),
    "numbered": lambda: (Endless(), {"batch_size": 4}),
    "iterator": lambda: (one_by_one(), {"batch_size": 4}),
    "iterator of lists": lambda: ((by_step(k, torch.Generator()) for k in range(99)), {}),
    "iterator of sets": lambda: (
        (vm.TaskSet(by_step(k, torch.Generator())) for k in range(99)),
        {},
    ),
    "loader": lambda: (
        DataLoader(Endless(), batch_size=4, sampler=range(400), collate_fn=list),  # type: ignore[arg-type]
        {},
    ),
    "loader with workers": lambda: (
        DataLoader(Endless(), batch_size=4, sampler=range(400), collate_fn=list, num_workers=2),  # type: ignore[arg-type]
        {},
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_every_kind_of_stream_gives_the_same_fit(kind: str) -> None:
    source, options = ENDLESS[kind]()
    same(fit(source, **options), fit(Endless(), batch_size=4))


def test_a_dataset_with_a_length_is_learned_from_as_a_set() -> None:
    whole = vm.TaskSet(line(number) for number in range(20))
    streamed, held = fit(Lines(), batch_size=6), fit(whole, batch_size=6)
    same(streamed, held)
    assert streamed.run.evaluations == held.run.evaluations


def test_a_step_of_a_stream_runs_the_network_as_often_as_of_a_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks of later tasks look at their numbers alone."""
    seen: list[int] = []
    network = vm.TaskModel._network

    def counting(self: vm.TaskModel, theta: Any, eta: Any, x: torch.Tensor, *more: Any) -> Any:
        seen.append(len(x) * x.shape[1])
        return network(self, theta, eta, x, *more)

    monkeypatch.setattr(vm.TaskModel, "_network", counting)
    work = []
    for source in (Lines(), vm.TaskSet(line(number) for number in range(20))):
        steps: list[list[int]] = []

        def step(row: dict[str, float], steps: list[list[int]] = steps) -> None:
            steps.append(list(seen))
            seen.clear()

        fit(source, 5, batch_size=4, callback=step, compile=False)
        work.append(steps[1:])
    assert work[0] == work[1]


def test_a_dataset_that_ends_is_read_again() -> None:
    found = fit(ByTurns(), 7, batch_size=4)
    again = fit((line(n % 20, f"line {n % 20}") for n in range(40)), 7, batch_size=4)
    same(found, again)


@pytest.mark.parametrize("kind", ["function", "numbered", "loader", "iterator"])
def test_it_stops_and_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source, options = ENDLESS[kind]()
    whole = fit(Endless(), batch_size=4)
    fit(source, 5, **options).save(tmp_path / "half.vm")
    half = vm.load(tmp_path / "half.vm", model())
    assert half.run.streamed == 20 and len(half.tasks) == 1
    same(fit(source, resume=half, **options), whole)


@pytest.mark.parametrize(
    ("strategy", "net"),
    [
        (vm.Implicit("delta", "query"), nn.Linear(1, 1)),
        (vm.FirstOrder("delta", "query", 2, PLAIN.minimizer), None),
        (vm.Reptile("delta", inner_steps=2, minimizer=PLAIN.minimizer), None),
        (vm.Unrolled("normal", "query", 2, PLAIN.minimizer, expectation="monte_carlo"), None),
        (vm.Implicit("multivariate_normal", minimizer=vm.ClosedForm()), nn.Linear(1, 1)),
    ],
)
def test_strategies_learn_from_a_stream_as_from_its_tasks(
    strategy: vm.Strategy, net: nn.Module | None
) -> None:
    tasks = [line(n, f"line {n}") for n in range(8)]
    held = fit(vm.TaskSet(tasks), 3, strategy, model=model(net), optimizer=torch.optim.Adam)
    streamed = fit(
        lambda step, generator: tasks, 3, strategy, model=model(net), optimizer=torch.optim.Adam
    )
    same(streamed, held)


def test_noise_is_never_repeated() -> None:
    from varmeta.tasks.stream import stream_of

    stream = stream_of(lambda step, generator: [line(0), line(1)], None, 0)
    ids = torch.cat([stream.batch(step).ids for step in range(50)])
    assert len(ids.unique()) == 100


def test_tasks_are_moved_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    move = vm.TaskSet.to

    def to(self: vm.TaskSet, dtype: Any = None, device: Any = None) -> vm.TaskSet:
        asked.append(device)
        return move(self, dtype, "cpu" if device == "elsewhere" else device)

    monkeypatch.setattr(vm.TaskSet, "to", to)
    fit(by_step, 3, device="elsewhere")
    assert asked.count("elsewhere") == 3
    held = vm.TaskSet(by_step(0, torch.Generator()))
    fit(held, 3, device="elsewhere")
    assert asked.count("elsewhere") == 4


def test_the_generator_is_of_the_seed_and_the_step() -> None:
    met: list[tuple[int, float]] = []

    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        met.append((step, float(torch.rand((), generator=generator))))
        return by_step(step, generator)

    fit(tasks, 3)
    first, met[:] = list(met), []
    fit(tasks, 3)
    assert met == first and len(set(met)) == 3
    fit(tasks, 3, seed=1)
    assert not set(met[3:]) & set(first)


def test_validation_tasks_watch_a_stream() -> None:
    held_out = vm.TaskSet(line(n, f"held out {n}") for n in range(1000, 1010))
    found = fit(Endless(), 40, batch_size=4, validate=vm.Validation(held_out, every=10))
    assert found.history["validation"].notna().sum() == 4 and "kept is step" in found.stop


def test_it_ends_with_the_source_and_says_so() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit((line(n) for n in range(10)), 100, batch_size=4)
    assert found.stop == "the source of tasks ended after 3 steps"
    assert found.run.streamed == 10
    assert "Unrolled(delta, outer=query), 10 tasks of a stream\n" in str(found)


def test_what_the_source_raises_loses_nothing() -> None:
    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        if step == 3:
            raise OSError("the disk is gone")
        return by_step(step, generator)

    with pytest.raises(OSError, match="the disk is gone") as caught:
        fit(tasks)
    kept = caught.value.fit  # type: ignore[attr-defined]
    assert kept.run.step == 3 and "ended by the source of tasks's OSError" in kept.stop
    same(fit(by_step, resume=kept), fit(by_step))


LATER: dict[str, tuple[vm.Task, str]] = {
    "columns": (
        vm.Task((torch.zeros(2, 2), torch.zeros(2))),
        "the shape of a row of x of the source's tasks of step 2 is",
    ),
    "classes": (
        vm.Task((torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))),
        "the kind of y of the source's tasks of step 2 is integer",
    ),
    "no query": (vm.Task((torch.zeros(2, 1), torch.zeros(2)), name="bare"), "'bare' first"),
    "not finite": (
        vm.Task((torch.zeros(2, 1), torch.full((2,), torch.nan)), name="hole"),
        "'hole': support y, row 0",
    ),
}


@pytest.mark.parametrize("what", LATER)
def test_later_tasks_are_looked_at_too(what: str) -> None:
    bad, sentence = LATER[what]
    with pytest.raises(ValueError, match=sentence) as caught:
        fit(lambda step, generator: [bad] if step == 2 else by_step(step, generator))
    assert caught.value.fit.run.step == 2  # type: ignore[attr-defined]


def test_an_outcome_that_no_output_explains_is_refused_by_name() -> None:
    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        x = torch.randn(4, 2, generator=generator)
        return [vm.Task((x, torch.tensor([0, 1, 2, 2 + (step == 1)])), (x, torch.arange(4) % 3))]

    classes = vm.TaskModel(nn.Linear(2, 3), vm.likelihoods.Categorical(3))
    with pytest.raises(ValueError, match="task 'task 0 of step 1', row 3: y = 3 is outside"):
        fit(tasks, model=classes)


def test_padding_that_comes_later_is_refused_where_rows_meet() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x - x.mean(0))

    def tasks(step: int, generator: torch.Generator) -> list[vm.Task]:
        return [line(step), line(step + 50, rows=6 if step < 2 else 5)]

    with pytest.raises(ValueError, match="a row's result depends on the task's other rows"):
        fit(tasks, model=model(Mean()))


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "list": ([line(0)], {}, TypeError, "tasks must be a TaskSet, not a list"),
    "number": (3, {}, TypeError, "tasks must be a TaskSet, not an int"),
    "no batch size": (Endless(), {}, ValueError, "how many of these tasks a step takes"),
    "one at a time": (one_by_one(), {}, ValueError, "gives one task at a time"),
    "collated": (DataLoader(Lines()), {}, TypeError, "give it collate_fn=list"),
    "nothing": (iter(()), {"batch_size": 2}, ValueError, "gave none"),
    "no tasks": (lambda step, generator: [], {}, ValueError, "gave no tasks at step 0"),
    "tensors": (lambda step, generator: [1.0], {}, TypeError, "a list with a float at step 0"),
    "other size": (by_step, {"batch_size": 3}, ValueError, "gives 4 tasks at step 0, not batch"),
    "lists of other size": (iter([by_step(0, torch.Generator())]), {"batch_size": 3}, ValueError,
                            "a step's tasks at once, 4 of them"),
    "stored": (by_step, {"strategy": vm.Joint("normal")}, ValueError, "come once"),
    "ensemble": (by_step, {"ensemble": 2}, ValueError, "has no 'all'"),
    "hyperguide": (by_step, {"hyperguide": "normal"}, ValueError, "hyperguide"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_stream_or_needs_all_tasks_is_refused(what: str) -> None:
    source, options, error, sentence = REFUSED[what]
    with pytest.raises(error, match=sentence):
        fit(source, **options)


def test_a_hyperprior_needs_a_number_of_tasks() -> None:
    density = torch.distributions.HalfNormal(1.0)
    prior = vm.GaussianPrior(learn_precision="shared", scale_hyperprior=density)
    made = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(0.3), prior)
    strategy = vm.Unrolled("normal", "query_elbo", 2, PLAIN.minimizer)
    with pytest.raises(ValueError, match="a hyperprior counts once beside all tasks"):
        fit(by_step, model=made, strategy=strategy)
    fit(Lines(), 2, model=made, strategy=strategy, batch_size=4)


def test_what_needs_the_tasks_says_that_they_are_gone() -> None:
    found = fit(by_step, 3)
    landscape = lambda: vm.Landscape.of_fit(found)  # noqa: E731
    for ask in (found.posterior, found.leave_one_task_out, found.to_arviz, landscape):
        with pytest.raises(ValueError, match="came as a stream and are not kept"):
            ask()
    assert found.standard_errors is None and found.log_likelihood is None
    assert len(found.adapt(vm.TaskSet([line(5)])).names) == 1


def test_other_streams_are_not_resumed() -> None:
    begun, held = fit(by_step, 3), fit(vm.TaskSet([line(0), line(1)]), 3, batch_size=1)
    for source, resume, why in (
        (lambda step, generator: [line(7)], begun, "other tasks"),
        (by_step, held, "of a TaskSet"),
        (vm.TaskSet([line(0)]), begun, "of a stream"),
    ):
        with pytest.raises(ValueError, match=why):
            fit(source, resume=resume)


MEMORY = """
import resource, torch, varmeta as vm
from tests.verbs.test_streams import PLAIN, model
rows, labels = torch.randn(4000, 1), torch.arange(4000) // 4
tasks = vm.episodes(rows, labels, ways=5, shots=1, queries=3)
net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
model = vm.TaskModel(net, vm.likelihoods.Categorical(5))
peaks = []
def peak(row):
    if row["step"] in (100, 900):
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
vm.fit(model, tasks, PLAIN, 900, batch_size=8, callback=peak, compile=False)
print(*peaks)
"""


def test_memory_is_flat() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    early, late = map(int, done.stdout.split())
    assert late <= 1.05 * early
