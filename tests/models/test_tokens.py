"""An embedding is given whole numbers, whatever x is kept as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, seeded

TOKENS = torch.tensor([[0, 3], [2, 1], [3, 3], [1, 0]])
Y = torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=torch.float64)


class Words(nn.Module):
    """Two words a row, as users of nn.Embedding write it: no `.long()`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(4, 2, **options), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table(x)).mean(-2))


class ByName(Words):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(input=x).mean(-2))


def model_of(net: nn.Module, shared: tuple[str, ...] = ()) -> vm.TaskModel:
    likelihood = vm.likelihoods.Gaussian(1.0, learn_scale=False)
    return vm.TaskModel(net, likelihood, vm.GaussianPrior(2.0), shared)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.int32, torch.float64])
@pytest.mark.parametrize("shared", [(), ("table.*",)])
def test_tokens_of_every_kind_are_looked_up(kind: torch.dtype, shared: tuple[str, ...]) -> None:
    net, x = seeded(lambda: Words(padding_idx=0)), TOKENS.to(kind)
    tasks = vm.TaskSet([vm.Task((x[:2], Y[:2]), (x, Y)), vm.Task((x[1:], Y[1:]), (x, Y))])
    model = model_of(net, shared)
    strategy = vm.Unrolled("delta", "query", 1, vm.GradientDescent(0.1))
    found = vm.meta_gradient(model, tasks, strategy)
    # by hand, a task after another, in plain PyTorch
    total = torch.zeros((), dtype=torch.float64)
    start = {n: v.detach().requires_grad_() for n, v in net.named_parameters()}
    own = [n for n in start if n not in model.shared]
    for rows in (slice(0, 2), slice(1, 4)):
        out = torch.func.functional_call(net, start, (TOKENS[rows],)).squeeze(-1)
        loss = 0.5 * (out - Y[rows]).square().sum()
        steps = torch.autograd.grad(loss, [start[n] for n in own], create_graph=True)
        moved = start | {n: start[n] - 0.1 * g for n, g in zip(own, steps, strict=True)}
        out = torch.func.functional_call(net, moved, (TOKENS,)).squeeze(-1)
        total = total + 0.5 * (out - Y).square().sum()
    expected = torch.autograd.grad(total, list(start.values()))
    for (name, _), gradient in zip(start.items(), expected, strict=True):
        torch.testing.assert_close(found.grads[name], gradient, rtol=1e-9, atol=1e-11)


def test_tokens_by_name_and_a_whole_fit() -> None:
    tasks = vm.TaskSet([vm.Task((TOKENS.numpy(), Y)), vm.Task((TOKENS.flip(0).numpy(), Y))])
    fit = vm.fit(model_of(seeded(ByName)), tasks, vm.Joint("delta"), 3, adam, progress=False)
    found = fit.posterior().expected(np.array([[3, 0]]))
    assert found.mean.shape == (2, 1)


def test_numbers_that_are_no_tokens_are_refused_by_layer() -> None:
    tasks = vm.TaskSet([vm.Task((TOKENS, Y)), vm.Task((TOKENS, Y))])
    scaled, _ = tasks.standardized()
    with pytest.raises(ValueError, match=r"layer 'table' \(Embedding\) is given -?\d.*standardiz"):
        vm.fit(model_of(seeded(Words)), scaled)


def test_a_linear_predictor_of_whole_numbers_takes_them_as_numbers() -> None:
    tasks = vm.TaskSet([vm.Task((TOKENS, Y)), vm.Task((TOKENS.flip(1), Y))])
    model = model_of(vm.LinearPredictor(["a", "b"]))
    assert vm.fit(model, tasks, progress=False).converged


NO_TOKENS = {
    "is given 0.5, expected whole numbers": TOKENS + 0.5,
    "is given 4, but has the rows 0 to 3": TOKENS + 1,
    "is given -1, but has the rows 0 to 3": TOKENS - 1,
}
STEP = vm.FirstOrder("delta", "query", 1, vm.GradientDescent(0.1))


def tasks_of(x: Tensor) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((x.double(), Y), (x.double(), Y), name) for name in "ab"])


@pytest.mark.parametrize("message", NO_TOKENS)
def test_what_is_no_token_is_refused_wherever_it_comes_in(message: str) -> None:
    model, bad = model_of(seeded(Words)), NO_TOKENS[message]
    known = f"layer 'table' \\(Embedding\\) {message}"
    with pytest.raises(ValueError, match=known):
        vm.meta_gradient(model, tasks_of(bad), STEP)

    def stream(step: int, generator: torch.Generator) -> vm.TaskSet:
        return tasks_of(TOKENS if step < 2 else bad)

    with pytest.raises(ValueError, match=known) as caught:
        vm.fit(model, stream, STEP, 4, adam)
    fit = caught.value.fit  # type: ignore[attr-defined]
    assert len(fit.history) == 2
    posterior = fit.adapt(tasks_of(TOKENS))
    for ask in (posterior.predict, posterior.expected):
        with pytest.raises(ValueError, match=known):
            ask([TOKENS.double(), bad.double()])
    assert posterior.expected(TOKENS).mean.shape == (2, 4)
