"""Several inputs a row: packed into one x, taken apart in the network, and told of where a dict
comes.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from varmeta.models.shared_layers import split

PARTS = vm.Parts(image=(1, 2, 2), age=(), word=(3,))
F64 = torch.float64


def given(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "word": torch.randint(0, 5, (rows, 3), generator=generator),
        "image": torch.randn(rows, 1, 2, 2, generator=generator, dtype=F64),
        "age": torch.randn(rows, generator=generator, dtype=F64),
    }


class Net(nn.Module):
    """As somebody has it who feeds dicts to his networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(1, 2, 2), nn.Embedding(5, 2)
        self.head = nn.Linear(5, 1)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        seen = torch.tanh(self.conv(x["image"])).flatten(1)
        return self.head(torch.cat([seen, self.table(x["word"]).mean(1), x["age"][:, None]], -1))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(PARTS.unpack(x))


def test_what_is_packed_comes_out_again() -> None:
    dictionary = given(4)
    x = PARTS.pack(dictionary)
    assert x.shape == (4, 8) and x.dtype == F64
    assert torch.equal(x, PARTS.pack(dict(sorted(dictionary.items()))))  # by name, not by order
    for lead in (x, x.reshape(2, 2, 8), x[0]):
        found = PARTS.unpack(lead)
        assert list(found) == ["image", "age", "word"]
        for name, value in dictionary.items():
            shape = (*lead.shape[:-1], *value.shape[1:])
            assert torch.equal(found[name], value.to(F64).reshape(-1, *value.shape[1:])[
                : lead[..., 0].numel()].reshape(shape))  # fmt: skip


@pytest.mark.parametrize(
    ("age", "word", "kind"),
    [
        (np.float32([1, 2]), np.uint8([1, 2]), torch.float32),
        (np.float32([1, 2]), np.float64([1, 2]), F64),
        ([1.0, 2.0], [1, 2], torch.float32),
        (np.uint8([1, 2]), np.uint8([1, 2]), torch.uint8),
        (np.uint8([1, 2]), np.int64([1, 2]), torch.int64),
        ([True, False], [3, 4], torch.int64),
    ],
)
def test_the_dtype_holds_every_part(age: Any, word: Any, kind: torch.dtype) -> None:
    x = vm.Parts(age=(), word=()).pack({"age": age, "word": word})
    assert x.dtype == kind
    assert x.tolist() == [[float(a), float(w)] for a, w in zip(age, word, strict=True)]


def test_a_meta_gradient_and_a_fit_are_those_of_the_network_of_dicts() -> None:
    dictionaries = [given(rows, rows) for rows in (3, 5)]
    y = [torch.linspace(-1.0, 1.0, rows, dtype=F64) for rows in (3, 5)]
    parts = [(PARTS.pack(x), out) for x, out in zip(dictionaries, y, strict=True)]
    tasks = vm.TaskSet([vm.Task(part, part) for part in parts])
    net = seeded(Packed)
    likelihood = vm.likelihoods.Gaussian(1.0, learn_scale=False)
    shared = ["net.conv.*", "net.table.*"]
    model = vm.TaskModel(net, likelihood, vm.GaussianPrior(1e-9), shared)
    strategy = vm.Unrolled("delta", "query", 1, vm.GradientDescent(0.1))
    found = vm.meta_gradient(model, tasks, strategy)
    # by hand, on the dicts themselves
    start = {n: v.detach().requires_grad_() for n, v in net.net.named_parameters()}
    own, total = ["head.weight", "head.bias"], torch.zeros((), dtype=F64)

    def loss(values: dict[str, Tensor], x: dict[str, Tensor], out: Tensor) -> Tensor:
        made = torch.func.functional_call(net.net, values, (x,)).squeeze(-1)
        return 0.5 * (made - out).square().sum()

    for x, out in zip(dictionaries, y, strict=True):
        steps = torch.autograd.grad(loss(start, x, out), [start[n] for n in own], create_graph=True)
        moved = {n: start[n] - 0.1 * g for n, g in zip(own, steps, strict=True)}
        total = total + loss(start | moved, x, out)
    for name, gradient in zip(start, torch.autograd.grad(total, list(start.values())), strict=True):
        torch.testing.assert_close(found.grads[f"net.{name}"], gradient, rtol=1e-6, atol=1e-8)
    fit = vm.fit(model, tasks, strategy, 2, lambda p: torch.optim.Adam(p, 1e-2), progress=False)
    assert fit.adapt(tasks).expected(PARTS.pack(given(2))).mean.shape == (2, 2)


def test_layers_before_those_that_vary_are_run_once_all_the_same() -> None:
    net = Packed()
    assert split(net, ["net.head.weight", "net.head.bias"]) is not None


