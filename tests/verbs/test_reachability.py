"""How reachable the joint solution is: in one dimension, where both ends are known."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor

import varmeta as vm
from tests.cases import linear_model, net_model, ragged_tasks

F64 = torch.float64


def double_well(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> None:
    """f(t) = 4 (t^2 - 1)^2 - x t, its two minima at about -1 and 1."""
    t = params["theta"]
    pyro.factor("f", -(4 * (t**2 - 1) ** 2 - x[..., 0] * t))


def wells(*tilts: float) -> vm.TaskSet:
    return vm.TaskSet(
        [vm.Task(support=([[tilt]], [0.0]), name=f"tilt {tilt}") for tilt in tilts], dtype=F64
    )


def placed(model: vm.TaskModel, tasks: vm.TaskSet, loc: list[float]) -> vm.Fit:
    """A joint fit whose stored solutions are put where the test wants them."""
    fit = vm.fit(model, tasks, vm.Joint("delta"), 1, lambda p: torch.optim.SGD(p, 0.0))
    assert fit.run.state.phi is not None
    fit.run.state.phi["loc"].copy_(torch.tensor(loc, dtype=F64).reshape(-1, 1))
    return fit


def test_a_well_on_the_other_side_is_not_reached() -> None:
    """theta0 = 0.5: gradient descent ends in the right well; the joint solution sits in the left,
    deeper for tilt -1.
    """
    model = vm.TaskModel.from_pyro(
        double_well, {"theta": torch.tensor(0.5, dtype=F64)}, vm.GaussianPrior(0.1)
    )
    tasks = wells(-1.0, 1.0)
    fit = placed(model, tasks, [-1.03, 1.03])
    result = vm.reachability(fit, vm.GradientDescent(0.01))
    # nats that the left well is better by, with its pull towards theta0: (1 + 1) - 0.05 (1.5^2 -
    # 0.5^2)
    assert result.gap[0] == pytest.approx(2.0 - 0.05 * (1.53**2 - 0.47**2), abs=0.05)
    assert abs(float(result.gap[1])) < 0.01
    assert (
        "at most by 1.89" in str(result)
        and "'tilt -1.0'" in str(result)
        and "GradientDescent (to tolerance)" in str(result)
    )
    assert result.frame().columns.tolist() == ["stored", "reached", "gap"]
    assert result.plot().get_ylabel().endswith("(nats)")


def test_a_run_that_stopped_early_can_be_beaten() -> None:
    model = vm.TaskModel.from_pyro(
        double_well, {"theta": torch.tensor(0.9, dtype=F64)}, vm.GaussianPrior(0.1)
    )
    fit = placed(model, wells(0.0), [0.0])  # on the ridge
    assert float(vm.reachability(fit).gap[0]) < -3.0


def test_noisy_expectations_take_first_order_rules() -> None:
    fit = vm.fit(
        net_model(vm.GaussianPrior(4.0)), ragged_tasks(3), vm.Joint("normal", adapt_steps=50), 20
    )
    result = vm.reachability(fit)
    assert result.alg == "Adam (50 steps)" and bool(torch.isfinite(result.gap).all())
    assert torch.equal(result.gap, vm.reachability(fit).gap)
    with pytest.raises(ValueError, match="first-order rule, not NewtonCG"):
        vm.reachability(fit, vm.NewtonCG())


def test_what_stores_nothing_is_refused() -> None:
    fit = vm.fit(linear_model(vm.GaussianPrior(4.0)), ragged_tasks(3), vm.Implicit("delta"), 2)
    with pytest.raises(TypeError, match="a fit by Implicit stores none"):
        vm.reachability(fit)
