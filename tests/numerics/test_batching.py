"""Only what cannot be batched is looped over; every other error reaches the caller."""

from __future__ import annotations

import pytest
import torch

from varmeta.numerics.batching import cannot_be_batched
from varmeta.numerics.joint import minimize_jointly
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.rows import rowwise


class Unruled(torch.autograd.Function):
    """The square, without setup_context: no functorch transform takes it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


REFUSED = {
    "control flow": lambda x: x if x.sum() > 0 else -x,
    "item": lambda x: x * x.sum().item(),
    "own function": Unruled.apply,
    "numpy": lambda x: torch.from_numpy(x.numpy() + 1.0),
    "in place": lambda x: torch.zeros_like(torch.empty(4, dtype=torch.float64)).add_(x),
    "mask": lambda x: x[x > 0].sum(),
}


@pytest.mark.parametrize("fn", REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_to_batch_is_looped_over(fn) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rowwise(fn)(x), torch.stack([fn(row) for row in x]))


def test_any_other_error_is_raised_at_once() -> None:
    rows = []

    def broken(x):
        rows.append(x)
        raise RuntimeError("out of memory: 7 GiB were asked for")

    with pytest.raises(RuntimeError, match="7 GiB"):
        rowwise(broken)(torch.zeros(3, 4))
    assert len(rows) == 1
    assert not cannot_be_batched(ValueError("vmap"))


class Broken(torch.autograd.Function):
    """w^2 whose second derivative asks for too much memory; counts how often it is asked for."""

    calls = 0

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w**2

    @staticmethod
    def backward(ctx, g):
        return g * Slope.apply(ctx.saved_tensors[0])


class Slope(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, g):
        Broken.calls += 1
        raise RuntimeError("out of memory: 7 GiB were asked for")


@pytest.mark.parametrize("joint", [True, False])
def test_newton_steps_raise_it_too(joint: bool) -> None:
    phi, Broken.calls = {"w": torch.ones(2, 3, dtype=torch.float64)}, 0

    def losses(phi, eta=None):
        return Broken.apply(phi["w"]).sum(-1)

    with pytest.raises(RuntimeError, match="7 GiB"):
        minimize_jointly(losses, phi, {}) if joint else minimize(losses, phi, NewtonCG())
    assert Broken.calls == 1  # not once more in a slow loop
