"""What a user's own strategy and rule hand back, looked at before anybody trips over it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.numerics.minimize import FirstOrderMinimizer
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import State, Stats, Strategy
from varmeta.tasks import TaskSet


def no_traits(found: object, strategy: Strategy) -> TypeError:
    """The complaint about what is no `Traits`."""
    return TypeError(
        f"{type(strategy).__name__}.traits returns {kind_of(found)}, expected vm.Traits(...)"
    )


def no_state(found: object, strategy: Strategy) -> TypeError:
    """The complaint about what is no `State`."""
    return TypeError(
        f"{type(strategy).__name__}.init returns {kind_of(found)}, expected vm.State(): what is "
        "kept between steps, vm.State(phi) with the tasks' parameters or nothing"
    )


def no_solution(found: object, strategy: Strategy) -> TypeError:
    """The complaint about what is no `Solution`."""
    return TypeError(
        f"{type(strategy).__name__}.adapt returns {kind_of(found)}, expected vm.Solution(phi, "
        "result, stats), as problem.minimize(batch, eta, minimizer) gives it"
    )


def checked_outcome(found: Any, strategy: Strategy) -> tuple[Tensor, State, Stats]:
    """Raises TypeError for what is not (scalar, State, Stats)."""
    name = f"{type(strategy).__name__}.loss returns"
    if not isinstance(found, tuple) or len(found) != 3:
        came = f"a tuple of {len(found)}" if isinstance(found, tuple) else kind_of(found)
        raise TypeError(
            f"{name} {came}, expected three things: the summed loss, the next vm.State, and "
            "vm.Stats(losses, evaluations)"
        )
    scalar, state, stats = found
    if not isinstance(scalar, Tensor) or scalar.dim():
        shape = f" of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else ""
        raise TypeError(
            f"{name} {kind_of(scalar)}{shape} as its first, expected a scalar tensor: "
            "self.total(problem, batch, eta, losses) sums the losses of the tasks"
        )
    if not isinstance(state, State):
        raise TypeError(
            f"{name} {kind_of(state)} as its second, expected a vm.State: "
            "dataclasses.replace(state, step=state.step + 1)"
        )
    if not isinstance(stats, Stats):
        raise TypeError(
            f"{name} {kind_of(stats)} as its third, expected "
            "Stats(losses, evaluations): the outer loss of each task and the gradient evaluations "
            "per task that the step took, which budgets and reports count"
        )
    return scalar, state, stats


def check_rule(rule: FirstOrderMinimizer, problem: Problem, tasks: TaskSet) -> None:
    """Take one step of a user's own `FirstOrderMinimizer`, of one task.

    Raises TypeError where it does not return phi and its state, ValueError for a phi of other
    names or shapes.
    """
    batch = tasks[[0]].batch()
    phi = problem.start(batch, problem.model.init(batch.support.like))
    phi = {name: value.detach() for name, value in phi.items()}
    name = f"{type(rule).__name__}.update"
    gradient = {key: torch.zeros_like(value) for key, value in phi.items()}
    found: Any = rule.update(phi, gradient, rule.init(phi))
    is_pair = isinstance(found, tuple) and len(found) == 2
    if not is_pair or not all(isinstance(part, Mapping) for part in found):
        came = f"({', '.join(map(kind_of, found))})" if is_pair else kind_of(found)
        raise TypeError(
            f"{name} returns {came}, expected two dicts of tensors by name: phi after the step, "
            "and the rule's state, {} where it keeps none"
        )
    shapes = {key: tuple(value.shape) for key, value in phi.items()}
    came_shapes = {key: tuple(getattr(value, "shape", ())) for key, value in found[0].items()}
    if shapes != came_shapes:
        raise ValueError(
            f"{name} returns a phi of {came_shapes}, expected {shapes}, as it was given"
        )
