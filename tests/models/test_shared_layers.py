"""Layers before all that varies run once a step and once an adaptation, and change no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import ragged_tasks, seeded
from varmeta.fitting import chunks
from varmeta.fitting.adapt import adapt
from varmeta.fitting.compiled_step import Step, eager
from varmeta.models.shared_layers import split
from varmeta.strategies.expectation import MonteCarlo
from varmeta.strategies.strategy import Strategy

SHARED = ("body.*",)


class Body(nn.Module):
    """A body that counts its calls, and whose forward torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 4), nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.dtype == torch.float16 or bool(self.first.weight.dim() == 3):
            raise AssertionError
        return self.second(torch.tanh(self.first(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Skip(Net):
    """The head looks at x too, and at its size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.body(x) * self.scale
        if mask is not None:
            seen = seen * mask
        both = torch.cat([x, torch.tanh(seen)], -1).view(x.size(0), -1)
        return self.head(both) / x.shape[1]


class Convolutions(nn.Module):
    """An image of 4 numbers a row; activations write into what their layer put out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 1)), nn.Conv1d(1, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True),
            nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


NETS = {"deep head": Convolutions, "linear head": Net, "skip": Skip}


def model_of(
    net: str = "linear head",
    likelihood: vm.likelihoods.Likelihood | None = None,
    shared: tuple[str, ...] = SHARED,
) -> vm.TaskModel:
    made = likelihood or vm.likelihoods.StudentT()
    return vm.TaskModel(seeded(NETS[net]), made, vm.GaussianPrior(2.0, "shared"), shared)


@contextmanager
def whole() -> Iterator[None]:
    """Within it every network is run whole, as before there were bodies and heads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vm.TaskModel, "ahead", lambda self, *_: self)
        yield


@pytest.mark.parametrize("name", NETS)
def test_the_parts_are_the_network(name: str) -> None:
    net = seeded(NETS[name])
    parts = split(net, [n for n, _ in net.named_parameters() if n.startswith("head")])
    assert parts is not None
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64).unsqueeze(-1)
    known = parts.body(x)
    for _ in range(2):  # nothing is written into what is kept
        assert torch.equal(parts.head(x, *known), net(x))
    names = {n.partition(".")[0] for n, _ in parts.head.named_parameters()}
    assert "body" not in names
    assert {n.partition(".")[0] for n, _ in parts.body.named_parameters()} <= {"body", "scale"}


class Mixed(Net):
    """What is made of a buffer is made anew in the data's precision."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) @ self.mix.T) * (self.mix[0] / 3.0))


def test_buffers_follow_the_precision_of_the_data() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Mixed()  # in single precision, the tasks in double
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(2.0), SHARED)
    strategy = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.01))
    found = vm.meta_gradient(model, ragged_tasks(), strategy)
    assert model.ahead({}, []) is not model
    with whole():
        expected = vm.meta_gradient(model, ragged_tasks(), strategy)
    for name, gradient in expected.grads.items():
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-12, atol=1e-12)


def test_the_cut_is_before_the_first_layer_that_varies() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    )
    parts = split(net, ["1.0.bias"])
    assert parts is not None
    assert [n for n, _ in parts.body.named_parameters()] == ["0.0.weight", "0.0.bias"]
    # what comes after is run with what varies, shared or not
    assert [n for n, _ in parts.head.named_parameters()][-2:] == ["1.1.weight", "1.1.bias"]


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.body.second.weight = nn.Parameter(self.body.second.weight[:, :3].detach().clone())
        self.head.weight = self.body.second.weight


class Writes(Net):
    def forward(self, x: Tensor) -> Tensor:
        seen = self.body(x)
        return self.head(seen) + seen.mul_(2.0).sum(-1, keepdim=True)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) if bool(x.sum() > 0) else self.body(-x))


@pytest.mark.parametrize("make", [Tied, Writes, Branches])
def test_what_cannot_be_cut_is_run_whole(make: Callable[[], nn.Module]) -> None:
    assert split(make(), ["head.bias"]) is None


def test_without_layers_before_there_is_nothing_to_cut() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
    assert split(net, ["1.weight"]) is None


# -- the same numbers ------------------------------------------------------------------------------

