"""Pieces of an algorithm as graphs: the same numbers, the constant work done once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from varmeta.graphs import capture
from varmeta.graphs.pieces import Graphed, at, call, linearize, run
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.tree import Tree


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The captured graphs run operation by operation: nobody waits for a compiler.  What would have
    been compiled.
    """
    graphs: list[Any] = []
    monkeypatch.setattr(
        capture, "compile_graph", lambda graph, examples: graphs.append(graph) or graph
    )
    return graphs


def wells(known: Tensor, phi: Tree) -> Tensor:
    """Two numbers a task, coupled and not quadratic."""
    a, b = phi["a"], phi["b"][:, 0]
    return torch.cosh(a - known) + 0.5 * (b - a.sin()) ** 2 + 0.1 * b**4


def graphed(numbers: Tensor) -> Graphed:
    return Graphed(wells, numbers, {})


NUMBERS = torch.tensor([0.3, -1.0, 2.5], dtype=torch.float64)
START = {
    "a": torch.zeros(3, dtype=torch.float64),
    "b": torch.full((3, 1), 0.7, dtype=torch.float64),
}


@pytest.mark.parametrize("how", [{"steps": 7}, {"steps": None}, {"steps": 0}], ids=str)
@pytest.mark.parametrize(
    "rule",
    [GradientDescent(0.2), Adam(0.1), NewtonCG(), NewtonCG(dense_size=0)],
    ids=lambda rule: str(rule)[:24],
)
def test_minimising_in_pieces_changes_no_digit(
    rule: Any, how: dict[str, Any], compiled: list[Any]
) -> None:
    plain = minimize(lambda phi: wells(NUMBERS, phi), START, rule, tolerance=1e-6, **how)
    pieces = minimize(graphed(NUMBERS), START, rule, tolerance=1e-6, **how)
    assert compiled
    for name, value in plain.value.items():
        assert torch.equal(value, pieces.value[name])
    assert torch.equal(plain.result, pieces.result)
    for name, value in plain.stats.items():
        torch.testing.assert_close(value, pieces.stats[name], rtol=0, atol=0, equal_nan=True)


def test_the_steps_of_a_loop_share_one_graph(compiled: list[Any]) -> None:
    fn = graphed(NUMBERS)
    minimize(fn, START, GradientDescent(0.01), steps=50)
    count = len(compiled)
    assert count == 3  # the start, a step, and the last one, which needs no gradient
    other = Graphed(wells, NUMBERS + 1.0, fn.graphs)
    moved = minimize(other, START, GradientDescent(0.01), steps=50)
    assert len(compiled) == count
    expected = minimize(
        lambda phi: wells(NUMBERS + 1.0, phi), START, GradientDescent(0.01), steps=50
    )
    assert torch.equal(moved.value["a"], expected.value["a"])


def test_steps_that_are_differentiated_are_not_cut() -> None:
    numbers = NUMBERS.clone().requires_grad_()
    ends = [
        minimize(fn, START, GradientDescent(0.2), steps=3, create_graph=True).value["a"].sum()
        for fn in (graphed(numbers), lambda phi: wells(numbers, phi))
    ]
    one, other = (torch.autograd.grad(end, numbers)[0] for end in ends)
    assert torch.equal(one, other) and bool(one.abs().min() > 0)


def curved(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The gradient of fn and its derivative as a map, by autograd."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(fn(point).sum(), point, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, point, v, retain_graph=True)[0]

    return gradient.detach(), product


def test_a_linearised_piece_does_its_constant_work_once(compiled: list[Any]) -> None:
    fn = Graphed(
        lambda known, x: (known * x.exp() * x.roll(1).sin()).sum(-1),
        torch.tensor([2.0, 3.0]).double(),
        {},
    )
    x = torch.tensor([0.3, -0.2], dtype=torch.float64)
    value, product = linearize(fn, curved, x)
    expected, eager = linearize(lambda x: fn(x), curved, x)
    assert torch.equal(value, expected) and isinstance(product, Graphed)
    for v in torch.eye(2, dtype=torch.float64):
        assert torch.equal(run(product, call, v), eager(v))
        assert torch.equal(run(product, call, 2 * v), 2 * eager(v))
    primal, tangent = compiled
    names = [{str(node.target) for node in graph.graph.nodes} for graph in (primal, tangent)]
    assert (
        "aten.exp.default" in names[0]
        and "aten.exp.default" not in names[1]
        and "aten.sin.default" not in names[1]
    )


def test_a_product_that_does_not_depend_on_its_argument_and_a_value_that_is_an_input() -> None:
    def piece(
        fn: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return x, lambda v: torch.zeros_like(x)

    value, product = linearize(
        Graphed(lambda known, x: x, torch.ones(1), {}), piece, torch.tensor([3.0])
    )
    assert value.tolist() == [3.0] and run(product, call, torch.tensor([5.0])).tolist() == [0.0]


def test_last_arguments_can_be_known() -> None:
    fn = Graphed(lambda known, x, y: known * x - y, torch.tensor(2.0), {})
    x, y = torch.tensor(3.0), torch.tensor(1.0)
    for held in (at(fn, y), at(lambda x, y: 2.0 * x - y, y)):
        assert float(held(x)) == float(run(held, call, x)) == 5.0
