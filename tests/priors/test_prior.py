"""The prior: its distribution for every kind of precision, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import varmeta as vm
from tests.common import F64, moved, randn
from varmeta.priors.factors import unit_lower
from varmeta.priors.weights import Weights

WEIGHTS = Weights(
    {"0.weight": torch.Size([2, 1]), "0.bias": torch.Size([2]), "head": torch.Size([])}
)
LOC = {"0.weight": randn(2, 1), "0.bias": randn(2, seed=1), "head": randn(seed=2)}
LIKE = torch.zeros((), dtype=F64)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (None, []),
        ("shared", ["log_precision"]),
        ("per_module", ["log_precision.0", "log_precision.head"]),
        ("per_parameter", ["log_precision.0.weight", "log_precision.0.bias", "log_precision.head"]),
        ("full", ["log_precision", "prior_tril"]),
    ],
)
def test_every_kind_starts_at_the_given_precision_and_moves_with_eta(
    kind: str | None, names: list[str]
) -> None:
    prior = vm.GaussianPrior(4.0, kind)
    eta = prior.init(WEIGHTS, LIKE)
    assert list(eta) == names
    p = prior.distribution(WEIGHTS, eta | LOC)
    torch.testing.assert_close(p.mean, WEIGHTS.flatten(LOC), rtol=0, atol=0)
    torch.testing.assert_close(p.stddev, torch.full((5,), 0.5, dtype=F64))
    eta = moved(eta)
    p = prior.distribution(WEIGHTS, eta | LOC)
    theta = randn(5, seed=5)
    if kind == "full":
        scale = torch.diag(torch.exp(-0.5 * eta["log_precision"])) @ unit_lower(
            eta["prior_tril"], 5
        )
        expected = stats.multivariate_normal(WEIGHTS.flatten(LOC), scale @ scale.T).logpdf(theta)
    else:
        sizes = {"0.weight": 2, "0.bias": 2, "head": 1}
        keys = {None: "", "shared": "log_precision"}
        sd = []
        for name, size in sizes.items():
            if kind == "per_module":
                key = "log_precision.head" if name == "head" else "log_precision.0"
            else:
                key = f"log_precision.{name}" if kind == "per_parameter" else keys[kind]
            value = eta[key] if key else torch.tensor(math.log(4.0), dtype=F64)
            sd.append(torch.exp(-0.5 * value).expand(WEIGHTS.shapes[name]).reshape(-1))
            assert len(sd[-1]) == size
        expected = stats.norm(WEIGHTS.flatten(LOC), torch.cat(sd)).logpdf(theta).sum()
    assert float(p.log_prob(theta)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("learn", [None, "full"])
def test_a_covariance_is_the_covariance(learn: str | None) -> None:
    root = randn(5, 5)
    covariance = root @ root.T + torch.eye(5, dtype=F64)
    prior = vm.GaussianPrior(covariance=covariance, learn_precision=learn)
    p = prior.distribution(WEIGHTS, prior.init(WEIGHTS, LIKE) | LOC)
    torch.testing.assert_close(p.covariance_matrix, covariance, rtol=1e-12, atol=1e-12)
    given = prior.log_precision(WEIGHTS, prior.init(WEIGHTS, LIKE), LIKE)
    # of the last weight given all others: the last diagonal entry of the precision matrix
    assert float(given[-1].exp()) == pytest.approx(
        float(torch.linalg.inv(covariance)[-1, -1]), rel=1e-10
    )


def test_precisions_by_name_and_module() -> None:
    per_weight = torch.tensor([[1.0], [9.0]])
    prior = vm.GaussianPrior({"0": 4.0, "0.weight": per_weight, "head": 25.0})
    p = prior.distribution(WEIGHTS, prior.init(WEIGHTS, LIKE) | LOC)
    torch.testing.assert_close(p.stddev, torch.tensor([1, 1 / 3, 0.5, 0.5, 0.2], dtype=F64))
    shared = vm.GaussianPrior({"0": 4.0, "head": 4.0}, "shared").init(WEIGHTS, LIKE)
    assert float(shared["log_precision"]) == pytest.approx(math.log(4.0))


def test_hyperprior_is_a_density_of_the_precision() -> None:
    prior = vm.GaussianPrior(4.0, "per_module", hyperprior=dist.Gamma(2.0, 0.5))
    eta = moved(prior.init(WEIGHTS, LIKE))
    expected = -sum(stats.gamma(2.0, scale=2.0).logpdf(math.exp(value)) for value in eta.values())
    # theta0 carries no hyperprior, whatever its name
    assert float(prior.penalty(WEIGHTS, eta | LOC)) == pytest.approx(expected)
    assert vm.GaussianPrior(4.0, "shared").penalty(WEIGHTS, eta | LOC) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, {"head": -2.0}, torch.tensor(0.0)])
def test_a_precision_that_is_none(bad: Any) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        vm.GaussianPrior(bad)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: vm.GaussianPrior(torch.ones(3)), "one number"),
        (lambda: vm.GaussianPrior(learn_precision="each"), "learn_precision must be one of"),
        (lambda: vm.GaussianPrior(covariance=torch.ones(2, 3)), "square"),
        (lambda: vm.GaussianPrior(covariance=-torch.eye(2)), "positive definite"),
        (lambda: vm.GaussianPrior(covariance=torch.tensor([[2.0, 0.0], [1.0, 2.0]])), "symmetric"),
        (
            lambda: vm.GaussianPrior(covariance=torch.eye(2), learn_precision="shared"),
            "dense covariance goes with",
        ),
        (lambda: vm.GaussianPrior(hyperprior=dist.Gamma(1.0, 1.0)), "needs a precision"),
        (
            lambda: vm.GaussianPrior(learn_precision="full", hyperprior=dist.Gamma(1.0, 1.0)),
            "dense covariance",
        ),
        (lambda: vm.GaussianPrior({"nose": 1.0}).init(WEIGHTS, LIKE), "names \\['nose'\\]"),
        (lambda: vm.GaussianPrior({"head": 1.0}).init(WEIGHTS, LIKE), "says nothing about"),
        (
            lambda: vm.GaussianPrior({"0": torch.ones(3), "head": 1.0}, "shared").init(
                WEIGHTS, LIKE
            ),
            "has shape",
        ),
        (
            lambda: vm.GaussianPrior(covariance=torch.eye(2)).init(WEIGHTS, LIKE),
            "a task has 5 weights",
        ),
    ],
)
def test_what_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("prior", "text"),
    [
        (vm.GaussianPrior(), "GaussianPrior()"),
        (vm.GaussianPrior(0.1, "full"), "GaussianPrior(precision=0.1, learn_precision='full')"),
        (
            vm.GaussianPrior({"a": 1.0, "b": 2.0}, loc={"a": 1.0}),
            "GaussianPrior(precision of a, b, loc of a)",
        ),
        (vm.GaussianPrior(covariance=torch.eye(2)), "GaussianPrior(covariance (2, 2))"),
        (
            vm.GaussianPrior(learn_precision="shared", hyperprior=dist.Gamma(2.0, 1.0)),
            "GaussianPrior(learn_precision='shared', hyperprior=Gamma)",
        ),
    ],
)
def test_repr(prior: vm.GaussianPrior, text: str) -> None:
    assert repr(prior) == text


def test_a_hyperprior_is_a_distribution() -> None:
    with pytest.raises(TypeError, match="must be a distribution"):
        vm.GaussianPrior(learn_precision="shared", hyperprior=2.0)  # type: ignore[arg-type]


def test_loc_keeps_its_precision_and_is_checked() -> None:
    net = torch.nn.Linear(1, 1)
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(loc={"weight": 0.1}))
    assert float(model.init(LIKE)["weight"]) == 0.1  # not rounded to the network's float32
    with pytest.raises(ValueError, match="loc names"):
        vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(loc={"nose": 0.1}))
    with pytest.raises(ValueError, match="loc of 'weight' has shape"):
        vm.TaskModel(
            net, vm.likelihoods.Gaussian(), vm.GaussianPrior(loc={"weight": torch.ones(3)})
        )


def test_weights_go_to_a_vector_and_back() -> None:
    named = {name: randn(4, *shape) for name, shape in WEIGHTS.shapes.items()}
    back = WEIGHTS.unflatten(WEIGHTS.flatten(named))
    for name, value in named.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)
    assert WEIGHTS.labels == ("0.weight[0,0]", "0.weight[1,0]", "0.bias[0]", "0.bias[1]", "head")


def test_a_covariance_that_is_definite_in_float64_alone_serves_float32_data() -> None:
    """[[1, r], [r, 1]] with r = 1 - 1e-9 has the factor [[1, 0], [r, sqrt(1 - r^2)]]; rounded to
    float32 it is singular.
    """
    r = 1.0 - 1e-9
    covariance = torch.tensor([[1.0, r], [r, 1.0]], dtype=torch.float64)
    model = vm.TaskModel(
        torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(covariance=covariance)
    )
    prior = model.prior_distribution(model.init(torch.zeros(())))
    expected = torch.tensor([[1.0, 0.0], [r, (1.0 - r * r) ** 0.5]])
    torch.testing.assert_close(prior.scale_tril, expected, atol=1e-7, rtol=1e-4)