K = vm.GradientDescent(0.05)
STRATEGIES: dict[str, Strategy] = {
    "implicit": vm.Implicit("delta", "query"),
    "implicit, K steps": vm.Implicit("normal", "query", 4, K, vm.CG(max_steps=3), "ignore"),
    "laplace": vm.Implicit("laplace", "elbo"),
    "warm": vm.Implicit("delta", "query", warm_start=True),
    "unrolled": vm.Unrolled("delta", "query", 3, K),
    "made again": vm.Unrolled("delta", "query", 5, K, recompute=True),
    "unrolled normal": vm.Unrolled("normal", "query_predictive", 2, K),
    "first order": vm.FirstOrder("delta", "query", 3, K),
    "reptile": vm.Reptile("delta", inner_steps=3, minimizer=K),
    "joint": vm.Joint("normal"),
    "reinit": vm.Reinit("delta"),
    "stochastic": vm.Stochastic(
        vm.Unrolled("delta", "query"),
        vm.StochasticAlg(temperature=0.2, num_steps=2, num_draws=2, lr=0.02),
    ),
    "one draw": vm.Stochastic(
        vm.Unrolled("delta", "query"),
        vm.StochasticAlg(start_scale=0.3, num_steps=2, num_draws=1, lr=0.02, estimator="pathwise"),
    ),
}


def assert_close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("net", ["linear head", "skip"])
def test_gradients_are_those_of_the_whole_network(name: str, net: str) -> None:
    model, tasks, strategy = model_of(net), ragged_tasks(3), STRATEGIES[name]
    found = vm.meta_gradient(model, tasks, strategy)
    chunked = vm.meta_gradient(model, tasks, strategy, task_chunk_size=2)
    with whole():
        expected = vm.meta_gradient(model, tasks, strategy)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert float(found.grads["body.first.weight"].norm()) > 0
    for other in (found, chunked):
        assert_close(other.grads, expected.grads)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "laplace"])
def test_gradients_are_those_of_differences(name: str) -> None:
    model, tasks, strategy = model_of("deep head"), ragged_tasks(2), STRATEGIES[name]
    found = vm.meta_gradient(model, tasks, strategy)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    for key in ("body.1.weight", "body.2.bias", "head.0.weight"):
        way = torch.randn(eta[key].shape, generator=generator, dtype=torch.float64)
        step = 1e-4
        ends = [
            vm.meta_gradient(model, tasks, strategy, eta=eta | {key: eta[key] + s * way}).value
            for s in (-step, step)
        ]
        slope = (ends[1] - ends[0]) / (2 * step)
        assert float((found.grads[key] * way).sum()) == pytest.approx(slope, rel=2e-6, abs=1e-7)


@pytest.mark.parametrize("outer", ["query", "elbo"])
def test_a_head_in_closed_form_is_as_before(outer: str) -> None:
    y = torch.tensor([0, 1, 0, 1])
    x = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).unsqueeze(-1)
    tasks = vm.TaskSet([vm.Task((x, y), (x.flip(0), y)), vm.Task((x[:2], y[:2]), (x, y))])
    net = seeded(lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)))
    likelihood = vm.likelihoods.LeastSquaresClasses(2)
    model = vm.TaskModel(net, likelihood, shared=["0.*"])
    strategy = vm.Implicit("delta", outer, minimizer=vm.ClosedForm())
    found = vm.meta_gradient(model, tasks, strategy)
    with whole():
        expected = vm.meta_gradient(model, tasks, strategy)
    assert_close(found.grads, expected.grads)


@pytest.mark.parametrize("name", ["implicit", "laplace", "unrolled", "joint", "reptile"])
def test_adaptation_ends_where_it_did(name: str) -> None:
    model, tasks = model_of(), ragged_tasks(3)
    problem = STRATEGIES[name].problem(model, tasks, 0)
    eta = model.init(torch.zeros((), dtype=torch.float64))
    found = adapt(STRATEGIES[name], problem, tasks.batch(), eta, False, 2)
    with whole():
        expected = adapt(STRATEGIES[name], problem, tasks.batch(), eta, False)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-7, atol=1e-8)


# -- how often the body runs -----------------------------------------------------------------------


def calls(model: vm.TaskModel) -> int:
    assert model.net is not None
    return int(model.net.body.calls)


@pytest.mark.parametrize("name", ["implicit", "unrolled", "joint", "laplace"])
def test_the_body_runs_once_for_each_of_support_and_query(name: str) -> None:
    model, tasks, strategy = model_of("skip"), ragged_tasks(3), STRATEGIES[name]
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    state = strategy.init(problem, batch, eta)
    before = calls(model)
    eager(strategy, problem, batch, eta, state)
    # of "elbo" no query is looked at
    assert calls(model) == before + (1 if strategy.outer == "elbo" else 2)
    before, known = calls(model), {n: v.detach() for n, v in eta.items()}
    adapt(strategy, problem, batch, known, False, task_chunk_size=3)
    assert calls(model) == before + 1


