"""Networks and programs of every shape through `TaskModel`, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from tests.common import F64, problem, randn, start, with_grad
from varmeta.models.check import check_model

GAUSSIAN = vm.likelihoods.Gaussian(0.7)


def tasks_of(*shape: int, sizes: tuple[int, ...] = (3, 1, 2)) -> vm.TaskSet:
    return vm.TaskSet(
        [vm.Task((randn(n, *shape, seed=i), randn(n, seed=9 + i))) for i, n in enumerate(sizes)]
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).reshape(-1, 1, 2, 2)
        return self.out(nn.functional.scaled_dot_product_attention(h, h, h).reshape(-1, 4))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = (
            nn.TransformerEncoderLayer(2, 1, 3, batch_first=True),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.reshape(-1, 2, 2)).reshape(-1, 4))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


def frozen() -> nn.Module:
    norm = nn.BatchNorm1d(3)
    norm.running_mean, norm.running_var = (
        torch.tensor([0.1, 0.2, 0.3]),
        torch.tensor([1.0, 2.0, 3.0]),
    )
    return nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh(), nn.Linear(3, 1))


# name: network, features of a row, options
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)
        ),
        (1, 3, 3),
        {},
    ),
    "layer_norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU(), nn.Linear(3, 1)),
        (4,),
        {},
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.Linear(3, 1)), (4,), {}),
    "shared_body": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)),
        (4,),
        {"shared": ["0.*"]},
    ),
    "tied": (Tied, (4,), {}),
    "attention": (Attention, (4,), {}),
    "transformer": (Transformer, (4,), {}),
    "frozen_batch_norm": (frozen, (4,), {"batch_norm": "frozen"}),
}


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented"
)
@pytest.mark.parametrize("name", NETS)
def test_a_network_under_vmap_is_the_network(name: str) -> None:
    """Outputs of all tasks at once against the network itself, task by task; and Hessian products
    exist.
    """
    make, features, options = NETS[name]
    net, tasks = seeded(make), tasks_of(*features)
    model = vm.TaskModel(
        net, vm.likelihoods.Gaussian(0.7, learn_scale=False), vm.GaussianPrior(2.0), **options
    )
    check_model(model, tasks)  # no warning: it can be differentiated twice
    batch, eta = tasks.batch(), start(model)
    made = problem(model, "delta")
    phi = with_grad(made.start(batch, eta))
    nll = made.objective.terms(phi, eta, batch.support, torch.zeros(1, 1, 1, dtype=F64))[1][0]
    net.eval()
    for index, task in enumerate(tasks):
        assert task.support is not None
        x, y = task.support
        expected = -dist.Normal(net(x).squeeze(-1), 0.7).log_prob(y).sum()
        torch.testing.assert_close(nll[index], expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(nll.sum(), phi["loc"], create_graph=True)
    direction = randn(*gradient.shape, seed=3)
    (product,) = torch.autograd.grad((gradient * direction).sum(), phi["loc"])
    step = 1e-5
    ends = []
    for sign in (1, -1):
        point = {"loc": (phi["loc"] + sign * step * direction).detach().requires_grad_()}
        loss = made.objective.terms(point, eta, batch.support, torch.zeros(1, 1, 1, dtype=F64))[
            1
        ].sum()
        ends.append(torch.autograd.grad(loss, point["loc"])[0])
    torch.testing.assert_close(product, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


def test_the_callers_network_is_left_alone() -> None:
    net = frozen().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    check_model(vm.TaskModel(net, GAUSSIAN, batch_norm="frozen"), tasks_of(4))
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_shared_parameters_are_no_weights() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    model = vm.TaskModel(net, GAUSSIAN, shared=["0.*", "2.bias"])
    assert model.shared == ("0.weight", "0.bias", "2.bias")
    assert model.weights.names == ("2.weight",)
    assert set(model.init(torch.zeros(()))) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "log_scale",
    }


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: vm.TaskModel(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), GAUSSIAN),
            ValueError, "GroupNorm",
        ),
        (
            lambda: vm.TaskModel(
                nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), GAUSSIAN,
                batch_norm="frozen",
            ),
            ValueError, "layer '0' keeps no running statistics",
        ),
        (
            lambda: vm.TaskModel(nn.Linear(1, 1), GAUSSIAN, batch_norm="keep"),
            ValueError, "batch_norm must be",
        ),
        (lambda: vm.TaskModel(nn.Tanh(), GAUSSIAN), ValueError, "no parameters"),
        (lambda: vm.TaskModel(nn.Linear(1, 1), GAUSSIAN, shared=["nose"]), ValueError, "matches "
            "none"),
        (lambda: vm.TaskModel(nn.Linear(1, 1), GAUSSIAN, shared=["*"]), ValueError, "every "
            "parameter is shared"),
        (lambda: vm.TaskModel(nn.Linear(1, 1), GAUSSIAN, shared="bias"), TypeError, "list of "
            "patterns"),
        (lambda: vm.TaskModel(lambda x: x, GAUSSIAN), TypeError, "from_pyro"),
        (lambda: vm.TaskModel(nn.Linear(1, 1), "gaussian"), TypeError, "varmeta.likelihoods"),
        (lambda: vm.TaskModel.from_pyro(None, {"a": ()}), TypeError, "callable"),
        (lambda: vm.TaskModel.from_pyro(print, {}), ValueError, "at least one parameter"),
        (lambda: vm.TaskModel.from_pyro(print, {"log_scale": ()}), ValueError, "rename it"),
        (lambda: vm.TaskModel.from_pyro(print, {"log_precision.a": ()}), ValueError, "rename it"),
        (lambda: vm.TaskModel.from_pyro(print, {"prior_tril": ()}), ValueError, "rename it"),
    ],
)  # fmt: skip
def test_models_that_are_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_the_layer_that_does_not_run_is_named() -> None:
    class Own(nn.LSTM):
        """May do anything."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.out = Own(4, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.memory(x)[0])

    with pytest.raises(ValueError, match="layer 'memory' is recurrent .Own.*no batching rule"):
        vm.TaskModel(Recurrent().double(), GAUSSIAN)
    wrong = vm.TaskModel(
        nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(5, 1)).double(), GAUSSIAN
    )
    with pytest.raises(ValueError, match="layer '2' takes 5 columns, its input has 3$"):
        check_model(wrong, tasks_of(4))
    conv = vm.TaskModel(nn.Sequential(nn.Tanh(), nn.Conv1d(5, 2, 1)).double(), GAUSSIAN)
    with pytest.raises(ValueError, match="in layer '1', Conv1d") as caught:
        check_model(conv, tasks_of(4))
    assert "Trace Shapes" not in str(caught.value)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented"
)
def test_the_layer_without_a_second_derivative_is_named() -> None:
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.reshape(1, 1, -1, 2)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(h, h, h)[0].reshape(
                -1, 2
            )

    net = nn.Sequential(nn.Linear(4, 2), nn.Sequential(Fused()), nn.Linear(2, 1)).double()
    with pytest.warns(RuntimeWarning, match="layer '1.0' .Fused. cannot be differentiated twice"):
        check_model(vm.TaskModel(net, GAUSSIAN), tasks_of(4, sizes=(3, 3)))


