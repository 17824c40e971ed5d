"""Dense second derivatives: known ones, however they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from varmeta.numerics.hessian import (
    CHUNK,
    Rows,
    jacobian,
    of_products,
    pulled_back,
    task_hessians,
    vector_hessian,
)

F64 = torch.float64


class _Exp(torch.autograd.Function):
    """exp of a user's own, without a batching rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.exp()
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Tensor:
        (found,) = ctx.saved_tensors
        assert outputs[0].abs().max().item() >= 0.0  # a number, which a batch of vectors has not
        return outputs[0] * _Exp.apply(found.log())  # type: ignore[no-any-return]


@pytest.mark.parametrize("exp", [torch.exp, _Exp.apply], ids=["batched", "one by one"])
@pytest.mark.parametrize("size", [1, 3, CHUNK + 1])
def test_the_hessian_of_an_exponential_of_a_linear_form(exp: Any, size: int) -> None:
    """exp(a'x) has the Hessian exp(a'x) a a', for every task its own."""
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.randn(4, size, generator=generator, dtype=F64) for _ in range(2))
    losses, found = task_hessians(lambda x: exp((a * x).sum(-1)), x)
    expected = (a * x).sum(-1).exp()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(found, expected[:, None, None] * a[:, :, None] * a[:, None, :])
    one = vector_hessian(lambda v: exp(a[0] @ v), x[0])
    torch.testing.assert_close(one, found[0])


def test_rows_remember_that_an_operation_cannot_be_batched() -> None:
    x = torch.ones(2, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(_Exp.apply(x).sum(), x, create_graph=True)
    rows = Rows()
    found = jacobian(gradient, x, rows)
    torch.testing.assert_close(found, torch.e * torch.eye(3, dtype=F64).expand(2, 3, 3))
    assert not rows.batched


def test_what_is_constant_has_a_derivative_of_0() -> None:
    """A linear term's gradient has no graph, a leaf may be left out, and there may be no rows."""
    x, other = (torch.ones(2, 3, dtype=F64, requires_grad=True) for _ in range(2))
    for outputs in ([torch.ones(2, dtype=F64)], [x.square().sum(-1)]):
        one = pulled_back(outputs, [x, other], [torch.ones(2, dtype=F64)])
        many = Rows()(outputs, [x, other], [torch.ones(5, 2, dtype=F64)])
        none = Rows()(outputs, [x, other], [torch.ones(0, 2, dtype=F64)])
        expected = 2.0 * x.detach() if outputs[0].requires_grad else torch.zeros(2, 3, dtype=F64)
        torch.testing.assert_close(one, [expected, torch.zeros(2, 3, dtype=F64)])
        torch.testing.assert_close(many, [p.expand(5, 2, 3) for p in one])
        assert [part.shape for part in none] == [(0, 2, 3)] * 2
    _, flat = task_hessians(lambda x: x.sum(-1), x.detach())
    assert not bool(flat.any())


def test_a_graph_is_kept_where_it_is_asked_for() -> None:
    """d/dx of the Hessian of x^4 / 24 is x."""
    x = torch.tensor([[2.0], [3.0]], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad((x**4 / 24).sum(), x, create_graph=True)
    curvature = jacobian(gradient, x, Rows(), create_graph=True)
    (third,) = torch.autograd.grad(curvature.sum(), x)
    torch.testing.assert_close(third, x.detach())


def test_products_alone_give_the_symmetric_part() -> None:
    a = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]], dtype=F64)
    found = of_products(lambda v: (a @ v[..., None])[..., 0], torch.zeros(1, 2, dtype=F64))
    torch.testing.assert_close(found, torch.tensor([[[2.0, 0.5], [0.5, 3.0]]], dtype=F64))