@pytest.mark.parametrize("name", ["unrolled", "joint"])
def test_the_value_at_the_end_runs_the_body_once(name: str) -> None:
    model, tasks, strategy = model_of("skip"), ragged_tasks(3), STRATEGIES[name]
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    problem = replace(problem, expectation=MonteCarlo(2)) if name == "joint" else problem
    eta = model.init(batch.support.x.new_zeros(()))
    state, before = strategy.init(problem, batch, eta), calls(model)
    found = chunks.value(strategy, problem, batch, eta, state)
    assert calls(model) == before + (1 if name == "joint" else 2)
    with whole():
        expected = chunks.value(strategy, problem, batch, eta, state)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_step_as_one_graph_has_the_body_once() -> None:
    class Erf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(x)

    net = seeded(lambda: nn.Sequential(nn.Linear(1, 4), Erf(), nn.Linear(4, 1)))
    model = vm.TaskModel(net, vm.likelihoods.StudentT(), shared=["0.*"])
    tasks, strategy = ragged_tasks(2), STRATEGIES["unrolled"]
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    state = strategy.init(problem, batch, eta)
    graph = Step(strategy, True, 1)._prepared(problem, batch, state).traced(0, batch, eta, state)
    erfs = [n for n in graph.graph.nodes if n.target is torch.ops.aten.erf.default]
    assert len(erfs) == 2


def test_pieces_of_an_adaptation_are_given_the_features() -> None:
    model, tasks, strategy = model_of("skip"), ragged_tasks(3), STRATEGIES["implicit"]
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = model.init(batch.support.x.new_zeros(()))
    ahead = replace(problem.ahead(batch, eta), graphed=True)
    before = calls(model)
    losses = ahead.losses("inner", batch, 0)
    phi = {"loc": torch.randn(3, model.weights.size, dtype=torch.float64)}
    expected = problem.losses("inner", batch, 0)(phi, eta)
    assert calls(model) == before + 2  # once for the features, once by the whole network
    assert_close(losses(phi, eta), expected)
    graph = ahead.gradient_graph("inner", batch, eta)
    assert calls(model) == before + 2
    whole_graph = replace(problem, graphed=True).gradient_graph("inner", batch, eta)
    assert len(graph.graph.nodes) < len(whole_graph.graph.nodes)


# -- another eta, other rows, other derivatives ----------------------------------------------------


def test_what_is_known_is_known_at_its_eta_and_rows_alone() -> None:
    model, tasks = model_of(), ragged_tasks(2)
    batch = tasks.batch()
    x = batch.support.filled[0]
    eta = {n: v.requires_grad_() for n, v in model.init(x.new_zeros(())).items()}
    there = model.ahead(eta, [x])
    theta = model.weights.flatten(eta).detach().expand(2, 1, -1)

    def run(eta: dict[str, Tensor], x: Tensor) -> Tensor:
        before = calls(model)
        out = there.output(theta, eta, x)
        count.append(calls(model) - before)
        torch.testing.assert_close(out, model.output(theta, eta, x))
        return out

    count: list[int] = []
    known = run(eta, x)
    assert not run({n: v.detach() for n, v in eta.items()}, x).requires_grad
    run({n: v.detach() + 0.1 for n, v in eta.items()}, x)
    other = {n: v.detach().requires_grad_() for n, v in eta.items()}
    moved = run(other, x)
    run(eta, x.clone())
    assert count == [1, 0, 1, 1, 1]
    names = ["body.first.weight", "body.second.bias"]
    # one may differentiate again, and another copy of eta has its own derivative
    for out, at in ((known, eta), (known, eta), (moved, other)):
        found = torch.autograd.grad(out.square().sum(), [at[n] for n in names], retain_graph=True)
        whole_network = model.output(theta, at, x).square().sum()
        expected = torch.autograd.grad(whole_network, [at[n] for n in names])
        assert_close(found, expected)


def test_frozen_layers_come_before_too() -> None:
    net = seeded(Net)
    net.body.requires_grad_(False)
    model = vm.TaskModel(net, vm.likelihoods.StudentT(), vm.GaussianPrior(2.0))
    tasks, strategy = ragged_tasks(3), STRATEGIES["unrolled"]
    found = vm.meta_gradient(model, tasks, strategy)
    with whole():
        expected = vm.meta_gradient(model, tasks, strategy)
    assert_close(found.grads, expected.grads)
    problem, batch = strategy.problem(model, tasks, 0), tasks.batch()
    eta = {n: v.requires_grad_() for n, v in model.init(batch.support.x.new_zeros(())).items()}
    before = calls(model)
    eager(strategy, problem, batch, eta, strategy.init(problem, batch, eta))
    assert calls(model) == before + 2
