"""What a model is tried on before any work: every value, and of a network one task of each size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, randn
from varmeta.fitting.run import Run
from varmeta.models.check import check_model
from varmeta.strategies.strategy import State

GAUSSIAN = vm.likelihoods.Gaussian(0.7)


class Net(nn.Module):
    """A linear layer and another module, in a function of their own."""

    def __init__(
        self, function: Callable[[Any, Tensor], Any], layer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.out, self.layer, self.function = nn.Linear(4, 1), layer, function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor, age: Tensor) -> Tensor:
        return self.out(x) + age


def pruned() -> nn.Module:
    layer = nn.Linear(4, 1)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


def again(net: Any, x: Tensor) -> Tensor:
    return checkpoint(net.out, x, use_reentrant=False)


def without_gradient(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.out(x)


def renormed(net: Any, x: Tensor) -> Tensor:
    return net.out(F.embedding((x[:, 0] > 0).long(), net.layer.weight, max_norm=1.0))


def sparse(net: Any, x: Tensor) -> Tensor:
    return net.out(F.embedding((x[:, 0] > 0).long(), net.layer.weight, sparse=True))


class Drop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Table(nn.Module):
    """`F.embedding` on a parameter of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(8.0).reshape(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding((x[:, 0] > 0).long(), self.table, padding_idx=0)


def tasks_of(*sizes: int, dtype: torch.dtype = F64) -> vm.TaskSet:
    return vm.TaskSet(
        [vm.Task((randn(n, 4, seed=i), randn(n, seed=9 + i))) for i, n in enumerate(sizes)],
        dtype=dtype,
    )


# -- images ----------------------------------------------------------------------------------------


def episodes(number: int, wrong: int | None = None) -> vm.TaskSet:
    def part(n: int, seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
        return x, torch.arange(n) % 5

    tasks = [vm.Task(part(5, i), part(10 + i % 3, i), f"episode {i}") for i in range(number)]
    if wrong is not None:
        assert tasks[-1].query is not None
        tasks[-1].query[1][4] = wrong
    return vm.TaskSet(tasks)


def conv() -> vm.TaskModel:
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 5),
    )
    return vm.TaskModel(net, vm.likelihoods.Categorical())