# -- programs --------------------------------------------------------------------------------------


def linear(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    mean = params["intercept"] + (params["slopes"] * x).sum(-1)
    return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)


def test_a_program_with_scalar_vector_and_shared_params() -> None:
    slopes = randn(3, seed=5)
    params = {"intercept": (), "slopes": slopes, "log_sd": torch.tensor(0.3)}
    model = vm.TaskModel.from_pyro(linear, params, shared=["log_sd"])
    tasks = tasks_of(3)
    check_model(model, tasks)
    assert model.weights.labels == ("intercept", "slopes[0]", "slopes[1]", "slopes[2]")
    batch, eta = tasks.batch(), start(model)
    made = problem(model, "delta")
    nll = made.objective.terms(
        made.start(batch, eta), eta, batch.support, torch.zeros(1, 1, 1, dtype=F64)
    )[1][0]
    sd = float(torch.tensor(0.3).exp())
    for index, task in enumerate(tasks):
        assert task.support is not None
        x, y = task.support
        assert float(nll[index]) == pytest.approx(
            -float(dist.Normal(x @ slopes, sd).log_prob(y).sum()), rel=1e-6
        )


def positive(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    """Infinite at x = 0, and a density that is infinite at y = 0: what padding is filled with."""
    return pyro.sample("y", dist.Gamma(params["shape"].exp(), x.log().exp() / x.sqrt()), obs=y)


def test_padding_need_not_be_in_the_support_of_a_program() -> None:
    sizes = (3, 1, 0)
    tasks = vm.TaskSet([vm.Task((randn(n).exp(), randn(n, seed=1).exp())) for n in sizes])
    model = vm.TaskModel.from_pyro(positive, {"shape": ()})
    check_model(model, tasks)
    for guide in ("delta", "normal"):
        made, eta, batch = problem(model, guide), with_grad(start(model)), tasks.batch()
        phi = with_grad(made.start(batch, eta))
        losses = made.losses("elbo", batch, 0)(phi, eta)
        for gradient in torch.autograd.grad(losses.sum(), [*phi.values(), *eta.values()]):
            assert bool(torch.isfinite(gradient).all())


def test_a_program_outside_its_support_names_task_and_row() -> None:
    tasks = vm.TaskSet(
        [vm.Task((randn(2).exp(), torch.tensor(y, dtype=F64))) for y in ([1.0, 2.0], [1.0, -2.0])]
    )
    model = vm.TaskModel.from_pyro(positive, {"shape": ()})
    with pytest.raises(
        ValueError, match=r"task 'task 1', row 1: y = -2.0 is outside the support of Gamma"
    ):
        check_model(model, tasks)


def mixed_up(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    pyro.sample("y", dist.Normal(params["a"].squeeze(-1) + x[..., 0], 1.0), obs=y)


def latent(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    sd = pyro.sample("sd", dist.LogNormal(params["a"], 1.0))
    pyro.sample("y", dist.Normal(params["a"] + 0 * x[..., 0], sd), obs=y)


def silent(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    pyro.deterministic("mean", params["a"] + x[..., 0])


def summed(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    assert y is not None
    pyro.factor("all", -(y - params["a"]).square().sum((-1, -2, -3)))


def own_param(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    sd = pyro.param("sd", torch.tensor(1.0, dtype=F64))
    pyro.sample("y", dist.Normal(params["a"] + 0 * x[..., 0], sd), obs=y)


def unused(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (mixed_up, r"x \(3, 4, 2\), y \(3, 4\)|params broadcast as"),
        (latent, "samples 'sd' without observing it"),
        (silent, "observes nothing"),
        (summed, "params broadcast as|does not run"),
        (own_param, r"calls pyro.param for \['sd'\]: name them in params"),
        (unused, "params broadcast as"),
    ],
)
def test_programs_that_are_refused(program: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_model(vm.TaskModel.from_pyro(program, {"a": ()}), tasks_of(2, sizes=(4, 1, 2)))


def test_tasks_without_any_data_pass_the_check_and_have_only_a_prior() -> None:
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), GAUSSIAN)
    tasks = vm.TaskSet([vm.Task(name="a"), vm.Task(name="b")], dtype=F64)
    check_model(model, tasks)
    made, eta = problem(model, "normal"), start(model)
    losses = made.losses("elbo", tasks.batch(), 0)(made.start(tasks.batch(), eta), eta)
    torch.testing.assert_close(losses, torch.zeros(2, dtype=F64), rtol=0, atol=1e-15)
