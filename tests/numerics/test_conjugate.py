"""The one recursion of conjugate gradients: beside a plain loop, and at a negative curvature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varmeta.numerics.conjugate import ConjugateStep, walked
from varmeta.numerics.solution import Result

F64 = torch.float64


def by_hand(a: np.ndarray, b: np.ndarray, m: np.ndarray, steps: int) -> np.ndarray:
    """Hestenes and Stiefel's loop on one system, with a diagonal preconditioner."""
    x, r = np.zeros_like(b), b.copy()
    p = z = m * r
    for _ in range(steps):
        alpha = (r @ z) / (p @ a @ p)
        x, new = x + alpha * p, r - alpha * (a @ p)
        p = m * new + (new @ (m * new)) / (r @ z) * p
        r, z = new, m * new
    return x


@pytest.mark.parametrize("preconditioned", ["no", "by a function", "by scales"])
@pytest.mark.parametrize("bounded", [False, True])
def test_its_iterates_are_those_of_a_plain_loop(bounded: bool, preconditioned: str) -> None:
    rng = np.random.default_rng(0)
    roots, b = rng.normal(size=(3, 6, 6)), rng.normal(size=(3, 6))
    a = roots @ roots.transpose(0, 2, 1) + np.eye(6)
    diagonal = rng.uniform(0.5, 2.0, size=(3, 6)) if preconditioned != "no" else np.ones((3, 6))
    m, matrix = torch.tensor(diagonal), torch.tensor(a)
    step = ConjugateStep(
        precondition=(lambda v: m * v) if preconditioned == "by a function" else None,
        bounded=bounded,
    )
    more = {"tolerance": torch.zeros(3, dtype=F64), "farthest": torch.full((3,), 1e9, dtype=F64)}
    more |= {"scales": m.sqrt()} if preconditioned == "by scales" else {}
    walk = step.begin(torch.tensor(b), torch.ones(3, dtype=torch.bool), **more)
    walk = walked(lambda v: (matrix @ v[..., None])[..., 0], step, walk, 4)
    for i in range(3):
        expected = by_hand(a[i], b[i], diagonal[i], 4)
        np.testing.assert_allclose(walk["x"][i].numpy(), expected, rtol=1e-9)
    assert walk["steps"].tolist() == [4] * 3 and bool(walk["active"].all())


def test_a_negative_curvature_is_not_entered_or_is_the_last_way() -> None:
    """diag(1, -2) with b = (0, 1): the curvature is -2, and the step for its size is 1/2."""
    diagonal = torch.tensor([[1.0, -2.0]], dtype=F64)
    for bounded, end in ((False, 0.0), (True, 0.5)):
        step = ConjugateStep(bounded=bounded)
        walk = step.begin(
            torch.tensor([[0.0, 1.0]], dtype=F64),
            torch.ones(1, dtype=torch.bool),
            tolerance=torch.zeros(1, dtype=F64),
            farthest=torch.ones(1, dtype=F64),
        )
        walk = walked(lambda v: diagonal * v, step, walk, 5)
        assert walk["x"].tolist() == [[0.0, end]] and float(walk["curvature"]) == -2.0
        assert walk["result"].tolist() == [int(Result.NEGATIVE_CURVATURE)]
        assert walk["steps"].tolist() == [int(bounded)] and not bool(walk["active"].any())
