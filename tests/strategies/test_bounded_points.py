"""Which hyperpriors bound a delta guide's objective: told before any work, and by the objective
itself far out.
"""

from typing import Any

import pyro.distributions as dist
import pytest
import torch

import varmeta as vm
from tests.cases import check

TASKS, WEIGHTS = 4, 10  # two modules of nine weights and one


def model(prior: vm.GaussianPrior) -> vm.TaskModel:
    net = torch.nn.Sequential(
        torch.nn.Linear(9, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    ).double()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(scale=1.0, learn_scale=False), prior)


def tasks() -> vm.TaskSet:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, 6, 9, generator=generator, dtype=torch.float64)
    return vm.TaskSet([vm.Task((row, row.sum(-1))) for row in x])


def total(prior: vm.GaussianPrior, entry: str, log_precision: float) -> float:
    """The MAP objective with every weight at theta0 and one learned precision far out."""
    one, data = model(prior), tasks()
    problem = vm.Joint("delta").problem(one, data, 0)
    eta = one.init(data.batch().support.x.new_zeros(()))
    eta[entry] = torch.full_like(eta[entry], log_precision)
    losses = problem.losses("elbo", data.batch(), 0)(problem.start(data.batch(), eta), eta)
    return float(losses.sum() + one.penalty(eta))


FAMILIES: list[tuple[str, Any]] = [
    ("hyperprior", dist.Gamma(2.0, 1.0)),
    ("hyperprior", dist.InverseGamma(3.0, 1.0)),  # lambda^-4: outweighs fewer than 8 weights
    ("hyperprior", dist.InverseGamma(18.5, 1.0)),  # fewer than 39
    ("hyperprior", dist.InverseGamma(19.5, 1.0)),  # fewer than 41
    ("hyperprior", dist.HalfCauchy(1.0)),
    ("hyperprior", dist.Exponential(1.0)),
    ("hyperprior", dist.LogNormal(0.0, 1.0)),
    ("scale_hyperprior", dist.HalfNormal(1.0)),
    ("scale_hyperprior", dist.Gamma(4.0, 1.0)),  # sd^3: outweighs fewer than 3 weights
    ("scale_hyperprior", dist.Gamma(6.0, 1.0)),  # fewer than 5
    ("scale_hyperprior", dist.Gamma(42.0, 1.0)),  # fewer than 41
    ("scale_hyperprior", dist.InverseGamma(2.0, 1.0)),
]


@pytest.mark.parametrize("learn", ["shared", "per_module", "per_parameter"])
@pytest.mark.parametrize(("where", "density"), FAMILIES, ids=lambda value: str(value).split("(")[0])
def test_refused_where_the_objective_falls_for_ever(learn: str, where: str, density: Any) -> None:
    prior = vm.GaussianPrior(1.0, learn, **{where: density})
    entries = [
        name for name in model(prior).init(torch.zeros(())) if name.startswith("log_precision")
    ]
    bounded = all(total(prior, entry, 280.0) > total(prior, entry, 140.0) for entry in entries)
    if bounded:
        check(vm.Joint("delta"), model(prior), tasks())
    else:
        with pytest.raises(ValueError, match="does not bound the precision"):
            check(vm.Joint("delta"), model(prior), tasks())


def test_ten_weights_under_one_precision_are_ten() -> None:
    prior = vm.GaussianPrior(1.0, "shared", hyperprior=dist.InverseGamma(3.0, 1.0))
    assert (
        total(prior, "log_precision", 280.0)
        < total(prior, "log_precision", 140.0)
        < total(prior, "log_precision", 70.0)
    )
    with pytest.raises(ValueError, match="does not bound the precision"):
        vm.fit(model(prior), tasks(), vm.Joint("delta"))


def test_a_sd_left_without_a_hyperprior_is_not_bounded() -> None:
    half = vm.GaussianPrior(1.0, "per_module", scale_hyperprior={"0": dist.InverseGamma(2.0, 1.0)})
    with pytest.raises(ValueError, match="does not bound the precision"):
        check(vm.Joint("delta"), model(half), tasks())
    both = vm.GaussianPrior(
        1.0,
        "per_module",
        scale_hyperprior={"0": dist.InverseGamma(2.0, 1.0), "1": dist.InverseGamma(2.0, 1.0)},
    )
    check(vm.Joint("delta"), model(both), tasks())


@pytest.mark.parametrize(("lkj", "bounded"), [(1.0, False), (2.9, False), (3.1, True)])
def test_correlations_of_points_need_an_lkj_that_grows_with_the_tasks(
    lkj: float, bounded: bool
) -> None:
    prior = vm.GaussianPrior(1.0, "full", scale_hyperprior=dist.InverseGamma(2.0, 1.0), lkj=lkj)
    one, data = model(prior), tasks()
    problem = vm.Joint("delta").problem(one, data, 0)
    found = []
    for entry in (1e3, 1e6):  # the correlation of the first two weights runs to 1, their sds stay
        eta = one.init(data.batch().support.x.new_zeros(()))
        eta["prior_tril"][0] = entry
        eta["log_precision"][1] = 2.0 * torch.tensor(entry).log()
        losses = problem.losses("elbo", data.batch(), 0)(problem.start(data.batch(), eta), eta)
        found.append(float(losses.sum() + one.penalty(eta)))
    assert (found[1] > found[0]) == bounded
    if bounded:
        check(vm.Joint("delta"), one, data)
    else:
        with pytest.raises(ValueError, match="lkj above 1"):
            check(vm.Joint("delta"), one, data)


def test_one_weight_of_one_task_also_gains_from_a_precision_of_zero() -> None:
    """lambda^-0.7 of Gamma(0.3) outweighs lambda^0.5 of the only weight."""
    data = vm.TaskSet(
        [vm.Task((torch.ones(3, 1, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))]
    )
    prior = vm.GaussianPrior(1.0, "shared", hyperprior=dist.Gamma(0.3, 1.0))
    one = vm.TaskModel(
        torch.nn.Linear(1, 1, bias=False).double(),
        vm.likelihoods.Gaussian(1.0, learn_scale=False),
        prior,
    )
    with pytest.raises(ValueError, match="does not bound the precision"):
        check(vm.Joint("delta"), one, data)
