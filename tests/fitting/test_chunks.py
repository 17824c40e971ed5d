"""Working on tasks chunk by chunk changes nothing but rounding."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import GUIDES, adam, net_model, ragged_tasks
from tests.fitting.test_compiled_step import STRATEGIES, assert_same, steps, uncompiled  # noqa: F401  (a fixture)
from varmeta.fitting import chunks
from varmeta.fitting.compiled_step import Step, eager

PRIOR = vm.GaussianPrior(3.0, learn_precision="shared", hyperprior=dist.Gamma(2.0, 1.0))
NOISY = {
    "maml, Langevin": lambda guide: vm.Stochastic(
        vm.Unrolled(guide, inner_steps=2, minimizer=vm.GradientDescent(0.01)),
        vm.StochasticAlg(temperature=0.1, num_steps=3),
    ),
    "implicit, Langevin": lambda guide: vm.Stochastic(
        vm.Implicit(guide, "query", on_unconverged="ignore"),
        vm.StochasticAlg(temperature=0.1, num_steps=3),
    ),
}


@pytest.mark.parametrize(
    "rows", [None, [torch.tensor([4, 0, 2, 5]), torch.tensor([1, 6, 3])]], ids=["all", "minibatch"]
)
@pytest.mark.parametrize(
    ("strategy", "guide"),
    [(name, "normal") for name in STRATEGIES]
    + [("joint", guide) for guide in GUIDES if guide != "laplace"]
    + [
        (name, guide)
        for name in ("maml", "implicit query, cg")
        for guide in ("delta", "multivariate_normal")
    ]
    + [(name, "delta") for name in NOISY],
    ids=str,
)
def test_a_step_in_chunks_is_the_step(strategy: str, guide: Any, rows: Any) -> None:
    if strategy == "reinit" and rows is not None:
        rows = [torch.tensor([4, 0, 2, 5])] * 2
    chosen = (STRATEGIES | NOISY)[strategy](guide)
    model, tasks = net_model(PRIOR), ragged_tasks(7)
    whole = steps(lambda *args: eager(chosen, *args), model, tasks, chosen, count=2, rows=rows)
    parts = steps(Step(chosen, False, 1, 3), model, tasks, chosen, count=2, rows=rows)
    assert_same(whole, parts, 1e-12)
    for one, other in zip(whole, parts, strict=True):
        assert float(one.stats.evaluations) == pytest.approx(
            float(other.stats.evaluations), rel=1e-12
        )
        if one.stats.linear is not None and one.stats.inner is not None:
            for name in (
                "gradient_norm",
                "products",
                "linear_result",
            ):  # bounds far from a minimum can be any size
                numbers = one.stats.linear[name]
                torch.testing.assert_close(numbers, other.stats.linear[name], rtol=1e-9, atol=1e-9)
            assert bool((one.stats.inner.result == other.stats.inner.result).all())


@pytest.mark.usefixtures("uncompiled")
def test_a_captured_step_in_chunks_is_the_step() -> None:
    chosen = vm.Joint("normal", expectation="monte_carlo", num_particles=2)
    model, tasks = net_model(PRIOR), ragged_tasks(7)
    whole = steps(lambda *args: eager(chosen, *args), model, tasks, chosen)
    step = Step(chosen, True, 1, 3)
    assert_same(whole, steps(step, model, tasks, chosen), 1e-12)
    assert step.compiled


@pytest.mark.parametrize(
    "strategy",
    [vm.Joint("normal", adapt_steps=50), vm.Implicit("delta", "query"), vm.Unrolled("delta")],
    ids=repr,
)
def test_adaptation_in_chunks(strategy: vm.Strategy) -> None:
    fit = vm.fit(
        net_model(vm.GaussianPrior(3.0)), ragged_tasks(7), strategy, 5, adam, progress=False
    )
    whole, parts = fit.adapt(fit.tasks), fit.adapt(fit.tasks, task_chunk_size=2)
    for name, value in whole.q.phi.items():
        torch.testing.assert_close(value, parts.q.phi[name], rtol=1e-9, atol=1e-9)


def test_a_fit_in_chunks_is_the_fit() -> None:
    fits = [
        vm.fit(
            net_model(PRIOR),
            ragged_tasks(7),
            vm.Joint("normal"),
            20,
            adam,
            task_chunk_size=size,
            progress=False,
        )
        for size in (None, 1, 4)
    ]
    for other in fits[1:]:
        assert other.loss == pytest.approx(fits[0].loss, rel=1e-10)
        for name, value in fits[0].eta.items():
            torch.testing.assert_close(value, other.eta[name], rtol=1e-9, atol=1e-9)


def test_a_certificate_names_the_tasks_of_all_chunks() -> None:
    model, tasks = net_model(vm.GaussianPrior(3.0)), ragged_tasks(7)
    strategy = vm.Implicit("delta", "query")
    whole = vm.meta_gradient(model, tasks, strategy)
    parts = vm.meta_gradient(model, tasks, strategy, task_chunk_size=3)
    assert parts.certificate is not None
    assert parts.certificate.ok
    assert parts.certificate.names == tuple(tasks.names)
    assert len(parts.certificate.decrement) == 7
    for name, gradient in whole.grads.items():
        torch.testing.assert_close(gradient, parts.grads[name], rtol=1e-6, atol=1e-9)


def test_many_tasks_are_taken_in_chunks_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = net_model(PRIOR), ragged_tasks(30)
    strategy = vm.Implicit("delta", "query")
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = model.init(batch.support.x.new_zeros(()))
    assert chunks.in_memory(strategy, problem, batch, eta) == 30
    monkeypatch.setattr(chunks, "FEW", 0)
    assert chunks.in_memory(strategy, problem, batch, eta) == 30
    sizes = []
    for budget in (120_000, 60_000, 100):
        monkeypatch.setattr(chunks, "MEMORY", budget)
        sizes.append(chunks.in_memory(strategy, problem, batch, eta))
    assert 30 > sizes[0] >= 2 * sizes[1] > sizes[2] == 1
    deep = vm.Unrolled("delta", inner_steps=20)
    monkeypatch.setattr(chunks, "MEMORY", 120_000)
    assert chunks.in_memory(deep, problem, batch, eta) < sizes[0]


def test_a_chunk_of_images_is_as_large_as_memory_that_is_used_again() -> None:
    """Of a convolution on many pixels four tasks at a time took half the time of sixteen."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, 64, 64, generator=generator)
    y = torch.tensor([0, 1] * 4)
    tasks = vm.TaskSet([vm.Task((x[:2], y[:2]), (x, y)) for _ in range(64)])
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    body = nn.Sequential(net, nn.Linear(16, 2))
    model = vm.TaskModel(body, vm.likelihoods.Categorical(2), shared=["0.*"])
    batch, strategy = tasks.batch(), vm.Unrolled()
    problem, eta = strategy.problem(model, tasks, 0), model.init(batch.support.x.new_zeros(()))
    # 8 queries of 16 channels of 64 x 64 numbers of 4 bytes are 2 MiB
    assert chunks.in_memory(strategy, problem, batch, eta) == 16
    few = tasks[:2].batch()
    assert chunks.in_memory(strategy, problem, few, eta) == 2


