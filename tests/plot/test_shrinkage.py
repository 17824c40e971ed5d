"""Figures of pooling: where their arrows, densities and curves stand."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

import varmeta as vm
from tests.cases import known, linear_model, net_model, ragged_tasks
from varmeta.plot import no_pooling, plot_posteriors, plot_prior_curves, plot_shrinkage

mpl.use("Agg")


def rats() -> vm.Fit:
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["day"]), vm.likelihoods.Gaussian(), prior)
    return vm.fit(model, vm.datasets.rats(), vm.Joint("multivariate_normal"))


def test_no_pooling_is_least_squares() -> None:
    """To the 1 % of one observation that keeps tasks with few rows proper."""
    fit = rats()
    found = no_pooling(fit)
    for task, row in zip(fit.tasks, found, strict=True):
        assert task.support is not None
        x, y = (part.numpy() for part in task.support)
        slope, intercept = np.polyfit(x.reshape(-1), y, 1)
        np.testing.assert_allclose(row.numpy(), [intercept, slope], rtol=5e-3)


def test_arrows_go_from_the_tasks_own_estimates_to_their_posteriors() -> None:
    fit = rats()
    ax = plot_shrinkage(fit)
    own, pooled = (collection.get_offsets() for collection in ax.collections[-2:])
    np.testing.assert_allclose(own, no_pooling(fit).numpy())
    np.testing.assert_allclose(pooled, fit.model.weights.flatten(fit.posterior().mean).numpy())
    loc = fit.model.weights.flatten(fit.prior.loc).numpy()
    # pooling draws towards theta0, in the prior's units
    inverse = np.linalg.inv(fit.prior.covariance.numpy())
    distance = [
        np.einsum("td,de,te->t", points - loc, inverse, points - loc) for points in (own, pooled)
    ]
    assert (distance[1] < distance[0]).mean() > 0.95
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("intercept", "day")
    assert len(ax.texts) == len(fit.tasks)
    swapped = plot_shrinkage(fit, ("day", "intercept"))
    assert swapped.get_xlabel() == "day"


def test_one_weight_and_tasks_without_data() -> None:
    tasks = vm.TaskSet(
        [vm.Task(([0.0, 0.0], [float(k), k + 1.0])) for k in range(3)] + [vm.Task(name="empty")]
    )
    model = vm.TaskModel(vm.LinearPredictor([]), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    data = vm.TaskSet(
        [
            vm.Task((torch.zeros(2, 0), t.support[1]) if t.support else None, name=t.name)
            for t in tasks
        ]
    )
    fit = known(model, data, vm.Implicit("normal"))
    ax = plot_shrinkage(fit)
    assert len(ax.texts) == 3 and ax.get_ylabel() == "intercept"


def test_densities_integrate_to_one() -> None:
    fit = rats()
    ax = plot_posteriors(fit, "day")
    assert len(ax.lines) == len(fit.tasks) + 1
    for line in ax.lines:
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1.0, abs=2e-2)
    prior = ax.lines[-1]
    assert prior.get_xdata()[np.argmax(prior.get_ydata())] == pytest.approx(
        float(fit.prior.loc["day"]), abs=0.05
    )


def test_curves_of_the_prior_have_its_spread() -> None:
    fit = rats()
    x = np.linspace(-14.0, 14.0, 15)
    ax = plot_prior_curves(fit, x, num_draws=7)
    assert len(ax.lines) == 8
    loc = fit.model.weights.flatten(fit.prior.loc).numpy()
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), loc[0] + loc[1] * x, rtol=0.02)
    band = ax.collections[0].get_paths()[0].vertices
    design = np.stack([np.ones_like(x), x], -1)
    sd = np.sqrt(np.einsum("nd,de,ne->n", design, fit.prior.covariance.numpy(), design))
    heights = [np.ptp(band[np.isclose(band[:, 0], at), 1]) for at in x]
    np.testing.assert_allclose(heights, 2 * 1.645 * sd, rtol=0.12)


def test_what_cannot_be_drawn() -> None:
    fit = known(linear_model(vm.GaussianPrior(1.0)), ragged_tasks(3), vm.Implicit("delta"))
    with pytest.raises(ValueError, match="no weight is called 'slope'; the labels are"):
        plot_shrinkage(fit, ("slope", "bias"))
    with pytest.raises(ValueError, match="points without a density"):
        plot_posteriors(fit, "bias")
    model = vm.TaskModel(torch.nn.Linear(2, 1).double(), vm.likelihoods.Gaussian())
    wide = known(model, ragged_tasks(3, features=2), vm.Implicit("normal"))
    with pytest.raises(ValueError, match="one predictor"):
        plot_prior_curves(wide, [0.0, 1.0])
    net = known(net_model(vm.GaussianPrior(1.0)), ragged_tasks(3), vm.Implicit("normal"))
    with pytest.raises(ValueError, match="num_draws"):
        plot_prior_curves(net, [0.0, 1.0], num_draws=0)
