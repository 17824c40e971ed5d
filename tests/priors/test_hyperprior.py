"""Hyperpriors are densities of what they name, and their Jacobians are those of the coordinates."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

import varmeta as vm
from varmeta.hyper.coordinates import Coordinates
from varmeta.priors.hyperprior import edges, in_dtype, log_density

F64 = torch.float64
LIKE = torch.zeros((), dtype=F64)
COLUMNS = ["a", "b"]


def model(prior: vm.GaussianPrior, shared: tuple[str, ...] = (), **noise: Any) -> vm.TaskModel:
    return vm.TaskModel(
        vm.LinearPredictor(COLUMNS), vm.likelihoods.Gaussian(**noise), prior, shared=shared
    )


def moved(made: vm.TaskModel, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.5 * torch.randn(value.shape, generator=generator, dtype=F64)
        for name, value in made.init(LIKE).items()
    }


def test_densities_are_of_what_they_name() -> None:
    prior = vm.GaussianPrior(
        learn_precision="per_parameter",
        scale_hyperprior={"a": dist.HalfNormal(2.0), "b": dist.HalfCauchy(3.0)},
        loc_hyperprior={"intercept": dist.Normal(1.0, 4.0), "b": dist.Normal(0.0, 5.0)},
    )
    made = model(prior, scale_hyperprior=dist.HalfNormal(0.7))
    eta = moved(made)
    sd = {name: math.exp(-0.5 * float(eta[f"log_precision.{name}"])) for name in ("a", "b")}
    expected = (
        stats.halfnorm(scale=2.0).logpdf(sd["a"])
        + stats.halfcauchy(scale=3.0).logpdf(sd["b"])
        + stats.norm(1.0, 4.0).logpdf(float(eta["intercept"]))
        + stats.norm(0.0, 5.0).logpdf(float(eta["b"]))
        + stats.halfnorm(scale=0.7).logpdf(math.exp(float(eta["log_scale"])))
    )
    assert float(made.penalty(eta)) == pytest.approx(-expected)


def test_one_distribution_of_theta0_leaves_shared_parameters_alone() -> None:
    made = model(vm.GaussianPrior(1.0, loc_hyperprior=dist.Normal(0.0, 2.0)), shared=("a",))
    eta = moved(made)
    expected = sum(stats.norm(0.0, 2.0).logpdf(float(eta[name])) for name in ("intercept", "b"))
    assert float(made.penalty(eta)) == pytest.approx(-expected)


def test_sds_of_a_dense_prior_are_marginal() -> None:
    made = model(
        vm.GaussianPrior(learn_precision="full", scale_hyperprior=dist.HalfNormal(1.5), lkj=3.0)
    )
    eta = moved(made)
    prior = made.prior_distribution(eta)
    covariance = prior.covariance_matrix
    sd = covariance.diagonal().sqrt()
    correlation = covariance / torch.outer(sd, sd)
    expected = stats.halfnorm(scale=1.5).logpdf(sd.numpy()).sum() + 2.0 * float(
        torch.logdet(correlation)
    )
    assert float(made.penalty(eta)) == pytest.approx(-expected)


@pytest.mark.parametrize("learn", ["shared", "per_module", "per_parameter", "full"])
def test_coordinates_and_back(learn: str) -> None:
    made = model(vm.GaussianPrior(learn_precision=learn))
    eta = moved(made)
    coordinates = Coordinates(made, eta)
    back = coordinates.eta(coordinates.of(eta))
    assert set(back) == set(eta)
    for name, value in eta.items():
        torch.testing.assert_close(back[name], value)
    vector = coordinates.vector(coordinates.of(eta))
    several = coordinates.eta_of(torch.stack([vector, vector + 0.1]))
    for name, value in eta.items():
        torch.testing.assert_close(several[name][0], value)


@pytest.mark.parametrize("learn", ["shared", "per_parameter", "full"])
def test_flat_densities_become_the_jacobian(learn: str) -> None:
    """Flat in theta0, sds, correlations and noise scale: the density of the coordinates is |d
    natural / d coordinates|.
    """
    made = model(vm.GaussianPrior(learn_precision=learn))
    coordinates = Coordinates(made, made.init(LIKE))

    def natural(vector: Tensor) -> Tensor:
        eta = coordinates.eta(coordinates.named(vector))
        parts = [made.weights.flatten(eta), eta["log_scale"].exp().reshape(1)]
        if learn != "full":
            return torch.cat(
                [
                    *parts,
                    *(v.reshape(-1) for v in made.prior.learned_sds(made.weights, eta).values()),
                ]
            )
        covariance = made.prior_distribution(eta).covariance_matrix
        sd = covariance.diagonal().sqrt()
        rows, columns = torch.tril_indices(3, 3, -1)
        return torch.cat([*parts, sd, (covariance / torch.outer(sd, sd))[rows, columns]])

    found = []
    for seed in range(3):
        vector = coordinates.vector(coordinates.of(moved(made, seed)))
        log_det = torch.linalg.slogdet(
            torch.autograd.functional.jacobian(natural, vector)
        ).logabsdet
        found.append(float(coordinates.log_density(coordinates.named(vector)) - log_det))
    assert found == pytest.approx([found[0]] * 3, abs=1e-10)


def test_a_density_of_the_precision_has_the_precisions_jacobian() -> None:
    """The same belief said of the precision and of the sd is the same density of the
    coordinates.
    """
    of_precision = model(
        vm.GaussianPrior(learn_precision="shared", hyperprior=dist.Gamma(2.0, 3.0))
    )
    # sd = precision^(-1/2)
    of_sd = model(
        vm.GaussianPrior(
            learn_precision="shared",
            scale_hyperprior=dist.TransformedDistribution(
                dist.Gamma(2.0, 3.0),
                [dist.transforms.PowerTransform(torch.tensor(-0.5, dtype=F64))],
            ),
        )
    )
    differences = []
    for seed in range(3):
        eta = moved(of_sd, seed)
        one, other = (Coordinates(made, eta) for made in (of_precision, of_sd))
        differences.append(float(one.log_density(one.of(eta)) - other.log_density(other.of(eta))))
    # the constant is log 2, of d log precision = 2 d log sd
    assert differences == pytest.approx([-math.log(2.0)] * 3, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: vm.GaussianPrior(scale_hyperprior=dist.HalfNormal(1.0)),
            ValueError,
            "needs a standard deviation",
        ),
        (
            lambda: vm.GaussianPrior(
                learn_precision="shared",
                hyperprior=dist.Gamma(1.0, 1.0),
                scale_hyperprior=dist.HalfNormal(1.0),
            ),
            ValueError,
            "not both",
        ),
        (
            lambda: vm.GaussianPrior(learn_precision="full", scale_hyperprior=2.0),
            TypeError,
            "must be a distribution",
        ),
        (
            lambda: vm.GaussianPrior(loc_hyperprior={"a": "wide"}),
            TypeError,
            "loc_hyperprior of 'a'",
        ),
        (
            lambda: vm.GaussianPrior(learn_precision="full", lkj=0.0),
            ValueError,
            "lkj must be a positive",
        ),
        (
            lambda: vm.GaussianPrior(lkj=2.0),
            ValueError,
            "lkj=2 is a density of learned correlations",
        ),
        (
            lambda: vm.GaussianPrior(learn_precision="per_parameter", lkj=2.0),
            ValueError,
            "'per_parameter' learns none",
        ),
        (
            lambda: vm.TaskModel(
                vm.LinearPredictor([]),
                vm.likelihoods.Gaussian(),
                vm.GaussianPrior(learn_precision="full", lkj=2.0),
            ),
            ValueError,
            "one weight per task has none",
        ),
        (
            lambda: model(vm.GaussianPrior(learn_loc=False, loc_hyperprior=dist.Normal(0.0, 1.0))),
            ValueError,
            "all of which learn_loc=False holds fixed",
        ),
        (
            lambda: model(vm.GaussianPrior(loc_hyperprior={"c": dist.Normal(0.0, 1.0)})),
            ValueError,
            "names \\['c'\\]",
        ),
        (
            lambda: model(
                vm.GaussianPrior(
                    learn_precision="full", scale_hyperprior={"c": dist.HalfNormal(1.0)}
                )
            ),
            ValueError,
            "scale_hyperprior names \\['c'\\]",
        ),
        (
            lambda: vm.GaussianPrior(
                learn_precision="shared", scale_hyperprior={"a": dist.HalfNormal(1.0)}
            ),
            ValueError,
            "there is one sd",
        ),
        (
            lambda: vm.likelihoods.Gaussian(
                learn_scale=False, scale_hyperprior=dist.HalfNormal(1.0)
            ),
            ValueError,
            "a scale that is learned",
        ),
        (
            lambda: vm.GaussianPrior(loc_hyperprior=dist.Normal(torch.zeros(2), 1.0).to_event(1)),
            ValueError,
            "over one number",
        ),
    ],
)
def test_what_is_refused(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_where_supports_end() -> None:
    log_of = [dist.transforms.ExpTransform().inv]
    for density, low, high in (
        (dist.Normal(0.0, 1.0), -math.inf, math.inf),
        (dist.Gumbel(0.0, 1.0), -math.inf, math.inf),
        (dist.Uniform(-1.0, 2.0), -1.0, 2.0),
        (dist.HalfNormal(1.0), 0.0, math.inf),
        (dist.Exponential(1.0), 0.0, math.inf),
        (dist.Pareto(2.0, 1.0), 2.0, math.inf),
        (dist.TransformedDistribution(dist.Uniform(0.0, 4.0), log_of), -math.inf, math.log(4.0)),
    ):
        found = tuple(float(end) for end in edges(in_dtype(density, LIKE)))
        assert found == pytest.approx((low, high)), density


def test_a_density_is_0_outside_its_support() -> None:
    """torch's exponential density goes on below 0, and theta0 was drawn there."""
    at = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    inside, outside = (log_density(dist.Exponential(2.0), {"x": value}) for value in at.flip(0))
    assert float(inside) == pytest.approx(math.log(2.0) - 1.0)
    assert float(outside) == -math.inf