def slope(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    import pyro
    import pyro.distributions as dist

    age = vm.Parts(age=(), dose=(2,)).unpack(x)["age"]
    return pyro.sample("y", dist.Normal(params["slope"] * age, 1.0), obs=y)


def test_a_program_takes_them_apart_too() -> None:
    x = vm.Parts(age=(), dose=(2,)).pack({"age": [1.0, 2.0], "dose": [[0.0, 1.0], [1.0, 0.0]]})
    tasks = vm.TaskSet([vm.Task((x, [2.0, 4.1])), vm.Task((x, [1.0, 2.2]))])
    model = vm.TaskModel.from_pyro(slope, {"slope": ()})
    fit = vm.fit(model, tasks, num_steps=5, progress=False)
    assert 1.0 < float(fit.eta["slope"]) < 2.1


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a part too few": (
        lambda: PARTS.pack({"image": torch.zeros(2, 1, 2, 2), "age": torch.zeros(2)}),
        ValueError, "lack ['word']",
    ),
    "a part too many": (
        lambda: PARTS.pack(given(2) | {"weight": torch.zeros(2)}), ValueError,
        "'weight', which is none of ['image', 'age', 'word']",
    ),
    "no dict": (lambda: PARTS.pack(torch.zeros(2, 8)), TypeError, "a dict of arrays, not a Tensor"),
    "another shape": (
        lambda: PARTS.pack(given(2) | {"word": torch.zeros(2, 4)}), ValueError,
        "a row of 'word' has shape (4,), expected (3,)",
    ),
    "no rows": (
        lambda: PARTS.pack(given(2) | {"age": torch.tensor(1.0)}), ValueError,
        "'age' is a single number",
    ),
    "other rows": (
        lambda: PARTS.pack(given(2) | {"age": torch.zeros(3)}), ValueError,
        "'age' has 3 rows, but 'image' has 2",
    ),
    "tokens that float32 rounds": (
        lambda: vm.Parts(id=(), age=()).pack({"id": [2**24 + 1], "age": [0.5]}), ValueError,
        "'id', row 0 (counted from 0), is 16777217, which float32 rounds to 16777216",
    ),
    "words": (
        lambda: vm.Parts(age=()).pack({"age": ["old"]}), TypeError, "'age' has dtype <U3",
    ),
    "no parts": (lambda: vm.Parts(), ValueError, "names no part"),
    "a number as a shape": (
        lambda: vm.Parts(age=1), TypeError, "the shape of 'age' must be a tuple, such as (3,)",
    ),
    "a negative size": (lambda: vm.Parts(age=(-1,)), ValueError, "at least 1, not -1"),
    "other columns": (
        lambda: PARTS.unpack(torch.zeros(2, 7)), ValueError,
        "x has 7 columns, but the parts (image, age, word) make 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_or_unpacked_is_refused(case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        make()


SAYS = re.escape(
    "is a dict of several arrays, but a row of x is one: write parts = "
    "vm.Parts(word=(3,), image=(1, 2, 2), age=()), give parts.pack(x), and take it apart in the "
    "network's forward by parts.unpack(x)"
)


def test_a_dict_is_told_what_to_do() -> None:
    x, y = given(4), torch.zeros(4, dtype=F64)
    with pytest.raises(TypeError, match=f"task 'a': support x {SAYS}"):
        vm.TaskSet([vm.Task((x, y), name="a")])
    with pytest.raises(TypeError, match=f"task 'a': query x {SAYS}"):
        vm.TaskSet([vm.Task((PARTS.pack(x), y), (x, y), name="a")])
    with pytest.raises(
        TypeError, match="'a': support y is a dict of several arrays, .* as columns"
    ):
        vm.TaskSet([vm.Task((PARTS.pack(x), {"a": y, "b": y}), name="a")])
    with pytest.raises(TypeError, match="images is a dict of several arrays"):
        vm.episodes(x, torch.arange(4) // 2)
    model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    posterior = vm.fit(model, vm.datasets.lines(2, num_support=3), progress=False).posterior()
    for ask, says in ((x, SAYS), ([x, x], "is a list of dicts, expected one array")):
        with pytest.raises(TypeError, match=f"^x {says}"):
            posterior.predict(ask)
        with pytest.raises(TypeError, match=f"^x {says}"):
            posterior.expected(ask)
    with pytest.raises(TypeError, match=f"x {SAYS}"):
        posterior.score([(x, y), (x, y)])
    # of rows that are dicts, one after another, no shape can be told
    with pytest.raises(TypeError, match=r"support x is a list of dicts.*vm\.Parts\(\.\.\.\)\.pack"):
        vm.TaskSet([vm.Task(([{"a": 1.0}, {"a": 2.0}], [1.0, 2.0]))])
