"""A strategy of the user's own: what `loss` must return, and that it then does all that the shipped
ones do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import varmeta as vm


@dataclass(frozen=True)
class Envelope(vm.Strategy):
    """sum_i min_phi F_i(phi, eta), by the gradient of F_i at the minimum."""

    guide: Any = "multivariate_normal"

    def traits(self, problem: Any) -> Any:
        return vm.Traits(noisy=not problem.deterministic)

    def init(self, problem: Any, batch: Any, eta: Any) -> Any:
        return vm.State()

    def loss(self, problem: Any, batch: Any, eta: Any, state: Any) -> Any:
        phi = self.adapt(problem, batch, eta).value
        losses = problem.losses("elbo", batch, state.step)(phi, eta)
        new = replace(state, step=state.step + 1)
        return self.total(problem, batch, eta, losses), new, vm.Stats(losses.detach(), 5.0)

    def adapt(self, problem: Any, batch: Any, eta: Any) -> Any:
        return problem.minimize(batch, eta, vm.NewtonCG())


@dataclass(frozen=True)
class Careless(Envelope):
    """Says nothing of what a step took."""

    def loss(self, problem: Any, batch: Any, eta: Any, state: Any) -> Any:
        total, new, stats = super().loss(problem, batch, eta, state)
        return total, new, {"losses": stats.losses}


def line() -> tuple[vm.TaskModel, vm.TaskSet]:
    tasks = vm.datasets.lines(10, num_support=5, num_query=5, noise=0.1)
    prior = vm.GaussianPrior(learn_precision="shared")
    return vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior), tasks


def test_it_reaches_the_maximum_of_the_likelihood() -> None:
    model, tasks = line()
    own, exact = (
        vm.fit(model, tasks, Envelope()),
        vm.fit(model, tasks, vm.Joint("multivariate_normal")),
    )
    assert own.converged
    assert abs(own.loss - exact.loss) < 1e-5
    scores = [fit.adapt(tasks).score()["log_density"] for fit in (own, exact)]
    torch.testing.assert_close(
        *(torch.tensor(score.to_numpy()) for score in scores), atol=1e-3, rtol=0.0
    )


def test_a_budget_counts_what_it_says_it_took() -> None:
    model, tasks = line()
    fit = vm.fit(model, tasks, Envelope(), budget=20.0)
    assert fit.history["evaluations"].tolist() == [5.0, 10.0, 15.0, 20.0]


def test_stats_of_another_kind_are_refused() -> None:
    model, tasks = line()
    with pytest.raises(
        TypeError,
        match=r"Careless.loss returns a dict as its third, expected Stats\(losses, evaluations\)",
    ):
        vm.fit(model, tasks, Careless())
    with pytest.raises(TypeError, match="which budgets and reports count"):
        vm.meta_gradient(model, tasks, Careless())


@pytest.mark.parametrize("left_out", ["init", "loss", "adapt", "traits"])
def test_the_whole_contract_is_asked_for(left_out: str) -> None:
    parts = {
        name: getattr(Envelope, name)
        for name in ("init", "loss", "adapt", "traits")
        if name != left_out
    }
    with pytest.raises(TypeError, match=f"abstract method '?{left_out}"):
        type("Partly", (vm.Strategy,), parts)()
