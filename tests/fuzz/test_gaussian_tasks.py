"""Gaussian regressions over odd data, against what fifty digits say."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import varmeta as vm
from tests.fuzz import oracles
from tests.fuzz.made import Rows, examples, rows
from tests.fuzz.outcome import attempt, came_to
from varmeta.guides.kl import scale as scale_of

GUIDE = "multivariate_normal"
# A fit that comes to an end does so in fewer steps (43 at most of 40 examples); after 200 the
# others have none either.
FEW = 50
powers = st.sampled_from([0, 0, 0, -4, -2, 2, 4])


def model_of(
    data: Rows, prior: vm.GaussianPrior, scale: float = 1.0, learn_scale: bool = False
) -> vm.TaskModel:
    torch.manual_seed(0)
    net = torch.nn.Linear(data.xs[0].shape[1], 1).double()
    return vm.TaskModel(net, vm.likelihoods.Gaussian(scale, learn_scale=learn_scale), prior)


def vector(by_name: dict[str, torch.Tensor]) -> np.ndarray:
    """Weights in the design's order: the columns, then the intercept."""
    return torch.cat([by_name["weight"].flatten(), by_name["bias"].flatten()]).numpy()


def log_evidence(data: Rows, theta0: np.ndarray, precision: np.ndarray, scale: float) -> float:
    pairs = zip(data.designs, data.ys, strict=True)
    return sum(oracles.gaussian_task(x, y, theta0, precision, scale).log_evidence for x, y in pairs)


@examples(0.04)
@given(rows(), powers, powers)
def test_theta0_is_generalised_least_squares(data: Rows, precision: int, scale: int) -> None:
    given_prior = vm.GaussianPrior(10.0**precision)
    model = model_of(data, given_prior, 10.0**scale)

    def learned() -> tuple[vm.Fit, float | None]:
        found = vm.fit(model, data.tasks, vm.Joint(GUIDE), FEW, progress=False)
        return found, found.log_likelihood

    outcome = attempt(learned, "theta0")
    if outcome.value is None:
        return
    found, log_likelihood = outcome.value
    if (
        not found.converged
    ):  # which it says itself; that a fit of so many steps is not, is no surprise to warn of
        came_to("no number", "theta0")
        return
    width = data.xs[0].shape[1] + 1
    lambdas = np.full(width, 10.0**precision)
    best = oracles.least_squares_centre(data.designs, data.ys, lambdas, 10.0**scale)
    at = vector(found.prior.loc)
    said = log_evidence(data, at, lambdas, 10.0**scale)
    right = True
    if best is not None:
        lost = log_evidence(data, best, lambdas, 10.0**scale) - said
        right = lost <= 1e-5
    if log_likelihood is not None:
        # of a theta0 far from 0 the last digit alone, divided by the noise's sd, moves the evidence
        # by as much
        last_digit = (
            sum(float((np.abs(x) @ np.abs(at)).sum()) for x in data.designs) * 2.2e-16 / 10.0**scale
        )
        right &= abs(log_likelihood - said) <= 1e-6 + 1e-9 * abs(said) + last_digit
    outcome.must_be(right, "theta0")


@examples(0.04)
@given(rows(most_tasks=3), st.sampled_from(["shared", "per_parameter", "full"]), st.booleans())
def test_a_log_likelihood_is_that_of_the_estimates(
    data: Rows, learn: str, learn_scale: bool
) -> None:
    model = model_of(data, vm.GaussianPrior(learn_precision=learn), 0.5, learn_scale)

    def learned() -> tuple[vm.Fit, float | None]:
        found = vm.fit(model, data.tasks, vm.Joint(GUIDE), FEW, progress=False)
        return found, found.log_likelihood

    outcome = attempt(learned, f"learned {learn}")
    if outcome.value is None:
        return
    found, log_likelihood = outcome.value
    if log_likelihood is None:
        came_to("no number", f"learned {learn}")
        return
    scale = 0.5 if found.prior.scale is None else float(found.prior.scale)
    # of a dense prior the factor, not the covariance: far from 0, columns cancel what its rounding
    # leaves
    factor = scale_of(model.prior_distribution(found.eta)).numpy()
    factor = np.diag(factor) if factor.ndim == 1 else factor
    theta0 = vector(found.prior.loc)
    pairs = zip(data.designs, data.ys, strict=True)
    exact = sum(oracles.log_evidence(x, y, theta0, factor, scale) for x, y in pairs)
    outcome.must_be(abs(log_likelihood - exact) <= 1e-5 + 1e-7 * abs(exact), f"learned {learn}")


