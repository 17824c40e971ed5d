"""Rewritten graphs compute the same, without concatenations and copies on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from varmeta.graphs.rewrite import rewrite

SIZES = (40, 40, 240, 6)
SIZE, TASKS, POINTS = sum(SIZES), 3, 5


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(rows: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """A network 1-40-6 whose weights are the parts of rows, with a quadratic prior on the whole
    row, `(tasks,)`.
    """
    w, b, v, c = rows.split(SIZES, -1)
    h = torch.tanh(x @ w.reshape(-1, 40, 1).mT + b.unsqueeze(1))
    out = h @ v.reshape(-1, 6, 40).mT + c.unsqueeze(1)
    return out.sin().sum((1, 2)) + ((rows - centre) / 2.0).square().sum(-1)


def descent(rows: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Three steps of gradient descent, masked as a minimiser's are."""
    active = torch.ones(len(rows), 1, dtype=torch.bool)
    for _ in range(3):
        point = rows.detach().requires_grad_()
        with torch.enable_grad():
            value = losses(point, x, centre)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        rows = torch.where(active, rows - 0.1 * gradient, rows)
        active = active & torch.isfinite(value)[:, None]
    return rows


def curvature(rows: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """A product with the Hessian."""
    point = rows.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(losses(point, x, centre).sum(), point, create_graph=True)
    return torch.autograd.grad(gradient, point, centre.expand_as(point))[0]


def arithmetic(rows: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, ...]:
    """Everything that a row in parts may meet, and what makes it whole again."""
    row = torch.cat([2 * part for part in rows.split(SIZES, -1)], -1)
    wide = row.unsqueeze(0).expand(2, TASKS, SIZE) + centre
    return (
        wide.sum((0, -1)),
        wide.sum(0),
        wide.mean(-1),
        row[:, 40:80],
        row[:, 30:90],
        row[1:],
        row.flip(-1),
        row.mT @ row,
        torch.zeros_like(row),
        (row.exp() + 1).log().reshape(TASKS, 1, SIZE).squeeze(1),
        row.pow(2).sum(-1, keepdim=True),
        row.reshape(-1, 2),
        row * rows.sum(-1, keepdim=True),
        row.cumsum(-1),
        torch.stack([row, rows]).sum(0),
    )


def traced(function: Callable[..., Any], *args: Tensor) -> torch.fx.GraphModule:
    graph = make_fx(function)(*args)
    graph.graph.eliminate_dead_code()
    return graph


@pytest.mark.parametrize("function", [descent, curvature, arithmetic])
def test_the_numbers_stay(function: Callable[..., Any]) -> None:
    args = draws(TASKS, SIZE), draws(TASKS, POINTS, 1, seed=1), draws(SIZE, seed=2)
    graph = traced(function, *args)
    rewrite(graph)
    for seed in (0, 5):
        args = draws(TASKS, SIZE, seed=seed), *args[1:]
        expected, found = function(*args), graph(*args)
        for one, other in zip(
            *([x] if isinstance(x, Tensor) else list(x) for x in (expected, found)), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_steps_neither_join_their_parts_nor_copy_a_transpose() -> None:
    args = draws(TASKS, SIZE), draws(TASKS, POINTS, 1, seed=1), draws(SIZE, seed=2)
    graph = traced(descent, *args)
    before = Counter(str(node.target) for node in graph.graph.nodes)
    rewrite(graph)
    after = Counter(str(node.target) for node in graph.graph.nodes)
    assert before["aten.cat.default"] == 3 and after["aten.cat.default"] == 1  # the output
    assert (
        before["aten.split_with_sizes.default"] == 3 and after["aten.split_with_sizes.default"] == 0
    )
    written = [
        node
        for node in graph.graph.nodes
        if str(node.target) == "aten.transpose.int"
        and any(
            str(user.target) in ("aten.clone.default", "aten.reshape.default")
            for user in node.users
        )
        and node.meta["val"].shape[-2:] == (6, 40)
    ]
    assert not written


def deep(rows: Tensor, x: Tensor, centre: Tensor) -> Tensor:
    """Like `curvature`, of a network with a layer in the middle, whose weights and inputs both have
    derivatives.
    """

    def value(rows: Tensor) -> Tensor:
        w, v, u = (
            rows[..., :40],
            rows[..., 40:280].reshape(-1, 6, 40),
            rows[..., 280:286].reshape(-1, 1, 6),
        )
        h = torch.tanh(torch.tanh(x * w.unsqueeze(1)) @ v.mT)
        return ((h @ u.mT).square().sum((1, 2)) + (rows - centre).square().sum(-1)).sum()

    point = rows.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(value(point), point, create_graph=True)
    (whole,) = torch.cat(
        [torch.autograd.grad(gradient, point, centre.expand_as(point))[0]], -1
    ).split([SIZE], -1)
    return whole


def test_no_product_is_of_two_transposes_and_none_is_copied_transposed() -> None:
    args = draws(TASKS, SIZE), draws(TASKS, POINTS, 1, seed=1), draws(SIZE, seed=2)
    graph = traced(deep, *args)

    def counts() -> dict[str, int]:
        found = Counter[str]()
        for node in graph.graph.nodes:
            name = str(node.target)
            if name == "aten.bmm.default":
                inputs = [x.meta["val"] for x in node.args]
                found["slow"] += all(x.stride(-2) == 1 and min(x.shape[1:]) > 1 for x in inputs)
            if name == "aten.transpose.int" and node.meta["val"].shape[-2:] == (6, 40):
                found["copied"] += any(user.meta["val"].shape[-1] == 240 for user in node.users)
            if name in ("aten.cat.default", "aten.split_with_sizes.default"):
                found["idle"] += len(node.args["split" in name]) == 1
        return +found

    assert counts() == {"slow": 1, "copied": 1, "idle": 2}
    rewrite(graph)
    assert not counts()
    torch.testing.assert_close(graph(*args), deep(*args), rtol=1e-12, atol=1e-12)


def in_parts(*parts: Tensor) -> Tensor:
    """A concatenation that is cut apart again, so that rows are kept in parts."""
    return torch.cat(parts, -1).split([part.shape[-1] for part in parts], -1)[0]


ODD: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "parts of two dtypes": (in_parts, (draws(3, 100).float(), draws(3, 156))),
    "parts that overflow": (
        lambda a, b: (torch.cat([a, b], -1) * 2, in_parts(b, b)),
        (torch.full((3, 100), 100, dtype=torch.int8), draws(3, 156)),
    ),
    "half sums": (
        lambda a: torch.cat([x * 1.0 for x in a.split((100, 100, 100), -1)], -1).sum(-1),
        (torch.tensor([660.0, 0.0, -660.0]).repeat_interleave(100).half().repeat(3, 1),),
    ),
    "memory as it lies": (
        lambda a, b: (a.mT @ b.mT).as_strided((2, 3), (1, 2)),
        (draws(2, 4, 5), draws(2, 6, 4)),
    ),
    "numbers read as others": (
        lambda a, b: (a.mT @ b.mT).view(torch.int64),
        (draws(2, 4, 5), draws(2, 6, 4)),
    ),
    "complex": (lambda a: a * torch.full((3, 1), 1j), (draws(3, 4),)),
    "nothing": (lambda a, b: torch.bmm(a.mT, b.mT), (draws(0, 4, 5), draws(0, 6, 4))),
    "doubled": (
        lambda a, b: ((a @ b.mT) + (a @ b.mT)).mT.reshape(2, -1),
        (draws(2, 4, 5), draws(2, 6, 5)),
    ),
    "integers": (
        lambda a, b: torch.bmm(a.mT, b.mT),
        (torch.arange(40).reshape(2, 4, 5), torch.arange(48).reshape(2, 6, 4)),
    ),
    "several readers": (
        lambda a, b: (lambda c: (c.mT.reshape(2, -1), c.mT, c))(torch.bmm(a, b.mT)),
        (draws(2, 4, 5), draws(2, 6, 5)),
    ),
    "a scaled sum": (
        lambda a, b: torch.add(a.mT @ b, b.mT @ a, alpha=3).mT.reshape(2, -1),
        (draws(2, 4, 5), draws(2, 4, 5)),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_keep_their_numbers_and_dtypes(name: str) -> None:
    function, args = ODD[name]
    graph = traced(function, *args)
    rewrite(graph)
    expected, found = function(*args), graph(*args)
    for one, other in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (expected, found)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sums_of_sums_are_not_multiplied() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        product = torch.bmm(a, b.mT)
        for _ in range(4):
            product = product + product
        return product.mT.reshape(2, -1)

    graph = traced(function, draws(2, 4, 5), draws(2, 6, 5))
    rewrite(graph)
    assert sum(str(node.target) == "aten.bmm.default" for node in graph.graph.nodes) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: (a + torch.zeros_like(a), b),
        lambda a, b: torch.cat([a]),
        lambda a, b: (lambda x: torch.autograd.grad((x * b).sum(), x))(a.detach().requires_grad_()),
        lambda a, b: [(a * b) * torch.ones_like(a), (a * b) + torch.zeros_like(a)],
    ],
    ids=["plus nothing", "one part", "gradient", "one number twice"],
)
def test_outputs_have_memory_of_their_own(function: Callable[..., Any]) -> None:
    def outputs(of: Callable[..., Any]) -> list[int]:
        with torch.enable_grad():
            found = of(*args)
        return [x.data_ptr() for x in (*args, *([found] if isinstance(found, Tensor) else found))]

    args = draws(3, 4), draws(3, 4, seed=1)
    graph = traced(function, *args)
    shared = len(outputs(function)) - len(set(outputs(function)))
    rewrite(graph)
    assert len(outputs(graph)) - len(set(outputs(graph))) == shared


@pytest.mark.parametrize("sizes", [(2, 3), (30,) * 20], ids=["short", "many"])
def test_short_rows_and_rows_of_many_parts_stay_whole(sizes: tuple[int, ...]) -> None:
    def function(row: Tensor) -> Tensor:
        return torch.cat([part.exp() for part in row.split(sizes, -1)], -1).log() + 1.0

    row = draws(TASKS, sum(sizes))
    graph = traced(function, row)
    count = len(graph.graph.nodes)
    rewrite(graph)
    assert len(graph.graph.nodes) == count
    torch.testing.assert_close(graph(row), row + 1.0)


def test_a_graph_that_writes_into_its_tensors_is_left_alone() -> None:
    def function(row: Tensor) -> Tensor:
        new = torch.cat([part + 1 for part in row.split(SIZES, -1)], -1)
        return new.mul_(2.0)

    graph = traced(function, draws(TASKS, SIZE))
    code = graph.code
    rewrite(graph)
    assert graph.code == code


def neutral(rows: Tensor, x: Tensor, centre: Tensor) -> tuple[Tensor, ...]:
    zeros, ones = torch.zeros_like(rows), torch.ones_like(rows)
    return (
        (rows + zeros) * 2,
        (zeros + rows) - 1,
        (rows - zeros) * centre,
        (rows * ones).exp(),
        (rows / ones).sin(),
        zeros - rows,
        ones / rows,
        centre * ones,
        centre + zeros.unsqueeze(0),
        zeros * ones + rows,
    )


def test_plus_zero_and_times_one_are_nothing() -> None:
    inputs = draws(TASKS, SIZE), draws(TASKS, POINTS, 1, seed=1), draws(SIZE, seed=2)
    graph = make_fx(neutral)(*inputs)
    rewrite(graph)
    for found, expected in zip(graph(*inputs), neutral(*inputs), strict=True):
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
    left = Counter(node.target for node in graph.graph.nodes)
    aten = torch.ops.aten
    assert (
        left[aten.add.Tensor] == 0
        and left[aten.zeros_like.default] == left[aten.ones_like.default] == 0
    )
    assert left[aten.mul.Tensor] == 2 and left[aten.div.Tensor] == 1  # those by what is no constant


def test_a_loss_that_only_its_gradient_needed_is_not_taken() -> None:
    def slope(rows: Tensor, x: Tensor, centre: Tensor) -> Tensor:
        point = rows.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(((point - centre) ** 3).sum(), point)[0]

    inputs = draws(TASKS, SIZE), draws(TASKS, POINTS, 1, seed=1), draws(SIZE, seed=2)
    graph = make_fx(slope)(*inputs)
    rewrite(graph)
    torch.testing.assert_close(graph(*inputs), slope(*inputs))
    assert not any(node.target is torch.ops.aten.sum.default for node in graph.graph.nodes)


def spread(log_scale: Tensor, log_precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A KL with one precision for all weights of all tasks, looked at once, and its derivatives."""
    log_scale, log_precision = (x.detach().requires_grad_() for x in (log_scale, log_precision))
    with torch.enable_grad():
        scale = log_scale.exp().unsqueeze(1)
        sd = (-0.5 * log_precision).exp().expand(SIZE).expand(len(log_scale), 1, SIZE)
        once = sd[:1].narrow(-1, 0, 1)
        ratio = scale * once.reciprocal()
        value = (0.5 * ratio.square() - scale.log()).sum(-1) + once.log().sum(-1) * SIZE
        total = value.sum() + once.square().sum()
        return value.detach(), *torch.autograd.grad(total, (log_scale, log_precision))


def test_one_number_for_all_is_never_spread_out() -> None:
    inputs = draws(TASKS, SIZE), torch.tensor(0.3, dtype=torch.float64)
    graph = traced(spread, *inputs)
    aten = torch.ops.aten
    assert sum(node.target is aten.slice_backward.default for node in graph.graph.nodes) >= 2
    rewrite(graph)
    targets = {node.target for node in graph.graph.nodes}
    assert not targets & {aten.slice_backward.default, aten.log.default}
    for found, expected in zip(graph(*inputs), spread(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_logarithm_of_an_exponential_keeps_its_dtype() -> None:
    inputs = (torch.arange(3),)
    graph = traced(lambda n: n.exp().log(), *inputs)
    rewrite(graph)
    assert graph(*inputs).dtype == torch.float32
    torch.testing.assert_close(graph(*inputs), torch.arange(3).float())


def padded(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Zeros but for the first entry, in all that may be done to them."""
    back = torch.ops.aten.slice_backward
    first = back(x, [TASKS, 1, SIZE], 0, 0, 1, 1)  # (1, 1, SIZE) at the first task
    corner = back(back(y, [1, 1, SIZE], 2, 0, 1, 1), [TASKS, 1, SIZE], 0, 0, 1, 1)
    last = back(x, [TASKS, 1, SIZE], 0, 2, 3, 1)  # not the first
    return (
        first.sum(0),
        first.sum([0, 1], True),
        first.sum([0, 2]),
        first.sum(2),
        first.sum(),
        first * 2.0,
        (first + first).sum(0),
        (first + corner).sum(0),
        corner.sum([0, 1], True).reshape(SIZE),
        corner.sum([0, 1], True).reshape(1, SIZE).sum(1),
        corner.sum([0, 1]),
        corner.sum(0).sum(-1),
        (corner + corner).sum([0, 2], True),
        last.sum(0),
        (last + first).sum(0),
        first.sum(0, dtype=torch.float32),
        first.float().sum(0, dtype=torch.float64),
        (first + 1.0).sum(0),
        torch.add(first, first, alpha=2.0).sum(0),
        corner.reshape(TASKS, SIZE).sum(0),
    )


def test_sums_over_what_is_zero_but_for_the_first() -> None:
    inputs = draws(1, 1, SIZE), draws(1, 1, 1, seed=1)
    graph = traced(padded, *inputs)
    rewrite(graph)
    for found, expected in zip(graph(*inputs), padded(*inputs), strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
