"""`Prototypes`: against loops over tasks, classes and rows in numpy, and differences in float64."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import distance
from scipy.special import log_softmax
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, known, seeded

L = vm.likelihoods
WAYS = 3


def body_and_head() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, WAYS)))


def model_of(net: nn.Module | None = None, shared: Any = ("0.*",), likelihood: Any = None) -> Any:
    return vm.TaskModel(
        body_and_head() if net is None else net,
        L.Categorical(WAYS) if likelihood is None else likelihood,
        vm.GaussianPrior(2.0),
        shared=shared,
    )


def clouds(num_tasks: int = 5, seed: int = 0, queries: int = 4) -> vm.TaskSet:
    """Tasks of 4 to 6 support rows, each class at least once, and 4 to 6 query rows."""
    generator = torch.Generator().manual_seed(seed)

    def part(centres: Tensor, n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % WAYS
        return centres[y] + torch.randn(n, 4, generator=generator, dtype=torch.float64), y

    tasks = []
    for index in range(num_tasks):
        centres = 2 * torch.randn(WAYS, 4, generator=generator, dtype=torch.float64)
        more = index % 3
        tasks.append(
            vm.Task(part(centres, 4 + more), part(centres, queries + more), f"cloud {index}")
        )
    return vm.TaskSet(tasks)


def log_probabilities(task: vm.Task, body: Any) -> np.ndarray:
    """log p of every class for every query row by distances, `(rows, classes)`."""
    assert task.support is not None and task.query is not None
    with torch.no_grad():
        support, query = body(task.support[0]).numpy(), body(task.query[0]).numpy()
    y = task.support[1].numpy()
    centres = np.stack([support[y == k].mean(0) for k in range(WAYS)])
    return log_softmax(-distance.cdist(query, centres, "sqeuclidean"), -1)


def test_probabilities_are_of_squared_distances_to_the_means_of_classes() -> None:
    tasks, net = clouds(), body_and_head()
    posterior = known(model_of(net), tasks, vm.Prototypes()).adapt(tasks)
    probs = posterior.expected([task.query[0] for task in tasks if task.query is not None])
    value = 0.0
    for task, row in zip(tasks, posterior.score().iloc[:-1].itertuples(), strict=True):
        assert task.query is not None and task.name is not None
        expected = log_probabilities(task, net[:2])  # type: ignore[index]
        assert probs.task(task.name)[0].log().numpy() == pytest.approx(expected, abs=1e-10)
        own = expected[np.arange(len(expected)), task.query[1]]
        assert row.log_density == pytest.approx(own.mean(), abs=1e-10)
        value -= own.sum()
    found = vm.meta_gradient(model_of(net), tasks, vm.Prototypes())
    assert found.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("likelihood", [L.Categorical(WAYS), L.LeastSquaresClasses(WAYS)])
def test_the_gradient_agrees_with_differences(likelihood: Any) -> None:
    model, tasks = model_of(likelihood=likelihood), clouds(3)
    eta = {name: v + 0.1 for name, v in model.init(torch.zeros((), dtype=torch.float64)).items()}
    found = vm.meta_gradient(model, tasks, vm.Prototypes(), eta=eta)
    moved = {"0.weight", "0.bias"} | ({"log_temperature"} & set(eta))
    assert {name for name, gradient in found.grads.items() if gradient.any()} == moved

    def value(name: str, index: int, by: float) -> float:
        there = {key: x.clone() for key, x in eta.items()}
        there[name].view(-1)[index] += by
        return vm.meta_gradient(model, tasks, vm.Prototypes(), eta=there).value

    step = 1e-5
    for name in moved:
        flat = found.grads[name].reshape(-1)
        for index in range(0, len(flat), 4):
            slope = (value(name, index, step) - value(name, index, -step)) / (2 * step)
            assert float(flat[index]) == pytest.approx(slope, rel=1e-7, abs=1e-7)


def test_a_task_is_the_same_beside_larger_ones() -> None:
    tasks = clouds(4)
    together = vm.meta_gradient(model_of(), tasks, vm.Prototypes())
    alone = [vm.meta_gradient(model_of(), tasks[[i]], vm.Prototypes()) for i in range(4)]
    assert together.value == pytest.approx(sum(one.value for one in alone), rel=1e-12)
    for name, gradient in together.grads.items():
        torch.testing.assert_close(gradient, torch.stack([g.grads[name] for g in alone]).sum(0))


def test_a_class_without_support_has_probability_0() -> None:
    tasks = clouds(2)
    assert tasks[0].support is not None and tasks[0].query is not None
    some = tasks[0].support[1] != 1
    few = vm.TaskSet(
        [vm.Task((tasks[0].support[0][some], tasks[0].support[1][some]), tasks[0].query, "few")]
    )
    posterior = known(model_of(), tasks, vm.Prototypes()).adapt(few)
    probs = posterior.expected(tasks[0].query[0]).samples[0, 0]
    assert not probs[:, 1].any()
    torch.testing.assert_close(probs.sum(-1), torch.ones(4, dtype=torch.float64))
    assert posterior.accuracy().value <= 0.75  # one row of four is of the class
    sentence = r"task 'few' has a query row of class 1 \(row 1\), but no support row of it"
    with pytest.raises(ValueError, match=sentence):
        vm.meta_gradient(model_of(), few, vm.Prototypes())
    with pytest.raises(ValueError, match=sentence):
        vm.fit(model_of(), lambda step, generator: list(few), vm.Prototypes(), 1)


@pytest.mark.parametrize("alone", [False, True])
def test_a_task_without_support_knows_no_class_from_another(alone: bool) -> None:
    tasks = clouds(2)
    none = vm.Task(None, tasks[0].query, "none")
    posterior = known(model_of(), tasks, vm.Prototypes()).adapt(
        vm.TaskSet([none] if alone else [tasks[1], none])
    )
    assert tasks[0].query is not None and tasks[1].query is not None
    x = [tasks[0].query[0]] if alone else [tasks[1].query[0], tasks[0].query[0]]
    probs = posterior.expected(x).task("none")[0]
    torch.testing.assert_close(probs, torch.full_like(probs, 1 / WAYS))
    assert posterior.score().loc["none", "log_density"] == pytest.approx(-np.log(WAYS))


def test_it_learns_resumes_saves_and_streams(tmp_path: Path) -> None:
    model, tasks, proto = model_of(), clouds(12), vm.Prototypes()
    fit = vm.fit(model, tasks, proto, 30, adam, batch_size=4, compile=False)
    start = vm.meta_gradient(model, tasks, proto).value
    assert fit.loss < start
    fit.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", model_of())
    assert again.strategy == proto and repr(again) == repr(fit)
    assert again.adapt(tasks).score().equals(fit.adapt(tasks).score())
    streamed = vm.fit(model, lambda step, generator: list(clouds(4, step)), proto, 5, adam)
    assert streamed.run.streamed == 20
    print(fit)  # says what was learned, of a prior that was not


def test_shared_features_are_made_once_a_step() -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.calls += 1
            return super().forward(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(Counted(4, 5), nn.Tanh(), nn.Linear(5, WAYS)).double()
    model, tasks = model_of(net), clouds(3)
    vm.fit(model, tasks, vm.Prototypes(), 1, adam, compile=False)
    before, Counted.calls = Counted.calls, 0
    vm.fit(model, tasks, vm.Prototypes(), 11, adam, compile=False)
    # once for the support and once for the query
    assert Counted.calls - before == 2 * 10


def test_bare_and_flattened_heads() -> None:
    """Prototypes of x itself, and of a head that `nn.Flatten` follows: nothing is learned."""
    tasks = clouds(3)
    bare = seeded(lambda: nn.Linear(4, WAYS))
    posterior = known(model_of(bare, ()), tasks, vm.Prototypes()).adapt(tasks)
    for task, row in zip(tasks, posterior.score().iloc[:-1].itertuples(), strict=True):
        assert task.query is not None
        expected = log_probabilities(task, lambda x: x)
        own = expected[np.arange(len(expected)), task.query[1]]
        assert row.log_density == pytest.approx(own.mean(), abs=1e-10)
    nested = nn.Sequential(nn.Sequential(nn.Identity(), bare), nn.Flatten())
    other = known(model_of(nested, ()), tasks, vm.Prototypes()).adapt(tasks)
    assert other.score().to_numpy() == pytest.approx(posterior.score().to_numpy(), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: model_of(shared=()), r"what varies here is \['0\.weight', '0\.bias', '2\."),
        (lambda: model_of(shared=("0.*", "2.bias")), r"what varies here is \['2\.weight'\]"),
        (
            lambda: model_of(
                seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, WAYS, bias=False)))
            ),
            "ends with an nn.Linear with a bias",
        ),
        (
            lambda: model_of(
                seeded(lambda: nn.Sequential(nn.Linear(4, WAYS), nn.Linear(WAYS, WAYS))), ("1.*",)
            ),
            r"what varies here is \['0\.weight', '0\.bias'\]",
        ),
        (
            lambda: model_of(seeded(lambda: nn.Linear(4, 1)), (), L.Gaussian()),
            "are of classes 0, ..., C-1: they need likelihoods.Categorical or",
        ),
    ],
)
def test_models_without_prototypes_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vm.fit(model(), clouds(2), vm.Prototypes(), 1)


class Own(nn.Module):
    """A body and a head, and a `forward`, of which nothing is known."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, WAYS)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).tanh())


