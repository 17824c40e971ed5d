"""Likelihoods without a maximum are named, whatever else is found, in float32 too; those with one
are not.
"""

import math
import warnings
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import varmeta as vm
from varmeta.results.separation import separated

GROUPS, ROWS = 12, 8


def tasks(kind: str, dtype: torch.dtype = torch.float64) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(GROUPS):
        uniform = torch.rand(ROWS, 2, generator=generator, dtype=torch.float64)
        x = (uniform[:, :1] < 0.3).double()
        coin = (uniform[:, 1] < 0.5).double()
        if kind == "complete":  # x - 0.1 tells y without an error
            x = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
            y = (x[:, 0] > 0.1).double()
        elif kind == "quasi":  # of the exposed all have it, of the others half
            y = torch.where(x[:, 0] > 0, 1.0, coin)
        elif kind == "zero cell":  # no events among the exposed
            y = torch.where(
                x[:, 0] > 0,
                0.0,
                torch.poisson(torch.ones(ROWS, dtype=torch.float64), generator=generator),
            )
        elif kind == "almost":  # of the exposed all but one
            y = torch.where(x[:, 0] > 0, 1.0, coin)
            y[0] = 0.0 if not found else y[0]
            x[0] = 1.0 if not found else x[0]
        else:
            y = coin
        found.append(vm.Task((x.to(dtype), y.to(dtype))))
    return vm.TaskSet(found, x_names=("exposed",), dtype=dtype)


def fitted(
    kind: str, dtype: torch.dtype, strategy: vm.Joint, **settings: Any
) -> tuple[vm.Fit, list[str]]:
    likelihood = vm.likelihoods.Poisson() if kind == "zero cell" else vm.likelihoods.Bernoulli()
    model = vm.TaskModel(
        vm.LinearPredictor(["exposed"]).to(dtype),
        likelihood,
        vm.GaussianPrior(**settings),
        shared=["exposed"],
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit = vm.fit(model, tasks(kind, dtype), strategy)
    return fit, [str(one.message) for one in said]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("settings", [{"precision": 1.0}, {"learn_precision": "shared"}])
@pytest.mark.parametrize("kind", ["complete", "quasi", "zero cell"])
def test_separation_is_said_with_the_coefficient(
    kind: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    fit, said = fitted(kind, dtype, vm.Joint("normal"), **settings)
    (sentence,) = [one for one in said if "has no maximum" in one]
    assert f"as exposed = {float(fit.eta['exposed']):.4g} grows" in sentence
    assert not any(
        "leave one out" in one for one in said
    )  # the estimates rest on nothing, not on each other


def test_every_doubt_is_said() -> None:
    _, said = fitted("quasi", torch.float64, vm.Joint("normal"), learn_precision="shared")
    assert [("runs away" in one, "has no maximum" in one) for one in said] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("strategy", [vm.Implicit("laplace"), vm.Joint("delta")])
def test_under_other_guides_too(strategy: Any) -> None:
    _, said = fitted("quasi", torch.float64, strategy, precision=1.0)
    assert any("has no maximum" in one for one in said)


@pytest.mark.parametrize("kind", ["almost", "coin"])
def test_one_exception_is_enough_for_a_maximum(kind: str) -> None:
    fit, said = fitted(kind, torch.float64, vm.Joint("normal"), precision=1.0)
    assert said == []
    assert abs(float(fit.eta["exposed"])) < 6.0


def test_a_hyperprior_makes_a_maximum() -> None:
    fit, said = fitted(
        "quasi",
        torch.float64,
        vm.Joint("normal"),
        precision=1.0,
        loc_hyperprior={"exposed": dist.Normal(0.0, 2.5)},
    )
    assert said == []
    assert 1.0 < float(fit.eta["exposed"]) < 8.0


def test_rare_events_are_no_separation() -> None:
    """Ten in 20,000: the curvature is a thousandth of that at even odds, and log odds of -7.6 +-
    0.3 are determined.
    """
    y = torch.zeros(4, 5000, dtype=torch.float64)
    y[:, 0] = y[:2, 1] = y[:2, 2] = y[:2, 3] = 1.0
    data = vm.TaskSet([vm.Task((torch.zeros(5000, 0, dtype=torch.float64), row)) for row in y])
    model = vm.TaskModel(
        vm.LinearPredictor([]).double(), vm.likelihoods.Bernoulli(), vm.GaussianPrior(100.0)
    )
    fit = vm.fit(model, data)
    assert separated(fit) == {}
    assert abs(float(fit.eta["intercept"]) - math.log(10 / 19990)) < 0.05


def test_collinear_predictors_are_no_separation() -> None:
    data = vm.TaskSet(
        [vm.Task((torch.cat([t.support[0]] * 2, -1), t.support[1])) for t in tasks("coin")],
        x_names=("a", "b"),
    )
    model = vm.TaskModel(
        vm.LinearPredictor(["a", "b"]).double(),
        vm.likelihoods.Bernoulli(),
        vm.GaussianPrior(),
        shared=["a", "b"],
    )
    with pytest.warns(RuntimeWarning, match="hardly tell a and b apart"):
        fit = vm.fit(model, data, vm.Joint("multivariate_normal"))
    assert separated(fit) == {}


def test_a_class_that_one_group_never_has() -> None:
    """Three classes; of the exposed none is of the third."""
    generator = torch.Generator().manual_seed(0)

    def one() -> vm.Task:
        x = (torch.rand(30, 1, generator=generator, dtype=torch.float64) < 0.5).double()
        y = torch.where(
            x[:, 0] > 0,
            torch.randint(0, 2, (30,), generator=generator),
            torch.randint(0, 3, (30,), generator=generator),
        )
        return vm.Task((x, y))

    model = vm.TaskModel(
        torch.nn.Linear(1, 3).double(),
        vm.likelihoods.Categorical(),
        vm.GaussianPrior(1.0),
        shared=["weight"],
    )
    with pytest.warns(RuntimeWarning, match="has no maximum"):
        vm.fit(model, vm.TaskSet([one() for _ in range(5)]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_observation_a_task_tells_sd_and_noise_not_apart(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    data = vm.TaskSet([vm.Task((draw(1, 1), draw(1))) for _ in range(40)], dtype=dtype)
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(
        torch.nn.Linear(1, 1).to(dtype), vm.likelihoods.Gaussian(), prior, shared=["weight"]
    )
    with pytest.warns(RuntimeWarning, match="hardly tell log_precision and log_scale apart"):
        fit = vm.fit(model, data)
    assert all(
        value.dtype == dtype for value in (*fit.eta.values(), *fit.posterior().mean.values())
    )
    assert fit.standard_errors["weight"].dtype == dtype
