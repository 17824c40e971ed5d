"""Recurrent layers run by their formulas: PyTorch's own numbers, for many tasks at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, seeded
from varmeta.models.recurrent import unroll_recurrent_layers

F64 = torch.float64
LAYERS: dict[str, Any] = {
    "rnn": lambda: nn.RNN(3, 4),
    "relu, no bias": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", bias=False, batch_first=True),
    "lstm": lambda: nn.LSTM(3, 4),
    "deep lstm": lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.3),
    "projections": lambda: nn.LSTM(3, 4, 2, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "deep gru": lambda: nn.GRU(3, 4, 3, bidirectional=True, dropout=0.3),
}


def flat(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in flat(part)]


def assert_same(one: Any, other: Any, at: list[Tensor], others: list[Tensor]) -> None:
    """Values, and the gradient of a sum of them that tells all apart."""
    weights = [torch.linspace(-1.0, 2.0, v.numel(), dtype=F64).view_as(v) for v in flat(one)]
    gradients = []
    for out, point in ((one, at), (other, others)):
        value = sum((w * v).sum() for w, v in zip(weights, flat(out), strict=True))
        gradients.append(torch.autograd.grad(value, point))
    for a, b in zip([*flat(one), *gradients[0]], [*flat(other), *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_the_formulas_are_pytorchs(name: str, begin: bool, alone: bool) -> None:
    plain = seeded(LAYERS[name]).eval()
    ours = copy.deepcopy(plain)
    unroll_recurrent_layers(ours)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*((5,) if alone else (5, 2)), 3, generator=generator, dtype=F64)
    x = x.transpose(0, 1) if plain.batch_first and not alone else x
    x.requires_grad_()
    batch = () if alone else (2,)
    count = plain.num_layers * (1 + plain.bidirectional)
    sizes = [plain.proj_size or 4] + [4] * isinstance(plain, nn.LSTM)
    state = [torch.randn(count, *batch, n, generator=generator, dtype=F64) for n in sizes]
    hx = (state[0] if len(state) == 1 else tuple(state)) if begin else None
    points = [[x, *module.parameters()] for module in (ours, plain)]
    assert_same(ours(x, hx), plain(x, hx), *points)


CELLS: dict[str, Any] = {
    "lstm": lambda: nn.LSTMCell(3, 4),
    "rnn": lambda: nn.RNNCell(3, 4, bias=False),
    "relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(3, 4),
}


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_the_cells_are_pytorchs(name: str, begin: bool) -> None:
    plain = seeded(CELLS[name])
    ours = copy.deepcopy(plain)
    unroll_recurrent_layers(ours)
    x, h = (torch.randn(2, n, generator=torch.Generator().manual_seed(n), dtype=F64)
            for n in (3, 4))  # fmt: skip
    hx = None if not begin else (h, -h) if name == "lstm" else h
    # a state of zeros gives the weights on it no gradient, in both
    assert_same(ours(x, hx), plain(x, hx), list(ours.parameters()), list(plain.parameters()))


def test_every_recurrent_layer_runs_by_its_formula() -> None:
    """PyTorch's kernel of nn.GRUCell would be run for one task after another, with a warning."""
    for make in (*LAYERS.values(), *CELLS.values()):
        module = make()
        kind = type(module)
        unroll_recurrent_layers(module)
        assert type(module) is not kind and isinstance(module, kind)


H = torch.zeros(1, 2, 4)
MISGIVEN: dict[str, Any] = {
    "features": (nn.LSTM, (torch.zeros(5, 2, 2), None), "expected 3"),
    "dimensions": (nn.GRU, (torch.zeros(5, 2, 2, 3), None), "2 or 3 dimensions, not 4"),
    "no steps": (nn.RNN, (torch.zeros(0, 2, 3), None), "no steps"),
    "a tensor for a pair": (nn.LSTM, (torch.zeros(5, 2, 3), H), "a pair of tensors"),
    "a pair for a tensor": (nn.GRU, (torch.zeros(5, 2, 3), (H, H)), "a tensor"),
    "a batch of one": (
        nn.LSTM,
        (torch.zeros(5, 2, 3), (H[:, :1], H[:, :1])),
        "a hidden state has the shape",
    ),
}


@pytest.mark.parametrize("what", MISGIVEN)
def test_what_pytorchs_layer_refuses_is_refused(what: str) -> None:
    make, given, sentence = MISGIVEN[what]
    module = make(3, 4)
    with pytest.raises((RuntimeError, ValueError, AttributeError, IndexError)):
        module(*given)
    unroll_recurrent_layers(module)
    with pytest.raises(ValueError, match=sentence):
        module(*given)


class Reader(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.memory, self.out = kind(1, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(x.unsqueeze(-1))[0][:, -1])


def series() -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 4, generator=generator, dtype=F64) for n in (3, 2, 4, 4)]
    return vm.TaskSet([vm.Task((a, a.sum(-1)), (b, b.sum(-1))) for a, b in (parts[:2], parts[2:])])


@pytest.mark.parametrize("shared", [(), ("memory.*",)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_meta_gradient_of_many_tasks_is_the_loops(kind: Any, shared: tuple[str, ...]) -> None:
    net, tasks = seeded(lambda: Reader(kind)), series()
    likelihood = vm.likelihoods.Gaussian(1.0, learn_scale=False)
    model = vm.TaskModel(net, likelihood, vm.GaussianPrior(2.0), shared)
    strategy = vm.Unrolled("delta", "query", 2, vm.GradientDescent(0.05))
    found = vm.meta_gradient(model, tasks, strategy)
    start = {n: v.detach().requires_grad_() for n, v in net.named_parameters()}
    own, total = [n for n in start if n not in model.shared], torch.zeros((), dtype=F64)

    def loss(values: dict[str, Tensor], part: Any) -> Tensor:
        out = torch.func.functional_call(net, values, (part[0],)).squeeze(-1)
        return 0.5 * (out - part[1]).square().sum()

    for task in tasks:
        here = {n: start[n] for n in own}
        for _ in range(2):
            away = sum((here[n] - start[n]).square().sum() for n in own)
            inner = loss(start | here, task.support) + away
            steps = torch.autograd.grad(inner, [here[n] for n in own], create_graph=True)
            here = {n: here[n] - 0.05 * g for n, g in zip(own, steps, strict=True)}
        total = total + loss(start | here, task.query)
    for name, gradient in zip(start, torch.autograd.grad(total, list(start.values())), strict=True):
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-9, atol=1e-10)


def test_a_recurrent_model_fits_and_predicts() -> None:
    model = vm.TaskModel(seeded(lambda: Reader(nn.LSTM)), vm.likelihoods.Gaussian())
    tasks = series()
    fit = vm.fit(model, tasks, vm.Implicit("delta", "query"), 2, adam, progress=False)
    assert fit.adapt(tasks).expected(torch.zeros(2, 4, dtype=F64)).mean.shape == (2, 2)


def test_packed_sequences_are_refused_in_words() -> None:
    layer = nn.GRU(1, 2)
    unroll_recurrent_layers(layer)
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 1), torch.zeros(2, 1)])
    with pytest.raises(ValueError, match="is given a PackedSequence, expected a tensor"):
        layer(packed)
