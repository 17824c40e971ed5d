"""An embedding is given whole numbers, whatever x is kept as."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import adam, seeded
from varmeta.models.check import check_model
from varmeta.models.tokens import check_tokens

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


def many(rows: int, odd: int | None = None) -> vm.TaskSet:
    """Tokens in two columns, one of them half of one in row `odd`."""
    x = TOKENS.repeat(rows // 4, 1).double()
    if odd is not None:
        x[odd, 1] += 0.5
    y = torch.zeros(rows, dtype=torch.float64)
    return vm.TaskSet([vm.Task((x, y)), vm.Task((TOKENS, Y))])


def test_every_row_is_looked_at_and_few_are_run_to_the_end() -> None:
    ran: list[int] = []

    class Counted(Words):
        def forward(self, x: Tensor) -> Tensor:
            both = self.table(x[..., :1]) + self.table(x[..., 1:])
            ran.append(len(x))
            return self.out(torch.tanh(both).mean(-2))

    model = model_of(seeded(Counted))
    with pytest.raises(ValueError, match=r"layer 'table' \(Embedding\) is given 0.5"):
        check_model(model, many(12_000, odd=11_999))
    assert ran == [16]
    ran.clear()
    check_tokens(model.net, many(12_000).batch().support, lambda x: model.net(x))  # type: ignore[misc]
    assert ran == [16]


def test_tokens_that_single_precision_may_have_rounded_are_refused() -> None:
    """A table of so many rows is 64 MiB; its layer alone is asked."""
    table = nn.Embedding(2**24 + 2, 1)
    x = torch.tensor([[2.0**24 - 1], [2.0**24]])
    y = torch.zeros(2)
    alone = nn.Sequential(table)
    for dtype, lost in ((torch.float64, False), (torch.float32, True)):
        data = vm.TaskSet([vm.Task((x.to(dtype), y.to(dtype)))]).batch().support
        message = r"layer '0' \(Embedding\) is given 16777216 in float32, .* use float64"
        with pytest.raises(ValueError, match=message) if lost else nullcontext():
            check_tokens(alone, data, lambda x: alone(x.long() if x.dtype == torch.float64 else x))
