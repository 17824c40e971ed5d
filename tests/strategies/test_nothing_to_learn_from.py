"""Objectives that depend on nothing that is learned, and tasks without rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import varmeta as vm

X = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64)[:, None]
QUERY_ONLY = vm.TaskSet([vm.Task(query=(X, 2.0 * X + shift)) for shift in (0.0, 1.0)])
DATA = vm.TaskSet([vm.Task((X, 2.0 * X + shift), (X, 2.0 * X + shift)) for shift in (0.0, 1.0)])


def line(prior: vm.GaussianPrior, **options) -> vm.TaskModel:
    torch.manual_seed(0)
    return vm.TaskModel(
        nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(0.5, learn_scale=False), prior, **options
    )


@pytest.mark.parametrize("guide", ["delta", "normal"])
@pytest.mark.parametrize(
    "strategy",
    [vm.Reptile, vm.FirstOrder, vm.Unrolled, vm.Implicit, vm.Joint],
    ids=lambda s: s.__name__,
)
def test_the_gradient_of_what_no_data_reach_is_zero(strategy: type, guide: str) -> None:
    compile = strategy is vm.FirstOrder and guide == "delta"  # one graph is enough
    model = line(vm.GaussianPrior(2.0, learn_loc=False), shared=["bias"])
    options = {"outer": "elbo"} if strategy in (vm.FirstOrder, vm.Unrolled) else {}
    found = vm.meta_gradient(model, QUERY_ONLY, strategy(guide, **options), compile=compile)
    # of a point -log N(theta0; theta0, 1 / 2), of a distribution KL(prior, prior); twice
    at_theta0 = 0.5 * math.log(2.0 * math.pi / 2.0)
    assert found.value == pytest.approx(2.0 * at_theta0 if guide == "delta" else 0.0, abs=1e-9)
    assert list(found.grads) == ["bias"]
    assert float(found.grads["bias"].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("strategy", "hyperguide"),
    [
        (None, None),
        (vm.Joint("normal"), None),
        (vm.Implicit("normal"), None),
        (vm.Reptile(), None),
        (None, "normal"),
    ],
)
def test_a_fit_without_support_rows_is_refused(
    strategy: vm.Strategy | None, hyperguide: str | None
) -> None:
    with pytest.raises(ValueError, match=r"none of the 2 tasks has support rows.*outer='query'"):
        vm.fit(line(vm.GaussianPrior(2.0)), QUERY_ONLY, strategy, hyperguide=hyperguide)
    with pytest.raises(
        ValueError, match=r"none of the 2 tasks has support rows.*Task\(support=\(x, y\)\)$"
    ):
        vm.fit(
            line(vm.GaussianPrior(2.0)),
            vm.TaskSet([vm.Task(), vm.Task()]),
            strategy,
            hyperguide=hyperguide,
        )


def test_a_comparison_without_support_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 2 tasks has support rows"):
        vm.compare(
            {"joint": vm.Joint("normal")}, line(vm.GaussianPrior(2.0)), QUERY_ONLY, DATA, seeds=1
        )


@pytest.mark.parametrize("strategy", [vm.Implicit(outer="query"), vm.Unrolled(outer="query")])
def test_query_rows_alone_teach_theta0(strategy: vm.Strategy) -> None:
    """Nothing is adapted, so theta0 is the least-squares line through all query rows: 2 x + 1 /
    2.
    """
    fit = vm.fit(line(vm.GaussianPrior(2.0)), QUERY_ONLY, strategy)
    assert fit.converged
    assert float(fit.eta["weight"]) == pytest.approx(2.0, abs=1e-4)
    assert float(fit.eta["bias"]) == pytest.approx(0.5, abs=1e-4)
