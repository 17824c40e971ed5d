"""Written-out derivatives against automatic ones."""

from __future__ import annotations

import pytest
import torch

from tests.linear_gaussian import REGRESSIONS, moved
from varmeta.fitting.profiled_derivatives import applies, derivatives, directions
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.reduced import ReducedTasks
from varmeta.numerics.tree import named_parts

LEFT_TO_AUTOGRAD = {"fixed", "hyperpriors"}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_they_are_those_of_autograd(case: str) -> None:
    model, tasks = REGRESSIONS[case]()
    eta, linear = moved(model), (*model.shared, *model.coefficients)
    reduced = ReducedTasks.of(model, tasks, linear)
    assert reduced is not None
    objective = ProfiledEvidence(model, reduced, eta, linear)
    assert applies(objective) == (case not in LEFT_TO_AUTOGRAD)
    if case in LEFT_TO_AUTOGRAD:
        return
    point = objective.enter(eta)
    flat = torch.cat([value.reshape(-1) for value in point.values()])

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return objective(named_parts(flat, point))

    gradient, hessian = derivatives(objective, point, directions(objective, point))
    torch.testing.assert_close(
        gradient, torch.autograd.functional.jacobian(loss, flat), rtol=1e-11, atol=1e-11
    )
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(loss, flat), rtol=1e-11, atol=1e-11
    )
    # at a covariance that has lost rank too
    singular = {
        name: value if name == "log_scale" else torch.zeros_like(value)
        for name, value in point.items()
    }
    gradient, hessian = derivatives(objective, singular, directions(objective, point))
    assert not gradient[: len(flat) - int(objective.learns_scale)].any()
    at = torch.cat([value.reshape(-1) for value in singular.values()])
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(loss, at), rtol=1e-11, atol=1e-11
    )
