"""Models whose rows depend on each other: refused where a task would meet its padding, and only
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, randn
from varmeta.models.check import check_model
from varmeta.models.check_rows import rows_meet

GAUSSIAN = vm.likelihoods.Gaussian(0.7)


class Net(nn.Module):
    """A linear layer, an embedding of the first column's sign, and a function of the two."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.table, self.function = nn.Linear(4, 1), nn.Embedding(2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def attention(net: Any, x: Tensor) -> Tensor:
    return net.a(F.scaled_dot_product_attention(x[None], x[None], x[None])[0])


def started_at_zero() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 2), Norm(), nn.Linear(2, 1))
    nn.init.zeros_(net[2].weight)
    return net


MEET: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch_norm": (
        lambda: nn.Sequential(nn.Linear(4, 2), nn.Sequential(Norm()), nn.Linear(2, 1)),
        r"layer "
        r"'1.0' \(Norm\)",
    ),
    "zero_head": (started_at_zero, r"layer '1' \(Norm\)"),
    "mean": (lambda: Net(lambda net, x: net.a(x) + x.mean(0)[:1]), "the network"),
    "mean_of_words": (
        lambda: Net(lambda net, x: net.a(x) + net.table((x[:, 0] > 0).long()).mean(0)),
        "the network",
    ),
    "attention": (lambda: Net(attention), r"the network, before layer 'a' \(Linear\)"),
    "number_of_rows": (lambda: Net(lambda net, x: net.a(x) / len(x)), "the network"),
    "last_row": (
        lambda: Net(lambda net, x: net.a(x - 0.01 * x[-1])),
        "the network, before layer 'a'.*",
    ),
    "cumulated": (
        lambda: Net(lambda net, x: net.a(x.flip(0).cumsum(0).flip(0))),
        "the network, before layer 'a'.*",
    ),
}
APART: dict[str, Callable[[], nn.Module]] = {
    "within_a_row": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.TransformerEncoderLayer(2, 1, 3, batch_first=True),
        nn.Flatten(),
        nn.Linear(4, 1),
    ),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 3, 2),
        nn.GroupNorm(1, 3),
        nn.Flatten(),
        nn.Linear(9, 1),
    ),
    "single_precision": lambda: Net(lambda net, x: net.a(x) + (x.float() @ torch.ones(4, 1)).to(x)),
    "words": lambda: Net(lambda net, x: net.a(x) + net.table((x[:, 0] > 0).long())),
    # a row sees those before it: padding comes after
    "causal": lambda: Net(lambda net, x: net.a(x.cumsum(0))),
}


def tasks_of(*sizes: int, query: int = 0, dtype: torch.dtype = F64) -> vm.TaskSet:
    def part(n: int, seed: int) -> tuple[Tensor, Tensor]:
        return randn(n, 4, seed=seed), randn(n, seed=seed + 50)

    return vm.TaskSet(
        [vm.Task(part(n, i), part(query, 20 + i) if query else None) for i, n in enumerate(sizes)],
        dtype=dtype,
    )


def model_of(make: Callable[[], nn.Module]) -> vm.TaskModel:
    return vm.TaskModel(seeded(make), GAUSSIAN)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", MEET)
def test_rows_that_meet_are_refused_where_tasks_are_padded(name: str, dtype: torch.dtype) -> None:
    make, where = MEET[name]
    model = model_of(make)
    with pytest.raises(
        ValueError, match=f"^{where}: a row's result depends on the task's other rows.* 2 to 5 rows"
    ):
        check_model(model, tasks_of(2, 5, dtype=dtype))
    check_model(
        model, tasks_of(4, 4, query=3, dtype=dtype)
    )  # supports alike and queries alike: no padding
    check_model(model, tasks_of(4, 0, dtype=dtype))  # a task without data has no rows to meet


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", APART)
def test_rows_that_stand_alone_pass(name: str, dtype: torch.dtype) -> None:
    model = model_of(APART[name])
    check_model(model, tasks_of(2, 5, 1, dtype=dtype))
    assert (rows_meet(model, tasks_of(2, 5).batch().support, reorder=True) is None) == (
        name != "causal"
    )


