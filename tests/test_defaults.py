"""`fit(model, tasks, strategy)` with no other argument ends well on every shipped data set, in raw units, and says why."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import varmeta as vm


def known_sd(params: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Tensor:
    return pyro.sample("y", dist.Normal(params["effect"], x), obs=y)


SETS = {
    "radon": vm.datasets.radon,
    "rats": vm.datasets.rats,
    "eight schools": vm.datasets.eight_schools,
    "gapminder": lambda: vm.datasets.gapminder("train"),
}
STRATEGIES = {
    "joint": vm.Joint(),
    "joint dense": vm.Joint("multivariate_normal"),
    "joint delta": vm.Joint("delta"),
    "reinit": vm.Reinit(),
    "implicit": vm.Implicit(),
    "implicit normal": vm.Implicit("normal"),
    "iMAML": vm.Implicit(outer="query"),
    "MAML": vm.Unrolled(),
    "FOMAML": vm.FirstOrder(),
    "Reptile": vm.Reptile(),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SETS)
def test_converges_and_says_why(name: str, strategy: str) -> None:
    tasks, how = SETS[name](), STRATEGIES[strategy]
    learn = None if how.guide == "delta" else "per_parameter"
    if name == "eight schools":
        model = vm.TaskModel.from_pyro(known_sd, {"effect": ()}, vm.GaussianPrior(1.0, learn))
    else:
        model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0, learn))
    if how.outer == "query" and tasks.batch().query is None:
        tasks = vm.TaskSet(
            [task for task in tasks if task.support is not None and len(task.support[1]) > 1] or [tasks[0]]
        )
        if len(tasks) < 2:
            with pytest.raises(ValueError, match="needs query data"):
                vm.fit(model, tasks, how)  # one observation per school: nothing to split
            return
        tasks = tasks.split(0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prior precision of", category=RuntimeWarning)
        if isinstance(how, (vm.FirstOrder, vm.Reptile)):  # a fixed step size is too large for a county of 116 houses
            warnings.filterwarnings("ignore", message="the inner steps diverge for 1 task,", category=RuntimeWarning)
        fit = vm.fit(model, tasks, how)
        joint = vm.fit(model, tasks, vm.Joint(how.guide))
    assert fit.converged, fit.stop
    assert "converged after" in fit.stop or "settled" in fit.stop
    assert all(bool(torch.isfinite(value).all()) for value in fit.eta.values())
    assert fit.stop in str(fit)
    if isinstance(how, vm.Implicit) and how.outer == "elbo":
        # the amortised objective is the joint one with phi at its minimum: one optimum
        assert fit.loss == pytest.approx(joint.loss, abs=1e-5)