@pytest.mark.parametrize(
    ("likelihood", "strategy"),
    [
        (L.Categorical(WAYS), vm.Prototypes()),
        (L.LeastSquaresClasses(WAYS), vm.Implicit("delta", "query", minimizer=vm.ClosedForm())),
    ],
)
def test_a_network_with_a_forward_of_its_own_is_told_to_be_a_sequential(
    likelihood: Any, strategy: Any
) -> None:
    advice = r"an Own, whose own forward .* nn\.Sequential\(body, head\)"
    with pytest.raises(ValueError, match=advice):
        vm.fit(model_of(seeded(Own), ("body.*",), likelihood), clouds(2), strategy, 1)
    own = seeded(Own)
    parts = OrderedDict(body=nn.Sequential(own.body, nn.Tanh()), head=own.head)
    vm.fit(model_of(nn.Sequential(parts), ("body.*",), likelihood), clouds(2), strategy, 1)


def test_other_guides_and_a_learned_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="prototypes are points, which no guide .* is"):
        vm.fit(model_of(), clouds(2), vm.Prototypes("normal"), 1)
    learned = vm.TaskModel(
        body_and_head(), L.Categorical(WAYS), vm.GaussianPrior(learn_precision="shared"), ["0.*"]
    )
    with pytest.raises(ValueError, match="passes no derivative to the precision: fix it"):
        vm.fit(learned, clouds(2), vm.Prototypes(), 1)
    with pytest.raises(ValueError, match="ensemble= fits networks whose last layer is in closed"):
        vm.fit(model_of(), clouds(2), vm.Prototypes(), 1, ensemble=2)
