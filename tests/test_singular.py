"""Covariances that lost a direction name it, and REML estimates at a boundary say so."""

import pytest
import torch

import varmeta as vm
from varmeta.bayes.prior import log_precision_and_tril
from varmeta.doubts import doubts


def tasks(features: int, spread: float) -> vm.TaskSet:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = []
    for _ in range(8):
        x = draw(10, features)
        found.append(vm.Task((x, x.sum(-1) + spread * draw(1) + draw(10))))
    return vm.TaskSet(found)


def test_the_direction_that_is_lost_is_named_not_the_largest_correlation() -> None:
    """a + b + c is the same in every task, though no two of them correlate by more than -1/2."""
    prior = vm.GaussianPrior(1.0, "full")
    model = vm.TaskModel(
        vm.LinearPredictor(["a", "b", "c"], intercept=False).double(), vm.likelihoods.Gaussian(), prior
    )
    fit = vm.fit(model, tasks(3, 0.5), num_steps=1)
    covariance = torch.eye(3, dtype=torch.float64) - (1.0 - 1e-7) / 3.0
    fit.run.eta["log_precision"], fit.run.eta["prior_tril"] = log_precision_and_tril(torch.linalg.cholesky(covariance))
    fit.__dict__.pop("prior", None)  # cached
    (sentence,) = [one for one in doubts(fit, own_end=True) if "singular" in one]
    assert "combination" in sentence
    assert sentence.count("0.58") == 3
    assert "-0.50" not in sentence


def test_reml_at_a_boundary_warns() -> None:
    model = vm.TaskModel(
        vm.LinearPredictor(["a"]).double(),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="shared"),
        shared=["a"],
    )
    flat = tasks(1, 0.0)
    with pytest.warns(RuntimeWarning, match="precision of intercept runs away"):
        fit = vm.fit(model, flat, hyperguide="reml")
    assert float(fit.prior.sd["intercept"]) < 0.05


def test_laplace_says_why_it_has_no_standard_errors() -> None:
    model = vm.TaskModel(
        vm.LinearPredictor(["a"]).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior(), shared=["a"]
    )
    fit = vm.fit(model, tasks(1, 1.0), vm.Implicit("laplace"), num_steps=1, compile=False)
    assert fit.standard_errors is None
    assert "no standard errors: Laplace" in str(fit)
