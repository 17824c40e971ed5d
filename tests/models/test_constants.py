"""Parameters with `requires_grad=False` and an embedding's padding row are constants, whatever the
strategy.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, randn
from varmeta.models.initialised import initialised

GAUSSIAN = vm.likelihoods.Gaussian(0.5)
STRATEGIES: dict[str, vm.Strategy] = {
    "joint": vm.Joint("normal"),
    "reinit": vm.Reinit("normal", every=2),
    "implicit": vm.Implicit("delta", "query"),
    "unrolled": vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.01)),
    "first_order": vm.FirstOrder("delta", "query", 2, vm.GradientDescent(0.01)),
    "reptile": vm.Reptile("delta", inner_steps=2, minimizer=vm.GradientDescent(0.01)),
}


def tasks_of(sizes: tuple[int, ...] = (3, 5), features: int = 2) -> vm.TaskSet:
    def part(n: int, seed: int) -> tuple[Tensor, Tensor]:
        return randn(n, features, seed=seed), randn(n, seed=seed + 50)

    return vm.TaskSet([vm.Task(part(n, i), part(3, i + 20)) for i, n in enumerate(sizes)])


def half_frozen() -> nn.Module:
    net = seeded(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))
    net[0].requires_grad_(False)
    return net


@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_parameters_are_constants(name: str) -> None:
    """A frozen first layer is a head on fixed features: the same fit as of the head alone on those
    features.
    """
    net, tasks = half_frozen(), tasks_of()

    def features(part: Any) -> tuple[Tensor, Tensor]:
        return net[1](net[0](part[0])), part[1]

    alone = vm.TaskSet([vm.Task(features(t.support), features(t.query), t.name) for t in tasks])
    model, head = (
        vm.TaskModel(net, GAUSSIAN),
        vm.TaskModel(nn.Sequential(copy.deepcopy(net[2])), GAUSSIAN),
    )
    assert model.weights.names == ("2.weight", "2.bias")
    assert set(model.init(torch.zeros(()))) == {"2.weight", "2.bias", "log_scale"}
    options: dict[str, Any] = {
        "num_steps": 5,
        "optimizer": lambda p: torch.optim.Adam(p, 0.1),
        "compile": False,
        "progress": False,
    }
    found = vm.fit(model, tasks, STRATEGIES[name], **options)
    expected = vm.fit(head, alone, STRATEGIES[name], **options)
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    torch.testing.assert_close(
        found.eta["2.weight"], expected.eta["0.weight"], rtol=1e-9, atol=1e-12
    )
    posterior = found.adapt(tasks)
    assert posterior.mean.keys() == {"2.weight", "2.bias"}
    torch.testing.assert_close(
        posterior.mean["2.bias"], expected.adapt(alone).mean["0.bias"], rtol=1e-7, atol=1e-9
    )


def test_frozen_parameters_follow_the_precision_of_the_data() -> None:
    model = vm.TaskModel(half_frozen().float(), GAUSSIAN)
    for dtype in (torch.float32, F64):
        tasks = tasks_of().to(dtype)
        assert vm.meta_gradient(model, tasks, vm.Joint("normal")).grads["2.bias"].dtype == dtype


def test_shared_leaves_constants_alone() -> None:
    net = half_frozen()
    net[0].bias.requires_grad_(True)
    assert vm.TaskModel(net, GAUSSIAN, shared=["0.*"]).shared == ("0.bias",)
    with pytest.raises(
        ValueError, match=r"pattern '0.weight' matches only parameters with requires_grad=False"
    ):
        vm.TaskModel(net, GAUSSIAN, shared=["0.weight"])
    with pytest.raises(ValueError, match="every parameter of the network has requires_grad=False"):
        vm.TaskModel(net.requires_grad_(False), GAUSSIAN)


def test_a_fit_is_of_its_constants(tmp_path: Path) -> None:
    """Loaded, and resumed, only with the frozen numbers that it was fitted with, in any
    precision.
    """
    net, tasks = half_frozen(), tasks_of()
    fit = vm.fit(vm.TaskModel(net, GAUSSIAN), tasks, num_steps=2, progress=False, compile=False)
    fit.save(tmp_path / "fit")
    again = vm.load(tmp_path / "fit", vm.TaskModel(net, GAUSSIAN))
    query = [task.query for task in tasks]
    assert fit.posterior().score(query).equals(again.posterior().score(query))
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-3
    other = vm.TaskModel(net, GAUSSIAN)
    with pytest.raises(ValueError, match=r"other numbers in '0.weight', which .* is not learned"):
        vm.load(tmp_path / "fit", other)
    with pytest.raises(ValueError, match=r"other numbers in '0.weight', which .* is not learned"):
        vm.fit(other, tasks, num_steps=3, resume=fit, progress=False)


def test_a_start_drawn_anew_leaves_constants_where_they_are() -> None:
    """Each seed of `compare`, and each member of an ensemble, has the frozen layer itself."""
    net, tasks = half_frozen(), tasks_of((4, 4))
    model = vm.TaskModel(net, GAUSSIAN)
    fresh = initialised(model, 3)
    assert fresh.start.keys() == model.start.keys()
    assert not torch.equal(fresh.start["2.weight"], model.start["2.weight"])
    unrolled = {"one step": STRATEGIES["unrolled"]}
    report = vm.compare(unrolled, model, tasks, tasks, seeds=2, budget=20)
    for fit in report.fits.values():
        assert fit.eta.keys() == {"2.weight", "2.bias", "log_scale"}


@pytest.mark.filterwarnings("ignore:the learned noise scale")  # x does not explain y there
def test_a_regression_with_a_constant_coefficient() -> None:
    """y - x regressed on a constant; its numbers in raw units are not all there."""
    net, raw = nn.Linear(1, 1).double(), vm.datasets.lines(8, num_support=5, noise=0.1, seed=1)
    with torch.no_grad():
        net.weight.fill_(1.0)
    net.weight.requires_grad_(False)
    tasks, scaling = vm.TaskSet(list(raw), x_names=["x"]).standardized()
    prior = vm.GaussianPrior(learn_precision="shared")
    fit = vm.fit(vm.TaskModel(net, GAUSSIAN, prior), tasks, vm.Joint("normal"), progress=False)
    assert fit.prior.labels == ("intercept",)
    left = vm.TaskSet(
        [
            vm.Task((task.support[0], task.support[1] - task.support[0].squeeze(-1)))
            for task in tasks
        ]
    )
    only = vm.TaskModel(vm.LinearPredictor(["x"], offset="x").double(), GAUSSIAN, prior)
    alone = vm.fit(
        vm.TaskModel(vm.LinearPredictor([]).double(), GAUSSIAN, prior),
        _without_x(left),
        progress=False,
    )
    assert fit.loss == pytest.approx(alone.loss, abs=1e-6)
    assert fit.loss == pytest.approx(vm.fit(only, tasks, progress=False).loss, abs=1e-6)
    with pytest.raises(
        ValueError,
        match="raw_prior needs a model whose coefficients are all learned, but 'weight' is a",
    ):
        scaling.raw_prior(fit)


def _without_x(tasks: vm.TaskSet) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((task.support[0][..., :0], task.support[1])) for task in tasks])


class Words(nn.Module):
    def __init__(self, padding_idx: int | None = 0) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(4, 1, padding_idx=padding_idx), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(x.long())).mean(-2))


def sentences(sizes: tuple[int, ...] = (2, 2)) -> vm.TaskSet:
    """Words 0 to 3, the first of them 0, in sentences of two."""

    def part(n: int, seed: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(0, 4, (n, 2), generator=torch.Generator().manual_seed(seed)).to(F64)
        words[0, 0] = 0
        return words, randn(n, seed=seed)

    return vm.TaskSet([vm.Task(part(n, i), part(2, i + 7)) for i, n in enumerate(sizes)])


def words_model() -> vm.TaskModel:
    def make() -> nn.Module:
        net = Words()
        with torch.no_grad():
            net.table.weight[0] = 0.7  # plain PyTorch: whatever it is, it has no gradient
        return net

    return vm.TaskModel(seeded(make), GAUSSIAN, vm.GaussianPrior(2.0))


@pytest.mark.parametrize("outer", ["elbo", "query"])
@pytest.mark.parametrize("guide", ["delta", "normal"])
@pytest.mark.parametrize("kind", [vm.Unrolled, vm.Implicit])
def test_the_padding_row_is_a_constant(kind: Any, guide: Any, outer: str) -> None:
    """Its gradient is 0, as in plain PyTorch, and what the other rows' is, differences of the value
    say.
    """
    steps: dict[str, Any] = (
        {"inner_steps": 1, "minimizer": vm.GradientDescent(0.05)} if kind is vm.Unrolled else {}
    )
    strategy, model, tasks = kind(guide, outer, **steps), words_model(), sentences()
    eta = {name: value.to(F64) for name, value in model.init(torch.zeros((), dtype=F64)).items()}
    found = vm.meta_gradient(model, tasks, strategy, eta=eta).grads["table.weight"]

    def value(row: int, by: float) -> float:
        moved = {name: value.clone() for name, value in eta.items()}
        moved["table.weight"][row] += by
        return vm.meta_gradient(model, tasks, strategy, eta=moved).value

    differences = torch.tensor(
        [(value(row, 1e-4) - value(row, -1e-4)) / 2e-4 for row in range(4)], dtype=F64
    )
    assert float(found[0]) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(found.squeeze(-1), differences, rtol=1e-5, atol=1e-6)


def test_the_padding_row_of_every_task_is_plain_pytorchs() -> None:
    """Two tasks, one step each (K = 1), against a loop over autograd."""
    model, tasks, lr = words_model(), sentences(), 0.05
    theta0 = {name: value.to(F64) for name, value in model.start.items()}
    net = seeded(Words)
    net.load_state_dict(theta0)
    strategy = vm.Unrolled("delta", "elbo", 1, vm.GradientDescent(lr))
    posterior = vm.fit(
        model,
        tasks,
        strategy,
        num_steps=1,
        optimizer=lambda p: torch.optim.SGD(p, 0.0),
        progress=False,
        compile=False,
    ).adapt(tasks)
    for index, task in enumerate(tasks):
        assert task.support is not None
        net.zero_grad()
        x, y = task.support
        (0.5 * ((y - net(x).squeeze(-1)) / 0.5).square().sum()).backward()
        assert float(net.table.weight.grad[0].abs()) == 0.0
        for name, value in net.named_parameters():
            expected = theta0[name] - lr * value.grad
            torch.testing.assert_close(posterior.mean[name][index], expected, rtol=1e-9, atol=1e-12)