@pytest.fixture
def rows_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows a network was run on, call by call."""
    seen: list[int] = []
    network = vm.TaskModel._network

    def counting(model: vm.TaskModel, theta: Tensor, eta: Any, x: Tensor, *chunk: Any) -> Tensor:
        seen.append(len(x) * x.shape[1])
        return network(model, theta, eta, x, *chunk)

    monkeypatch.setattr(vm.TaskModel, "_network", counting)
    return seen


def test_the_work_does_not_grow_with_the_episodes(rows_run: list[int]) -> None:
    check_model(conv(), episodes(15))
    few = list(rows_run)
    rows_run.clear()
    check_model(conv(), episodes(60))
    assert rows_run == few
    assert (
        max(rows_run) <= 2 * 12
    )  # one task of each size; the gradient's test takes two of at most 16 rows


def test_the_first_step_comes_as_soon_however_many_episodes(rows_run: list[int]) -> None:
    """In `fit` nothing but the check and the step runs the network before it."""
    step = vm.Unrolled("delta", "query", 1, vm.GradientDescent(0.01))
    before: list[list[int]] = []

    def first(row: dict[str, float]) -> None:
        before.append(list(rows_run))
        raise vm.StopFit

    options: dict[str, Any] = {"batch_size": 4, "callback": first, "compile": False}
    for number in (15, 60):
        rows_run.clear()
        optimizer = lambda p: torch.optim.Adam(p, 1e-3)  # noqa: E731
        vm.fit(conv(), episodes(number), step, 9, optimizer, progress=False, **options)
    assert before[0] == before[1]
    assert max(before[1]) <= 4 * 12


def test_adapting_and_a_gradient_run_each_task_no_more_often_than_they_need(
    rows_run: list[int],
) -> None:
    """Beside the check, whose work is the same, a task is run as often among many as among few."""
    step = vm.Unrolled("delta", "query", 1, vm.GradientDescent(0.01))
    model = conv()
    run = Run(model.init(torch.zeros(())), State())
    for verb in ("meta_gradient", "adapt"):
        work = {}
        for number in (15, 45, 75):
            tasks = episodes(number)
            rows_run.clear()
            if verb == "adapt":
                vm.Fit(model, tasks, step, 0, run).adapt(tasks, compile=False)
            else:
                vm.meta_gradient(model, tasks, step, compile=False)
            work[number] = sum(rows_run)
        each = (work[75] - work[45]) / 30
        assert work[45] - work[15] == 30 * each
        # the support at the start and after the step, and the query; one point is counted twice,
        # since the network is called again without its axis
        assert each <= 2 * {"adapt": 2 * 5, "meta_gradient": 2 * 5 + 12}[verb]


@pytest.mark.parametrize("number", [2, 60])
def test_every_class_is_looked_at(number: int) -> None:
    """Both where all tasks are run and where the network is run on some only."""
    match = (
        rf"task 'episode {number - 1}', row 4: y = 5 is outside the support of Categorical: "
        "expected a class 0, ..., 4"
    )
    with pytest.raises(ValueError, match=match):
        check_model(conv(), episodes(number, wrong=5))


def test_a_cheap_network_is_run_on_every_row(rows_run: list[int]) -> None:
    student = vm.likelihoods.StudentT()
    check_model(vm.TaskModel(seeded(lambda: nn.Linear(4, 1)), student), tasks_of(3, 5, 5))
    assert max(rows_run) == 15
    rows_run.clear()
    # of a layer and a density that are known, one task tells for all
    check_model(vm.TaskModel(seeded(lambda: nn.Linear(4, 1)), GAUSSIAN), tasks_of(3, 5, 5))
    assert max(rows_run) == 5


def test_every_weighted_count_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varmeta.models.check.EVERYONE", 0)
    for likelihood, y, bad in (
        (
            vm.likelihoods.Weighted(vm.likelihoods.Poisson()),
            [[1.0, 1.0], [2.0, 0.5], [0.0, 1.0]],
            [-1.0, 1.0],
        ),
        (vm.likelihoods.Binomial(), [[1, 3], [2, 2], [0, 4]], [5, 4]),
        (vm.likelihoods.Gaussian(per_task=True), [1.0, 2.0, 3.0], None),
        (vm.likelihoods.Gaussian(), [[1.0], [2.0], [3.0]], None),
    ):
        model = vm.TaskModel(nn.Linear(4, 1), likelihood)
        values = torch.tensor(
            y, dtype=F64 if isinstance(likelihood, vm.likelihoods.Weighted) else None
        )
        x = randn(3, 4).to(values.dtype if values.is_floating_point() else F64)
        check_model(model, vm.TaskSet([vm.Task((x, values)), vm.Task((x[:2], values[:2]))]))
        if bad is not None:
            values[1] = torch.tensor(bad)
            with pytest.raises(ValueError, match="task 'task 1', row 1: y = "):
                check_model(
                    model,
                    vm.TaskSet(
                        [vm.Task((x, torch.tensor(y).to(values))), vm.Task((x[:2], values[:2]))]
                    ),
                )


# -- what does not run -----------------------------------------------------------------------------


REFUSED_WHEN_MADE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "script": (lambda: torch.jit.script(nn.Linear(4, 1)), "the network is TorchScript"),
    "script_layer": (
        lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 1))), "layer '0' is TorchScript",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(4, 1)), "the network comes from torch.compile"),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 1))),
        r"layer '0' has torch.nn.utils.weight_norm, .* use "
        r"torch.nn.utils.parametrizations.weight_norm",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1)),
        "layer '0' is a LazyLinear that has seen no data",
    ),
    "sparse": (
        lambda: Net(lambda net, x: x, nn.Embedding(3, 1, sparse=True)),
        r"layer 'layer' \(Embedding\) has sparse",
    ),
    "max_norm": (
        lambda: Net(lambda net, x: x, nn.EmbeddingBag(3, 1, max_norm=1.0)),
        r"layer 'layer' \(EmbeddingBag\) has max_norm",
    ),
    "pruned": (
        lambda: nn.Sequential(pruned(), nn.Linear(1, 1)),
        r"layer '0' \(Linear\) keeps 'weight', which .* prune.remove\(layer, 'weight'\)",
    ),
    "frequency": (
        lambda: Net(lambda net, x: x, nn.Embedding(3, 1, scale_grad_by_freq=True)),
        "whose gradient is not that of the",
    ),
}  # fmt: skip
REFUSED_ON_DATA: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tuple": (
        lambda: Net(lambda net, x: (net.out(x), x)),
        "task 'task 1' .*: the network puts out a tuple, expected one tensor",
    ),
    "dict": (lambda: Net(lambda net, x: {"y": net.out(x)}), "the network puts out a dict"),
    "one_number": (
        lambda: Net(lambda net, x: net.out(x).mean()),
        r"of shape \(\) for x of shape \(5, 4\): expected a row",
    ),
    "some_rows": (
        lambda: Net(lambda net, x: net.out(x)[:2]),
        r"of shape \(2, 1\) for x of shape \(5, 4\)",
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 2), Drop(), nn.Linear(2, 1)),
        "in layer '1', Drop: it draws random numbers",
    ),
    "in_place": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 1)),
        r"writes into its input, .*inplace=True: \['0'\]",
    ),
    "whole numbers": (
        lambda: Net(lambda net, x: net.out(x).long()), "puts out int64, expected floating numbers",
    ),
    "complex numbers": (
        lambda: Net(lambda net, x: torch.complex(net.out(x), net.out(x))),
        "puts out complex128, expected floating numbers",
    ),
    "no gradient": (
        lambda: Net(without_gradient),
        r"does not depend on its weights .*no_grad\(\) or detach\(\)",
    ),
    "detached": (lambda: Net(lambda net, x: net.out(x).detach()), "does not depend on its weights"),
    "made again": (lambda: Net(again), "cannot be differentiated for many tasks at once: "),
    "functional max_norm": (
        lambda: Net(renormed, nn.Embedding(2, 4)),
        "cannot be differentiated for many tasks at once",
    ),
    "functional sparse": (
        lambda: Net(sparse, nn.Embedding(2, 4)), "cannot be differentiated for many tasks at once",
    ),
    "two inputs": (
        Twice, r"given x alone: .*missing 1 required positional argument: 'age'.*vm\.Parts",
    ),
    "padding_idx": (
        lambda: nn.Sequential(Table(), nn.Linear(4, 1)),
        "'0.table' has another gradient in the second of two equal tasks",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore:.*weight_norm. is deprecated", "ignore:.*torch.jit.script. is deprecated"
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", REFUSED_WHEN_MADE)
def test_layers_that_are_refused_by_name(name: str) -> None:
    make, match = REFUSED_WHEN_MADE[name]
    net = make()
    with pytest.raises(ValueError, match=match):
        vm.TaskModel(net, GAUSSIAN)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", REFUSED_ON_DATA)
def test_networks_that_are_refused_on_data(name: str) -> None:
    make, match = REFUSED_ON_DATA[name]
    tasks = tasks_of(3, 5)
    before = [task.support[0].clone() for task in tasks]
    with pytest.raises(ValueError, match=match):
        check_model(vm.TaskModel(seeded(make), GAUSSIAN), tasks)
    assert all(torch.equal(task.support[0], x) for task, x in zip(tasks, before, strict=True))
    assert all(
        torch.equal(tasks.batch().support.filled[0][i, : len(x)], x) for i, x in enumerate(before)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"in half precision \({name}\).*tasks.to\(torch.float32\)"
    ):
        check_model(vm.TaskModel(nn.Linear(4, 1), GAUSSIAN), tasks_of(3, 5, dtype=dtype))
    check_model(vm.TaskModel(nn.Linear(4, 1).to(dtype), GAUSSIAN), tasks_of(3, 5))


def recurrent(net: Any, x: Tensor) -> Tensor:
    state = x.new_zeros(len(x), 4)
    for column in x.unbind(-1):
        state = net.layer(column.unsqueeze(-1), state)
    return net.out(state)


NEW: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), nn.Tanh(), nn.Linear(2, 1)
    ),
    "gru_cell": lambda: Net(recurrent, nn.GRUCell(1, 4)),
    "float32": lambda: nn.Sequential(nn.Linear(4, 1)).float(),
}


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented"
)
@pytest.mark.parametrize("name", NEW)
def test_what_the_refusals_advise_runs_and_is_the_network(name: str) -> None:
    net, tasks = seeded(NEW[name]), tasks_of(3, 5)
    model = vm.TaskModel(net, GAUSSIAN)
    check_model(model, tasks)  # no warning: it can be differentiated twice
    eta = model.init(torch.zeros((), dtype=F64))
    out = model.output(
        model.weights.flatten(eta).expand(2, 1, -1), eta, tasks.batch().support.filled[0]
    )
    torch.testing.assert_close(out[1], net(tasks[1].support[0]), rtol=1e-10, atol=1e-12)
