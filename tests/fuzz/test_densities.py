"""The likelihoods' log densities over odd outputs and observations, against scipy's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

import varmeta as vm
from tests.fuzz.made import examples
from tests.fuzz.outcome import attempt

L = vm.likelihoods
outputs = st.floats(-1e3, 1e3)
counts = st.integers(0, 10**6)
scales = st.floats(1e-3, 1e3)


def log_sigmoid(f: float) -> float:
    return float(-np.logaddexp(0.0, -f))


# name -> (likelihood of a scale, log density of y at the output f and that scale, what y may be)
CASES: dict[
    str, tuple[Callable[[float], object], Callable[[float, float, float], float], st.SearchStrategy]
] = {
    "Gaussian": (
        lambda s: L.Gaussian(s, learn_scale=False),
        lambda y, f, s: stats.norm(f, s).logpdf(y),
        st.floats(-1e6, 1e6),
    ),
    "StudentT": (
        lambda s: L.StudentT(scale=s, learn_scale=False),
        lambda y, f, s: stats.t(4.0, f, s).logpdf(y),
        outputs,
    ),
    "Bernoulli": (
        lambda s: L.Bernoulli(),
        lambda y, f, s: log_sigmoid(f if y else -f),
        st.integers(0, 1),
    ),
    "Poisson": (
        lambda s: L.Poisson(),
        lambda y, f, s: y * f - np.exp(f) - special.gammaln(y + 1.0),
        counts,
    ),
}


@pytest.mark.parametrize("name", CASES)
@examples(0.04)
@given(st.data(), st.floats(-40.0, 40.0), scales)
def test_log_densities(name: str, data: st.DataObject, f: float, scale: float) -> None:
    make, right, values = CASES[name]
    y = data.draw(values)
    net = nn.Linear(1, 1).double()
    with torch.no_grad():
        net.weight.fill_(0.0)
        net.bias.fill_(f)
    model = vm.TaskModel(net, make(scale), vm.GaussianPrior(1.0), shared=["bias"])
    tasks = vm.TaskSet(
        [vm.Task((np.zeros((1, 1)), np.array([y])), (np.zeros((1, 1)), np.array([y])))]
    )

    def density() -> float:
        still = vm.fit(
            model, tasks, vm.Joint("delta"), 1, lambda params: torch.optim.SGD(params, lr=0.0)
        )
        return float(still.posterior().log_prob(num_samples=1)[0])

    outcome = attempt(density, name)
    if outcome.value is not None:
        exact = right(y, f, scale)
        # exp(f) loses as many digits as f has before the point
        close = (
            abs(outcome.value - exact)
            <= 1e-9 * (abs(exact) + abs(y * f) + np.exp(min(f, 700.0))) + 1e-12
        )
        outcome.must_be(bool(close), name)
