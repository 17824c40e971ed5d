"""Covariances that lost a direction name it, and REML estimates at a boundary say so."""

import warnings

import numpy as np
import pytest
import torch

import varmeta as vm
from varmeta.priors.factors import log_precision_and_tril
from varmeta.results.doubts import doubts


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
        vm.LinearPredictor(["a", "b", "c"], intercept=False).double(),
        vm.likelihoods.Gaussian(),
        prior,
    )
    fit = vm.fit(model, tasks(3, 0.5), num_steps=1)
    covariance = torch.eye(3, dtype=torch.float64) - (1.0 - 1e-7) / 3.0
    fit.run.eta["log_precision"], fit.run.eta["prior_tril"] = log_precision_and_tril(
        torch.linalg.cholesky(covariance)
    )
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
        vm.LinearPredictor(["a"]).double(),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(),
        shared=["a"],
    )
    fit = vm.fit(model, tasks(1, 1.0), vm.Implicit("laplace"), num_steps=1, compile=False)
    assert fit.standard_errors is None
    assert "no standard errors: Laplace" in str(fit)


@pytest.mark.parametrize(
    ("strategy", "dtype", "covariate"),
    [
        (vm.Joint, dtype, covariate)
        for dtype in (torch.float64, torch.float32)
        for covariate in (False, True)
    ]
    + [(vm.Implicit, torch.float64, False)],
)
def test_adaptation_reaches_the_posterior_under_a_singular_prior(
    strategy: type[vm.Joint | vm.Implicit], dtype: torch.dtype, covariate: bool
) -> None:
    """Counts whose log rate is (0.1 + 0.5 z) + (0.4 - 0.02 z) dose: one number z per task,
    integrated on a grid.
    """
    dose = torch.linspace(0, 2, 8, dtype=torch.float64)
    counts = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6], dtype=torch.float64)
    x = torch.stack([torch.ones_like(dose), dose], -1)
    few = vm.TaskSet(
        [vm.Task((x, counts + k), features={"size": 0.3}, name=f"task {k}") for k in range(3)],
        dtype=dtype,
    )
    prior = vm.GaussianPrior(1.0, "full", covariates={"a": ["size"]} if covariate else None)
    net = vm.LinearPredictor(["a", "dose"], intercept=False).to(dtype)
    model = vm.TaskModel(net, vm.likelihoods.Poisson(), prior)
    with warnings.catch_warnings():  # of a fit whose prior is replaced below
        warnings.simplefilter("ignore")
        fit = vm.fit(model, few, strategy("multivariate_normal"), num_steps=1)
    # what the fit keeps of a lost direction, in doubles; float32 cannot hold as little
    left = 0.02 * (1e-6 if dtype == torch.float64 else 1e-3)
    eta = fit.run.eta
    factor = torch.tensor([[0.5, 0.0], [-0.02, left]], dtype=dtype)
    eta["log_precision"], eta["prior_tril"] = log_precision_and_tril(factor)
    eta["a"], eta["dose"] = torch.tensor(0.1, dtype=dtype), torch.tensor(0.4, dtype=dtype)
    if covariate:
        eta["a:size"] = torch.tensor(1.0, dtype=dtype)
    posterior = fit.adapt(few)  # its warnings are errors here

    z = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    start = 0.1 + 0.3 * covariate
    rate = (start + 0.5 * z + (0.4 - 0.02 * z) * dose.unsqueeze(-1)).exp()
    for k in range(3):
        log_p = ((counts + k).unsqueeze(-1) * rate.log() - rate).sum(0) - z.square() / 2
        p = (log_p - log_p.logsumexp(0)).exp()
        mean = float((p * z).sum())
        sd = float((p * (z - mean).square()).sum().sqrt())
        # a Gaussian at cubature's points is not quite the posterior: 0.3 % of its sd
        row = posterior.frame().iloc[k]
        assert float(row["mean", "a"]) == pytest.approx(start + 0.5 * mean, abs=2e-3)
        assert float(row["mean", "dose"]) == pytest.approx(0.4 - 0.02 * mean, abs=1e-4)
        assert float(row["sd", "a"]) == pytest.approx(0.5 * sd, rel=1e-2)
        assert float(row["sd", "dose"]) == pytest.approx(0.02 * sd, rel=1e-2)


def test_a_singular_fit_far_from_zero_has_the_standard_errors_of_centred_columns() -> None:
    """x = 1000 plus thousandths: the curvature of a task's guide is singular but for rounding."""
    xs = [
        [1000.00017806, 1000.00213222, 1000.00130411, 1000.00149238, 1000.00046781, 999.99898095],
        [999.99959626, 999.99956108],
        [1000.00004958, 1000.0009354, 1000.00016452, 999.99885126, 999.999805],
    ]
    ys = [
        [0.59837704, -2.62082904, -2.36084633, -2.06299713, -0.34652713, 3.09956725],
        [0.87850323, 1.85365508],
        [1.9793995, 0.94432048, 0.35207002, 0.40006876, 0.9575475],
    ]
    tasks = vm.TaskSet(
        [vm.Task((np.array(x)[:, None], np.array(y))) for x, y in zip(xs, ys, strict=True)]
    )
    torch.manual_seed(0)
    model = vm.TaskModel(
        torch.nn.Linear(1, 1).double(),
        vm.likelihoods.Gaussian(0.5),
        vm.GaussianPrior(learn_precision="full"),
    )
    with pytest.warns(RuntimeWarning, match="singular"):
        fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    assert "converged" in str(fit)
    centred = vm.TaskSet(
        [vm.Task((np.array(x)[:, None] - 1000.0, np.array(y))) for x, y in zip(xs, ys, strict=True)]
    )
    with pytest.warns(RuntimeWarning, match="singular"):
        near = vm.fit(model, centred, vm.Joint("multivariate_normal"))
    assert fit.standard_errors is not None and near.standard_errors is not None
    assert fit.loss == pytest.approx(near.loss, abs=1e-6)
    assert float(fit.standard_errors["weight"]) == pytest.approx(
        float(near.standard_errors["weight"]), rel=1e-4
    )