@examples(0.02)
@given(rows(most_tasks=3), rows(most_tasks=3), powers)
def test_adapt_is_the_conjugate_posterior(data: Rows, new: Rows, precision: int) -> None:
    if new.xs[0].shape[1] != data.xs[0].shape[1]:
        new = data
    model = model_of(data, vm.GaussianPrior(10.0**precision))
    # adapt takes eta as it is, so it need not be a good one
    learned = attempt(
        lambda: vm.fit(model, data.tasks, vm.Joint(GUIDE), 1, progress=False), "before adapt"
    )
    if learned.value is None:
        return
    outcome = attempt(lambda: learned.value.adapt(new.tasks), "adapt")
    if outcome.value is None:
        return
    mean, sd = outcome.value.mean, outcome.value.sd
    theta0, lambdas = vector(learned.value.prior.loc), vector(learned.value.prior.precision)
    right = True
    for i, (x, y) in enumerate(zip(new.designs, new.ys, strict=True)):
        exact = oracles.gaussian_task(x, y, theta0, lambdas, 1.0)
        ours = vector({name: value[i] for name, value in mean.items()})
        width = vector({name: value[i] for name, value in sd.items()})
        right &= bool(
            np.all(np.abs(ours - exact.mean) <= 1e-4 * exact.sd + 1e-9 * np.abs(exact.mean))
        )
        right &= bool(np.all(np.abs(width / exact.sd - 1.0) <= 1e-4))
    outcome.must_be(right, "adapt")


@examples(0.02)
@given(rows(most_tasks=4), powers)
def test_the_meta_gradient_is_that_of_the_closed_form(data: Rows, precision: int) -> None:
    """G = sum_i lambda/2 |theta_i* - theta0|^2 + f_i(theta_i*), so dG/dtheta0 = lambda sum_i
    (theta0 - theta_i*).
    """
    model = model_of(data, vm.GaussianPrior(10.0**precision))
    strategy = vm.Implicit("delta", "elbo")
    outcome = attempt(lambda: vm.meta_gradient(model, data.tasks, strategy), "meta-gradient")
    if outcome.value is None:
        return
    start = {name: value.detach() for name, value in model.net.named_parameters()}
    theta0, lambdas = vector(start), np.full(data.xs[0].shape[1] + 1, 10.0**precision)
    exact, size = np.zeros(len(theta0)), np.zeros(len(theta0))
    for x, y in zip(data.designs, data.ys, strict=True):
        task = oracles.gaussian_task(x, y, theta0, lambdas, 1.0)
        exact += lambdas * (theta0 - task.mean)
        size += lambdas * (np.abs(theta0) + np.abs(task.mean))
    ours = vector(outcome.value.grads)
    right = bool(np.all(np.abs(ours - exact) <= 1e-5 * np.abs(exact).max() + 1e-9 * size))
    outcome.must_be(right, "meta-gradient")


@examples(0.02)
@given(rows(most_tasks=4), powers)
def test_neighbours_do_not_matter(data: Rows, precision: int) -> None:
    """A task's posterior is the same alone and in company."""
    model = model_of(data, vm.GaussianPrior(10.0**precision))
    learned = attempt(
        lambda: vm.fit(model, data.tasks, vm.Joint(GUIDE), 1, progress=False), "before neighbours"
    )
    if learned.value is None:
        return
    together = attempt(lambda: learned.value.adapt(data.tasks), "together")
    if (
        together.value is not None and together.said
    ):  # of numbers that are doubted nothing is claimed
        came_to("doubted", "neighbours")
        return
    alone = [
        attempt(lambda i=i: learned.value.adapt(data.tasks[[i]]), "alone")
        for i in range(len(data.ys))
    ]
    if together.value is None or any(one.value is None for one in alone):
        assert together.value is None and together.refused, (
            "some are refused alone but not in company"
        )
        return
    for i, one in enumerate(alone):
        for name, value in one.value.mean.items():
            sd = one.value.sd[name][0]
            apart = (together.value.mean[name][i] - value[0]).abs() - 1e-9 * value[0].abs()
            one.must_be(bool((apart <= 1e-4 * sd).all()), "neighbours")
