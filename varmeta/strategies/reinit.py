"""`Joint` with periodic reinitialisation: every once in a while phi goes back to the prior.

Who takes the steps puts it there: `fitting/descent.py`, and `fitting/joint_newton.py` for Newton's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from varmeta.numerics.first_order import Adam
from varmeta.numerics.minimize import FirstOrderMinimizer
from varmeta.strategies.joint import Joint
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Traits


@dataclass(frozen=True)
class Reinit(Joint):
    """`Joint`, with every phi_i and its optimiser state set back to the prior every `every` steps.

    The post: "jointly minimize the variational objective with respect to theta0 and theta_i, but
    every once in a while reinitialize theta_i to be theta0".  Each period has its own step-size
    schedule for phi, full at its start and falling to zero at its end, while eta's falls once over
    the whole run; so phi's steps must be large enough to get from the prior to the posterior within
    a period.

    every: in outer steps.

    Raises ValueError for one below 1.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks, vm.Reinit("normal", every=10), num_steps=20)
    >>> fit.strategy.describe()
    'Reinit(normal, outer=elbo)'
    """

    every: int = field(default=100, kw_only=True)

    usual: ClassVar[FirstOrderMinimizer] = Adam(lr=5e-2)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}")

    def traits(self, problem: Problem) -> Traits:
        found = super().traits(problem)
        # where phi is known there is nothing to set back
        return found if found.closed_form else replace(found, period=self.every)
