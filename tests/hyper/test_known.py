"""Posteriors and evidence of linear Gaussian tasks at many eta: against dense covariances."""

from __future__ import annotations

import pytest
import torch

import varmeta as vm
from tests.linear_gaussian import MODELS, REGRESSIONS, dense_evidence, moved
from varmeta.hyper.conditional import conditionals
from varmeta.priors.factors import PRECISION

DENSE = vm.Joint("multivariate_normal")


@pytest.mark.parametrize("case", MODELS)
def test_at_many_eta_it_is_what_newton_and_dense_covariances_find(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tasks = MODELS[case]()
    batch, etas = tasks.batch(), [moved(model, seed) for seed in range(3)]
    rows = {name: torch.stack([eta[name] for eta in etas]) for name in etas[0]}
    found = conditionals(model, batch, rows, True)
    expected = torch.stack([dense_evidence(model, eta, tasks) for eta in etas])
    torch.testing.assert_close(found.log_evidence, expected, rtol=1e-9, atol=1e-9)
    assert bool(found.converged.all())
    assert not bool(found.factor.triu(1).any())  # densities solve with it as a triangle
    torch.testing.assert_close(found.factor @ found.factor.mT, found.covariance)
    monkeypatch.setattr(vm.TaskModel, "is_linear_gaussian", False)
    searched = conditionals(model, batch, rows, True)
    for name in ("log_evidence", "mode", "mean", "covariance"):
        mine, theirs = getattr(found, name), getattr(searched, name)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sd", [1e3, 1e6, 1e9])
def test_a_prior_far_wider_than_the_noise_loses_no_digit(sd: float) -> None:
    """One to three rows a task: the evidence of two equal rows, by the sum and the difference."""
    tasks = vm.TaskSet(
        [vm.Task((torch.zeros(n, 0).double(), torch.arange(float(n)).double())) for n in (1, 2, 3)]
    )
    prior = vm.GaussianPrior(learn_precision="shared")
    model = vm.TaskModel(vm.LinearPredictor([]).double(), vm.likelihoods.Gaussian(), prior)
    start = model.init(torch.zeros((), dtype=torch.float64))
    name = next(name for name in start if name.partition(".")[0] == PRECISION)
    eta = {key: value.unsqueeze(0) for key, value in start.items()}
    eta[name] = torch.full_like(eta[name], -2.0 * torch.tensor(sd).double().log())
    found = conditionals(model, tasks.batch(), eta, True)
    for k, n in enumerate((1, 2, 3)):
        # along the mean the variance is n sd^2 + 1, across it 1
        y, wide = torch.arange(float(n)).double(), torch.tensor(n * sd**2 + 1, dtype=torch.float64)
        across = (y - y.mean()).square().sum()
        expected = -0.5 * (across + n * y.mean() ** 2 / wide + wide.log() + n * 1.8378770664093453)
        assert float(found.log_evidence[0, k]) == pytest.approx(float(expected), rel=1e-10)
        assert float(found.factor[0, k]) == pytest.approx((n + sd**-2) ** -0.5, rel=1e-10)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of effective draws, and of sds at 0
@pytest.mark.parametrize("sizes", [[1, 2, 3, 1, 2, 3], [1, 1, 2, 1, 1, 2, 1], [2] * 6])
def test_a_posterior_of_eta_from_a_few_rows_a_task(sizes: list[int]) -> None:
    """Draws of eta reach sds that are millions of times the noise."""
    generator = torch.Generator().manual_seed(len(sizes))
    parts = []
    for n in sizes:
        x, theta = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (n, 2))
        noise = 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
        parts.append(vm.Task((x.unsqueeze(-1), theta[0] + theta[1] * x + noise)))
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["x"]).double(), vm.likelihoods.Gaussian(), prior)
    fit = vm.fit(model, vm.TaskSet(parts), DENSE, hyperguide="multivariate_normal")
    frame = fit.posterior().frame()
    assert torch.from_numpy(frame.to_numpy()).isfinite().all()


def test_tasks_without_rows_have_the_prior() -> None:
    model, _ = REGRESSIONS["full"]()
    eta = moved(model)
    none = vm.TaskSet([vm.Task((torch.zeros(0, 2).double(), torch.zeros(0).double()))] * 2)
    found = conditionals(model, none.batch(), {k: v.unsqueeze(0) for k, v in eta.items()}, True)
    prior = model.prior_distribution(eta)
    assert not bool(found.log_evidence.any())
    for i in range(2):
        torch.testing.assert_close(found.mean[0, i], prior.mean)
        torch.testing.assert_close(found.covariance[0, i], prior.covariance_matrix)


def test_networks_too() -> None:
    """Not every output is linear in all of eta."""
    assert not MODELS["head"]()[0].all_linear and REGRESSIONS["full"]()[0].all_linear