def test_a_conv4_takes_four_episodes_at_a_time() -> None:
    """32 channels of 28 x 28 for each of 75 query images; sixteen took 1.3 to 1.7 times as long."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) // 20
    images = torch.rand(100, 1, 28, 28, generator=generator)
    tasks = vm.episodes(images, labels, ways=5, shots=1, queries=15).take(16)

    def block(channels: int) -> list[nn.Module]:
        norm = nn.GroupNorm(4, 32)
        return [nn.Conv2d(channels, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]

    net = nn.Sequential(
        *block(1), *block(32), *block(32), *block(32), nn.Flatten(), nn.Linear(32, 5)
    )
    model = vm.TaskModel(net, vm.likelihoods.Categorical(5), vm.GaussianPrior(1.0))
    strategy, batch = vm.Unrolled("delta", "query", 1, vm.GradientDescent(0.01)), tasks.batch()
    problem, eta = strategy.problem(model, tasks, 0), model.init(batch.support.x.new_zeros(()))
    assert chunks.in_memory(strategy, problem, batch, eta) == 4


@pytest.mark.parametrize(("tasks", "sizes"), [(60, [20] * 3), (59, [19, 20, 20]), (40, [40])])
def test_chunks_of_a_compiled_step(
    tasks: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, all_tasks = net_model(PRIOR), ragged_tasks(tasks)
    strategy, batch = vm.Unrolled(), all_tasks.batch()
    problem, eta = strategy.problem(model, all_tasks, 0), model.init(batch.support.x.new_zeros(()))
    monkeypatch.setattr(chunks, "CACHE", 20 * 8 * model.weights.size)
    size = chunks.in_cache(strategy, problem, batch, eta)
    assert [len(part) for part in chunks.split(batch, size)] == sizes
    assert [name for part in chunks.split(batch, size) for name in part.names] == list(
        all_tasks.names
    )
    assert (
        chunks.in_cache(vm.Joint(), problem, batch, eta) == tasks
    )  # one gradient: nothing to keep
    monkeypatch.setattr(chunks, "FEW", 0)
    monkeypatch.setattr(
        chunks, "in_memory", lambda *args: 20
    )  # and more than memory holds: chunks alike, or two are compiled
    size = chunks.in_cache(vm.Joint(), problem, batch, eta)
    assert [len(part) for part in chunks.split(batch, size)] == {40: [20, 20]}.get(tasks, sizes)
    monkeypatch.setattr(chunks, "in_memory", lambda *args: 7)  # less than the cache would hold
    assert chunks.in_cache(strategy, problem, batch, eta) <= 7


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (2.5, ValueError), ("all", TypeError)]
)
def test_a_chunk_size_is_a_whole_number(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="task_chunk_size"):
        vm.fit(net_model(PRIOR), ragged_tasks(3), task_chunk_size=size)


def test_features_go_with_their_tasks() -> None:
    tasks = vm.TaskSet(
        [vm.Task(t.support, t.query, t.name, {"z": k / 7}) for k, t in enumerate(ragged_tasks(7))]
    )
    model = net_model(vm.GaussianPrior(3.0, covariates=["z"]))
    strategy = vm.Implicit("delta", "query")
    whole = vm.meta_gradient(model, tasks, strategy)
    parts = vm.meta_gradient(model, tasks, strategy, task_chunk_size=2)
    for name, gradient in whole.grads.items():
        torch.testing.assert_close(gradient, parts.grads[name], rtol=1e-6, atol=1e-9)


def test_several_outputs_take_room_in_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a row of a task's design, and has columns of its own; only rows of x were counted."""
    strategy, sizes = vm.Joint("multivariate_normal"), []
    for outputs in (1, 8):
        y = torch.zeros(5, outputs)
        tasks = vm.TaskSet([vm.Task((torch.zeros(5, 1), y)) for _ in range(200)])
        model = vm.TaskModel(torch.nn.Linear(1, outputs), vm.likelihoods.Gaussian(), PRIOR)
        problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
        monkeypatch.setattr(chunks, "MEMORY", 64 * 2 * (5 + 1 + 2) * 100)  # 100 tasks of one output
        sizes.append(
            chunks.in_memory(strategy, problem, batch, model.init(batch.support.x.new_zeros(())))
        )
    # 16 columns by 48 + 16 rows, where one output has 2 by 8
    assert sizes == [100, 1]
