"""A strategy of the user's own: what `loss` must return, and that it then does all that the shipped ones do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import varmeta as vm
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.pieces import at
from varmeta.strategy import Strategy


@dataclass(frozen=True)
class Envelope(Strategy):
    """sum_i min_phi F_i(phi, eta), by the gradient of F_i at the minimum."""

    guide: Any = "multivariate_normal"
    told: tuple[str, ...] = ("losses", "evaluations")

    def loss(self, problem: Any, batch: Any, eta: Any, state: Any) -> Any:
        phi = self.adapt(problem, batch, {name: value.detach() for name, value in eta.items()}).value
        losses = problem.losses("elbo", batch, state.step)(phi, eta)
        stats = {"losses": losses.detach(), "evaluations": 5.0}
        new = replace(state, step=state.step + 1)
        return self._total(problem, batch, eta, losses), new, {name: stats[name] for name in self.told}

    def adapt(self, problem: Any, batch: Any, eta: Any) -> Any:
        return minimize(at(problem.losses("inner", batch, 0), eta), problem.start(batch, eta), NewtonCG())


def line() -> tuple[vm.TaskModel, vm.TaskSet]:
    tasks = vm.datasets.lines(10, num_support=5, num_query=5, noise=0.1)
    prior = vm.GaussianPrior(learn_precision="shared")
    return vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior), tasks


def test_it_reaches_the_maximum_of_the_likelihood() -> None:
    model, tasks = line()
    own, exact = vm.fit(model, tasks, Envelope()), vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    assert own.converged
    assert abs(own.loss - exact.loss) < 1e-5
    scores = [fit.adapt(tasks).score()["log_density"] for fit in (own, exact)]
    torch.testing.assert_close(*(torch.tensor(score.to_numpy()) for score in scores), atol=1e-3, rtol=0.0)


def test_a_budget_counts_what_it_says_it_took() -> None:
    model, tasks = line()
    fit = vm.fit(model, tasks, Envelope(), budget=20.0)
    assert fit.history["evaluations"].tolist() == [5.0, 10.0, 15.0, 20.0]


@pytest.mark.parametrize("told", [(), ("losses",), ("evaluations",)])
def test_stats_that_are_missing_are_named(told: tuple[str, ...]) -> None:
    model, tasks = line()
    missing = " and ".join(repr(name) for name in ("losses", "evaluations") if name not in told)
    with pytest.raises(ValueError, match=f"Envelope.loss returns are without {missing}: give"):
        vm.fit(model, tasks, Envelope(told=told))
    with pytest.raises(ValueError, match=f"Envelope.loss returns are without {missing}: give"):
        vm.meta_gradient(model, tasks, Envelope(told=told))
