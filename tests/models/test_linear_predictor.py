"""One parameter per column: any mixture of varying and shared coefficients, by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor, nn

import varmeta as vm
from tests.cases import ragged_tasks, seeded

GAUSSIAN, DENSE = vm.likelihoods.Gaussian(), vm.Joint("multivariate_normal")


def radon(x: list[str]) -> vm.TaskSet:
    return vm.TaskSet.from_frame(
        vm.datasets.radon(as_frame=True), task="county", x=x, y="log_radon"
    )


def full(columns: list[str], **options: Any) -> vm.TaskModel:
    return vm.TaskModel(
        vm.LinearPredictor(columns), GAUSSIAN, vm.GaussianPrior(learn_precision="full"), **options
    )


def log_likelihood(
    tasks: vm.TaskSet, fixed: np.ndarray, covariance: np.ndarray, sigma: float
) -> float:
    """Of `y ~ 1 + floor + log_uppm + (1 + floor | county)`, county by county: y ~ N(X b, Z S Z' +
    sigma^2 I).
    """
    total = 0.0
    for task in tasks:
        assert task.support is not None
        x, y = (part.numpy() for part in task.support)
        design = np.column_stack([np.ones(len(x)), x])
        z = design[:, :2]
        total += multivariate_normal(
            design @ fixed, z @ covariance @ z.T + sigma**2 * np.eye(len(x))
        ).logpdf(y)
    return total


def test_some_coefficients_vary_and_others_do_not() -> None:
    """log_radon ~ floor + log_uppm + (1 + floor | county), against the marginal likelihood
    itself.
    """
    tasks = radon(["floor", "log_uppm"])
    fit = vm.fit(full(["floor", "log_uppm"], shared=["log_uppm"]), tasks, DENSE)
    assert (
        fit.converged
        and fit.prior.labels == ("intercept", "floor")
        and set(fit.prior.shared) == {"log_uppm"}
    )
    both = fit.prior.loc | fit.prior.shared
    fixed = np.array([float(both[name]) for name in ("intercept", "floor", "log_uppm")])
    assert fit.prior.scale is not None
    at = fixed, fit.prior.covariance.numpy(), float(fit.prior.scale)
    best = log_likelihood(tasks, *at)
    assert -fit.loss == pytest.approx(best, abs=1e-8)
    for index in range(3):  # it is the maximum: no coefficient wants to move
        moved = [
            log_likelihood(tasks, fixed + step * np.eye(3)[index], *at[1:])
            for step in (-1e-3, 1e-3)
        ]
        assert abs(moved[1] - moved[0]) / 2e-3 < 1e-3 and max(moved) < best


def test_it_is_a_linear_layer_with_names() -> None:
    tasks = radon(["floor"])
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    nets = nn.Linear(1, 1), vm.LinearPredictor(tasks.x_names or ())
    layer, named = (vm.fit(vm.TaskModel(net, GAUSSIAN, prior), tasks, DENSE) for net in nets)
    assert named.loss == pytest.approx(layer.loss, abs=1e-7)
    assert float(named.prior.loc["floor"]) == pytest.approx(
        float(layer.prior.loc["weight"]), abs=1e-5
    )


def test_an_intercept_alone() -> None:
    """log_radon ~ 1 + (1 | county): lme4's maximum likelihood, with x=[] and with an x that is one
    column.
    """
    fit = vm.fit(full([]), radon([]), DENSE)
    assert -fit.loss == pytest.approx(-1090.286854764, abs=1e-5)
    assert float(fit.prior.loc["intercept"]) == pytest.approx(1.349527292, abs=1e-5)
    assert float(fit.prior.sd["intercept"]) == pytest.approx(0.29390247759, rel=1e-4)
    assert fit.posterior().predict(np.zeros((2, 0)), 10).samples.shape == (10, 85, 2)


def test_without_an_intercept() -> None:
    net = vm.LinearPredictor(["a", "b"], intercept=False)
    x = torch.randn(5, 2)
    with torch.no_grad():
        net.a.fill_(2.0)  # type: ignore[operator, union-attr]
        net.b.fill_(-1.0)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(net(x), 2 * x[:, 0] - x[:, 1])
    assert (
        repr(net) == "LinearPredictor(a, b)"
        and repr(vm.LinearPredictor(["a"])) == "LinearPredictor(intercept, a)"
    )


def test_dots_are_in_labels_and_not_in_parameters() -> None:
    """A name that torch takes for a path, and an intercept that is called otherwise."""
    frame = vm.datasets.radon(as_frame=True).rename(columns={"floor": "is.floor"})
    tasks = vm.TaskSet.from_frame(frame, task="county", x=["is.floor"], y="log_radon")
    net = vm.LinearPredictor(["is.floor"], intercept="Intercept")
    prior = vm.GaussianPrior(learn_precision="full")
    fit = vm.fit(vm.TaskModel(net, GAUSSIAN, prior), tasks, DENSE)
    plain = vm.fit(full(["floor"]), radon(["floor"]), DENSE)
    assert fit.prior.labels == ("Intercept", "is.floor")
    assert set(fit.prior.loc) == {"Intercept", "is_floor"}
    assert fit.loss == pytest.approx(plain.loss, abs=1e-9)
    standard, scaling = tasks.standardized()
    raw = scaling.raw_prior(vm.fit(fit.model, standard, DENSE))
    torch.testing.assert_close(raw.loc["Intercept"], fit.prior.loc["Intercept"], rtol=1e-4, atol=0)


def test_names_that_are_patterns_are_names_first() -> None:
    model = vm.TaskModel(vm.LinearPredictor(["dose [mg]", "age"]), GAUSSIAN, shared=["dose [mg]"])
    assert model.shared == ("dose [mg]",)


def test_columns_in_another_order_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"the network's columns are \['log_uppm', 'floor'\], but those of x are \['floor',",
    ):
        vm.fit(full(["log_uppm", "floor"]), radon(["floor", "log_uppm"]), DENSE)


@pytest.mark.parametrize(
    ("columns", "options", "error", "match"),
    [
        (
            "age",
            {},
            TypeError,
            "columns must list the names of x's columns, such as tasks.x_names, not 'age'",
        ),
        (None, {}, TypeError, "such as tasks.x_names, not None"),
        (["age", "age"], {}, ValueError, "the column name 'age' comes twice"),
        (["intercept"], {}, ValueError, "the column name 'intercept' comes twice"),
        (["log.dose", "log_dose"], {}, ValueError, "the column name 'log_dose' comes twice"),
        (["dose"], {"intercept": "dose"}, ValueError, "the column name 'dose' comes twice"),
        (["type"], {}, ValueError, "'type' cannot name a parameter"),
        ([""], {}, ValueError, "'' cannot name a parameter"),
        ([], {"intercept": False}, ValueError, "nothing to learn"),
    ],
)
def test_what_is_refused(columns: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        vm.LinearPredictor(columns, **options)


# -- standardised fits in raw units ----------------------------------------------------------------


def in_raw_units(model: vm.TaskModel, tasks: vm.TaskSet) -> tuple[vm.LearnedPrior, vm.LearnedPrior]:
    """The prior learned from standardised tasks and brought back, and the one learned in raw
    units.
    """
    standard, scaling = tasks.standardized()
    return scaling.raw_prior(vm.fit(model, standard, DENSE)), vm.fit(model, tasks, DENSE).prior


def assert_same_prior(one: vm.LearnedPrior, other: vm.LearnedPrior) -> None:
    def close(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-6)

    assert one.labels == other.labels
    close(one.covariance, other.covariance)
    for name in one.loc:
        close(one.loc[name], other.loc[name])
        close(one.sd[name], other.sd[name])
        close(one.precision[name], other.precision[name])
    for name in one.shared:
        close(one.shared[name], other.shared[name])
    assert one.scale is not None and other.scale is not None and one.scale.shape == ()
    close(one.scale, other.scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (full(["floor", "log_uppm"], shared=["log_uppm"]), radon(["floor", "log_uppm"])),
        lambda: (
            vm.TaskModel(nn.Linear(1, 1), GAUSSIAN, vm.GaussianPrior(learn_precision="full")),
            vm.datasets.radon(),
        ),
        lambda: (
            vm.TaskModel(
                nn.Linear(1, 1),
                GAUSSIAN,
                vm.GaussianPrior(learn_precision="full"),
                shared=["weight"],
            ),
            vm.datasets.radon(),
        ),
        lambda: (full(["day"]), vm.datasets.rats(centre=False)),
    ],
    ids=["some shared", "linear layer", "linear layer, slope shared", "rats, not centred"],
)
def test_the_raw_prior_is_that_of_the_raw_fit(make: Any) -> None:
    assert_same_prior(*in_raw_units(*make()))


def test_an_uncorrelated_prior_gains_a_correlation() -> None:
    """Independent intercept and slope at the mean of x are correlated at its origin."""
    model = vm.TaskModel(
        nn.Linear(1, 1), GAUSSIAN, vm.GaussianPrior(learn_precision="per_parameter")
    )
    standard, scaling = vm.datasets.radon().standardized()
    fit = vm.fit(model, standard, DENSE)
    raw, x = scaling.raw_prior(fit), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert abs(float(raw.correlation[0, 1])) > 0.01 and "correlations of the prior" in str(raw)
    # the mean and spread of a new county's line, in both units
    theta = torch.distributions.MultivariateNormal(
        fit.prior.covariance.new_zeros(2), fit.prior.covariance
    )
    draws = theta.sample((200_000,)) + torch.stack(
        [fit.prior.loc["weight"].squeeze(), fit.prior.loc["bias"].squeeze()]
    )
    lines = scaling.y_inverse(
        ((x - scaling.x_loc) / scaling.x_scale) @ draws[:, :1].T + draws[:, 1]
    )
    design = torch.cat([x, torch.ones_like(x)], -1)
    mean = design @ torch.cat([raw.loc["weight"].flatten(), raw.loc["bias"]])
    torch.testing.assert_close(lines.mean(1), mean, rtol=0, atol=3e-3)
    torch.testing.assert_close(
        lines.var(1), ((design @ raw.covariance) * design).sum(-1), rtol=2e-2, atol=0
    )


def test_counts_are_not_scaled_but_their_predictors_are() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"g": np.arange(120) % 12, "x": rng.uniform(10, 20, 120)})
    frame["y"] = rng.poisson(np.exp(0.1 * frame["x"] - 0.5 + 0.3 * rng.normal(size=12)[frame["g"]]))
    tasks = vm.TaskSet.from_frame(frame, task="g", x=["x"], y="y")
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]),
        vm.likelihoods.Poisson(),
        vm.GaussianPrior(learn_precision="full"),
        shared=["x"],
    )
    raw, direct = in_raw_units(model, tasks)
    assert raw.scale is None
    assert float(raw.shared["x"]) == pytest.approx(float(direct.shared["x"]), rel=1e-4)
    assert float(raw.loc["intercept"]) == pytest.approx(float(direct.loc["intercept"]), rel=1e-4)


def test_raw_prior_refuses_what_it_cannot_say() -> None:
    standard, scaling = vm.datasets.radon().standardized()

    def fit(net: nn.Module, tasks: vm.TaskSet = standard, **options: Any) -> vm.Fit:
        return vm.fit(vm.TaskModel(net, GAUSSIAN, **options), tasks, DENSE, num_steps=1)

    network = seeded(lambda: nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)))
    with pytest.raises(
        TypeError, match="raw_prior needs a linear model.*not a Sequential.*scaling.y_inverse"
    ):
        scaling.raw_prior(fit(network, ragged_tasks(2)))
    with pytest.raises(
        ValueError, match="the slopes vary between tasks but the intercept is shared"
    ):
        scaling.raw_prior(fit(nn.Linear(1, 1), shared=["bias"]))
    with pytest.raises(ValueError, match="the data were centred but the model has no intercept"):
        scaling.raw_prior(fit(nn.Linear(1, 1, bias=False)))
    with pytest.raises(ValueError, match="the scaling is of 2 columns of x, but the model has 1"):
        vm.datasets.radon(True).standardized()[1].raw_prior(fit(nn.Linear(1, 1)))
