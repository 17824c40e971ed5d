"""Figures of pooling: where their arrows, densities and curves stand."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

import varmeta as vm
from tests.cases import known, linear_model, net_model, ragged_tasks
from varmeta.plot import (
    no_pooling,
    plot_posteriors,
    plot_prior_curves,
    plot_shrinkage,
    plot_weights,
)

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
    kept = pooled.std(0) / own.std(0)
    assert " ".join(ax.get_title().split()) == (
        f"pooling leaves, of the spread between tasks, {100 * kept[0]:.0f} % in intercept and "
        f"{100 * kept[1]:.0f} % in day"
    )
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
        assert trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1.0, abs=2e-2)
    prior = ax.lines[-1]
    assert prior.get_xdata()[np.argmax(prior.get_ydata())] == pytest.approx(
        float(fit.prior.loc["day"]), abs=0.05
    )


def test_of_many_tasks_the_intervals_are_drawn_sorted() -> None:
    """Densities of more than thirty cover each other."""
    tasks = vm.datasets.lines(160, 4, noise=0.5, dtype=torch.float64)
    prior = vm.GaussianPrior(learn_precision="full")
    fit = vm.fit(vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior), tasks)
    ax = plot_posteriors(fit, "x")
    mean, sd = (part["x"].numpy() for part in (fit.posterior().mean, fit.posterior().sd))
    order = np.argsort(mean)
    dots = next(line for line in ax.lines if line.get_label() == "means")
    np.testing.assert_allclose(dots.get_xdata(), mean[order])
    (bars,) = ax.collections
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * 1.645 * sd[order])
    # a row is wider than its line
    assert bars.get_linewidths()[0] < 72 * ax.bbox.height / ax.figure.dpi / 160
    out = int((np.abs(mean - float(fit.prior.loc["x"])) > 1.645 * sd).sum())
    assert f"{out} of 160 tasks leave theta0 out of their 90 %" in ax.get_title()


def test_weights_of_every_task_have_their_intervals_and_names() -> None:
    posterior = rats().posterior()
    axes = plot_weights(posterior)
    mean, sd = (part["intercept"].numpy() for part in (posterior.mean, posterior.sd))
    order = np.argsort(mean)
    names = [label.get_text() for label in axes[0, 0].get_yticklabels()]
    assert names == [posterior.names[index] for index in order]
    first, second = (ax.collections[0].get_segments() for ax in axes[0])
    np.testing.assert_allclose(
        [segment[:, 0] for segment in first],
        np.stack([mean - 1.645 * sd, mean + 1.645 * sd], -1)[order],
    )
    # the second weight in the order of the first
    slope = posterior.mean["day"].numpy()[order]
    np.testing.assert_allclose([segment[:, 0].mean() for segment in second], slope)
    low, high = mean.argmin(), mean.argmax()
    assert " ".join(axes[0, 0].get_title().split()) == (
        f"from {mean[low]:.3g} ({posterior.names[low]}) to {mean[high]:.3g} "
        f"({posterior.names[high]})"
    )
    assert plot_weights(posterior, ["day"])[0, 0].get_xlabel() == "day"
    with pytest.raises(ValueError, match="no weight is called 'days'.*did you mean 'day'"):
        plot_weights(posterior, ["days"])
    with pytest.raises(ValueError, match="weights must name some of"):
        plot_weights(posterior, [])


def test_weights_that_are_alike_have_no_digits_of_rounding() -> None:
    fit = known(linear_model(vm.GaussianPrior(1e30)), ragged_tasks(5), vm.Joint("normal"))
    left, right = plot_weights(fit.posterior(), ["bias"])[0, 0].get_xlim()
    assert right - left > 0.1


def test_curves_of_the_prior_have_its_spread() -> None:
    fit = rats()
    x = np.linspace(-14.0, 14.0, 15)
    ax = plot_prior_curves(fit, x, num_draws=7)
    assert len(ax.lines) == 8
    loc = fit.model.weights.flatten(fit.prior.loc).numpy()
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), loc[0] + loc[1] * x, rtol=0.02)
    assert_spread_is_the_priors(fit, x)


def assert_spread_is_the_priors(fit: vm.Fit, x: np.ndarray) -> None:
    ax = plot_prior_curves(fit, x)
    wide = next(part for part in ax.collections if part.get_label() == "90 % of new tasks")
    band = wide.get_paths()[0].vertices
    at = [fit.prior.labels.index(name) for name in ("intercept", "day", "bias", "weight")
          if name in fit.prior.labels]  # fmt: skip
    design = np.stack([np.ones_like(x), x], -1)
    covariance = fit.prior.covariance.numpy()[np.ix_(at, at)]
    sd = np.sqrt(np.einsum("nd,de,ne->n", design, covariance, design))
    heights = [np.ptp(band[np.isclose(band[:, 0], where), 1]) for where in x]
    np.testing.assert_allclose(heights, 2 * 1.645 * sd, rtol=0.12)


def test_the_data_stand_behind_the_priors_curves() -> None:
    fit = rats()
    dots = plot_prior_curves(fit).collections[0]
    rows = fit.tasks.batch().support
    seen = np.stack([rows.x[rows.mask].reshape(-1).numpy(), rows.y[rows.mask].numpy()], -1)
    assert dots.get_label() == "data"
    np.testing.assert_allclose(np.sort(dots.get_offsets().data, 0), np.sort(seen, 0))
    assert dots.get_zorder() < 1
    without = plot_prior_curves(fit, data=False)
    assert "data" not in without.get_legend_handles_labels()[1]
    line = without.lines[-1].get_xdata()
    assert (line[0], line[-1]) == (seen[:, 0].min(), seen[:, 0].max())


def test_the_title_says_where_new_tasks_differ_most() -> None:
    ax = plot_prior_curves(rats(), np.linspace(-14.0, 14.0, 15), level=0.8)
    band = next(part for part in ax.collections if part.get_label() == "80 % of new tasks")
    vertices = band.get_paths()[0].vertices
    at_end = vertices[np.isclose(vertices[:, 0], 14.0), 1]
    assert " ".join(ax.get_title().split()) == (
        f"new tasks differ most at day = 14: 80 % of them between {at_end.min():.3g} and "
        f"{at_end.max():.3g}"
    )


def test_the_priors_curves_are_the_priors_whatever_the_guide() -> None:
    """A point and a guide of independent weights cannot be a prior whose weights correlate."""
    x = np.linspace(-14.0, 14.0, 15)
    point = known(linear_model(vm.GaussianPrior(3.0)), ragged_tasks(3), vm.Implicit("delta"))
    assert_spread_is_the_priors(point, x)
    full = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["day"]), vm.likelihoods.Gaussian(), full)
    alone = vm.fit(model, vm.datasets.rats(), vm.Joint("normal"))
    assert abs(float(alone.prior.correlation[0, 1])) > 0.2
    assert_spread_is_the_priors(alone, x)


def test_curves_of_the_prior_in_the_datas_units() -> None:
    tasks, scaling = vm.datasets.rats().standardized()
    fit = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint())
    ax = plot_prior_curves(fit, scaling=scaling, labels=(None, "weight"))
    x = torch.cat([task.support[0].flatten() for task in vm.datasets.rats() if task.support])
    assert ax.get_ylabel() == "weight"
    assert ax.lines[0].get_xdata()[[0, -1]] == pytest.approx([float(x.min()), float(x.max())])
    assert ax.collections[0].get_offsets()[:, 1].min() > 100  # grams


def test_a_fit_without_its_tasks_draws_no_data(tmp_path: Path) -> None:
    fit = rats()
    fit.save(tmp_path / "rats.fit", data=False)
    bare = vm.load(tmp_path / "rats.fit", fit.model)
    ax = plot_prior_curves(bare, [0.0, 1.0])
    assert "data" not in ax.get_legend_handles_labels()[1]
    with pytest.raises(ValueError, match="saved without its tasks"):
        plot_prior_curves(bare)


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
    with pytest.raises(ValueError, match="each task has 10 weights.*name some of them"):
        plot_weights(net.posterior())
    three = vm.TaskModel(torch.nn.Linear(1, 3).double(), vm.likelihoods.Categorical(3))
    classes = vm.TaskSet([vm.Task(([[0.0], [1.0], [2.0]], [0, 1, 2]))]).to(torch.float64)
    of_classes = known(three, classes, vm.Joint("normal"))
    with pytest.raises(ValueError, match="a curve is of one number"):
        plot_prior_curves(of_classes, [0.0, 1.0])