def test_what_is_refused_was_wrong_and_what_passes_is_right() -> None:
    """`a(x) + x.mean(0)` on tasks of 2 and 5 rows: padded, the first task's loss is of other data;
    apart both are right.
    """
    model = model_of(MEET["mean"][0])
    together, eta = tasks_of(2, 5), model.init(torch.zeros((), dtype=F64))

    def nll(tasks: vm.TaskSet) -> Tensor:
        data = tasks.batch().support
        theta = model.weights.flatten(eta).expand(len(tasks), 1, -1)
        out = model.output(theta, eta, data.filled[0]).squeeze(-1)
        return torch.where(data.mask, -dist.Normal(out, 0.7).log_prob(data.y), 0.0).sum(-1)

    alone = torch.cat([nll(together[[i]]) for i in range(2)])
    assert float((nll(together) - alone).abs()[0]) > 0.01
    for row in range(2):
        value = vm.meta_gradient(
            model, together[[row]], vm.Unrolled("delta", "elbo", 1, vm.GradientDescent(1e-12))
        ).value
        constant = (
            0.5 * model.weights.size * math.log(2 * math.pi)
        )  # of the prior's density at theta0
        assert value == pytest.approx(float(alone[row]) + constant, abs=1e-6)


def test_every_verb_that_pads_looks() -> None:
    model, tasks = model_of(MEET["batch_norm"][0]), tasks_of(3, 3, query=3)
    strategy = vm.Joint("normal")
    fit = vm.fit(model, tasks, strategy, num_steps=2, progress=False)
    match = "a row's result depends on the task's other rows"
    ragged = tasks_of(2, 5, query=3)
    for refused in (
        lambda: vm.fit(model, ragged, strategy, num_steps=1, progress=False),
        lambda: vm.meta_gradient(model, ragged, strategy),
        lambda: fit.adapt(ragged),
        lambda: fit.posterior().score([task.support for task in ragged]),
        lambda: fit.posterior().log_prob([task.support for task in ragged]),
        lambda: fit.posterior().predict([task.support[0] for task in ragged]),
        lambda: fit.posterior().expected([task.support[0] for task in ragged]),
    ):
        with pytest.raises(ValueError, match=match):
            refused()
    other_size = tasks_of(5, 5)
    posterior = fit.adapt(other_size)
    posterior.score([task.support for task in other_size])
    posterior.predict([task.support[0] for task in other_size], num_samples=2)
    posterior.predict(other_size[0].support[0], num_samples=2)


def centred(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    mean = params["slope"] * (x - x.mean(-2, keepdim=True))[..., 0]
    return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def plain(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Poisson((params["slope"] * x[..., 0]).exp()), obs=y)


def test_programs_too() -> None:
    model = vm.TaskModel.from_pyro(centred, {"slope": torch.tensor(1.0)})
    with pytest.raises(
        ValueError, match="the program: a row's result depends on the task's other rows"
    ):
        check_model(model, tasks_of(2, 5))
    fit = vm.fit(model, tasks_of(3, 3), num_steps=2, progress=False)
    with pytest.raises(
        ValueError, match="the program: a row's result depends on the task's other rows"
    ):
        fit.posterior().predict([torch.zeros(2, 4), torch.ones(3, 4)])
    counts = vm.TaskSet([vm.Task((randn(n, 4), torch.arange(n))) for n in (2, 5)])
    fit = vm.fit(vm.TaskModel.from_pyro(plain, {"slope": ()}), counts, num_steps=2, progress=False)
    fit.posterior().predict([torch.zeros(2, 4), torch.ones(3, 4)], num_samples=2)


def test_a_minibatch_of_rows_needs_rows_that_stand_alone() -> None:
    """Also in order: a row that sees those before it is right where tasks are padded, and not in a
    minibatch.
    """
    tasks = tasks_of(4, 4, query=3)
    for make in (MEET["mean"][0], APART["causal"]):
        alg = vm.StochasticAlg(3, 0.01, batch_size=2)
        strategy = vm.Stochastic(vm.Unrolled("delta", "query"), alg)
        with pytest.raises(
            ValueError, match="so that a minibatch of them is another problem: leave out"
        ):
            vm.meta_gradient(model_of(make), tasks, strategy)


@pytest.mark.parametrize(("what", "unit"), [("x", 1e160), ("y", 1e160), ("y", 1e-160)])
def test_numbers_without_a_square_are_refused(what: str, unit: float) -> None:
    """They ended in torch's complaint about a covariance."""
    x, y = torch.rand(4, 1, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    task = (unit * x, y) if what == "x" else (x, unit * y)
    tasks = vm.TaskSet([vm.Task((x, y), name="a"), vm.Task(task, name="b"), vm.Task(task)])
    model = vm.TaskModel(
        torch.nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )
    if unit > 1:
        with pytest.raises(ValueError, match=f"number of {what}, in task 'b'.*other units"):
            vm.fit(model, tasks)
    with pytest.raises(ValueError, match=f"number of {what}, in task.*other units"):
        vm.fit(model, tasks[1:])
    with pytest.raises(ValueError, match="has no square in float64"):
        vm.likelihoods.Gaussian(unit)
