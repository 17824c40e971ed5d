"""Figures show what they say: the numbers behind them, in one order, with their intervals and their
words.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import known, linear_model, net_model, ragged_tasks, seeded
from varmeta.plot import plot_comparison, plot_curves, plot_prior
from varmeta.plot.curve_values import NOISE_POINTS, curves
from varmeta.posteriors.prediction import Prediction

GRID = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)


# -- comparison ------------------------------------------------------------------------------------

METHODS = [
    "first",
    "a method with a long name in many words",
    "last",
    "failed by far",
    "failed in every run",
]


def table() -> pd.DataFrame:
    means = {
        "log_density": [-0.5, -0.2, -1.0, -60.0, np.nan],
        "rmse": [0.3, 0.4, 0.2, 0.35, np.nan],
        "coverage": [0.95, 0.6, 0.89, 0.2, np.nan],
    }
    columns = {}
    for metric, values in means.items():
        spread = 0.1 * np.abs(values)
        columns |= {
            metric: values,
            f"{metric}_low": values - spread,
            f"{metric}_high": values + spread,
        }
    return pd.DataFrame(columns, index=pd.Index(METHODS, name="method"))


def names_on(ax: Any) -> list[str]:
    return [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()][::-1]


@pytest.mark.parametrize("metric", ["log_density", "rmse", "coverage"])
def test_methods_stand_in_one_order(metric: str) -> None:
    assert names_on(plot_comparison(table(), metric)) == [METHODS[1], METHODS[0], *METHODS[2:]]


def test_without_a_log_density_the_score_itself_orders() -> None:
    others = table().drop(columns=[name for name in table() if name.startswith("log_density")])
    assert names_on(plot_comparison(others, "rmse"))[:2] == ["last", "first"]
    # coverage by its distance from the nominal level
    assert names_on(plot_comparison(others, "coverage", level=0.9))[:4] == [
        "last",
        "first",
        METHODS[1],
        METHODS[3],
    ]
    assert names_on(plot_comparison(others, "coverage", level=0.6))[0] == METHODS[1]


def test_points_and_intervals_are_the_tables() -> None:
    ax, numbers = plot_comparison(table(), "rmse"), table()
    (container,) = ax.containers
    line, caps, (bars,) = container.lines
    order = [METHODS.index(name) for name in names_on(ax)][::-1]
    assert np.allclose(line.get_xdata(), numbers["rmse"].iloc[order], equal_nan=True)
    segments = [
        segment for segment in bars.get_segments() if len(segment)
    ]  # none for the method without a score
    for ((left, _), (right, _)), row in zip(segments, order[1:], strict=True):
        assert (left, right) == pytest.approx(
            (numbers["rmse_low"].iloc[row], numbers["rmse_high"].iloc[row])
        )
    assert len(caps) == 2
    assert "mean and 95 % interval over seeds and tasks" in ax.get_xlabel()


def test_a_method_that_failed_by_far_stands_at_the_edge_with_its_interval() -> None:
    ax = plot_comparison(table())
    texts = {text.get_text() for text in ax.texts}
    assert texts == {"-60.00 [-66.00, -54.00]", "no score: every run failed"}
    assert -3.5 < ax.get_xlim()[0] < -1.1 and ax.get_xlim()[1] > -0.18
    assert any(line.get_marker() == "<" for line in ax.lines)
    assert not list(plot_comparison(table().iloc[:3]).texts)


def test_labels_are_wrapped_and_coverage_has_its_level() -> None:
    ax = plot_comparison(table(), "coverage", level=0.8)
    assert (
        max(len(line) for label in ax.get_yticklabels() for line in label.get_text().split("\n"))
        <= 26
    )
    assert ax.get_xlabel().startswith("coverage of the 80 % interval")
    assert any(np.allclose(line.get_xdata(), 0.8) for line in ax.lines)
    left, right = plot_comparison(
        table().assign(coverage_low=-2.0, coverage_high=3.0), "coverage"
    ).get_xlim()
    assert left >= -0.05 and right <= 1.05


def test_an_interval_of_a_share_ends_at_0_and_1() -> None:
    """Student's t over few seeds is wider than all that a share can be."""
    wide = table().iloc[:3].assign(coverage_low=-2.0, coverage_high=3.0, rmse_low=-1.0)
    for metric, least, most in (("coverage", 0.0, 1.0), ("rmse", 0.0, np.inf)):
        (container,) = plot_comparison(wide, metric).containers
        _, caps, (bars,) = container.lines
        ends = np.concatenate([segment[:, 0] for segment in bars.get_segments()])
        ends = np.concatenate([ends, *(cap.get_xdata() for cap in caps)])
        assert ends.min() == least and ends.max() <= most


def title_of(ax: Any) -> str:
    return " ".join(ax.get_title().split())


def test_the_title_names_the_best_method_and_how_sure_that_is() -> None:
    assert title_of(plot_comparison(table())) == (
        "a method with a long name in many words is highest (-0.2); its interval holds 0 other "
        "means"
    )
    assert title_of(plot_comparison(table(), "rmse")).startswith("last is lowest (0.2)")
    assert title_of(plot_comparison(table(), "coverage")).startswith("last is nearest to 90 %")
    near = table().assign(log_density_low=-2.0, log_density_high=0.0)
    assert title_of(plot_comparison(near)).endswith("its interval holds 2 other means")
    # one that has not settled may still move, and the title says so
    moving = near.assign(settled=[True, False, True, True, True])
    assert "is highest (-0.2, not settled); its interval holds" in title_of(plot_comparison(moving))
    # one without an interval is not called the best
    near.loc[METHODS[1], ["log_density_low", "log_density_high"]] = np.nan
    assert title_of(plot_comparison(near)).startswith("first is highest (-0.5)")
    none = near.assign(log_density_low=np.nan, log_density_high=np.nan)
    assert title_of(plot_comparison(none)) == "no method has an interval of this score"


def test_it_knows_its_scores() -> None:
    with pytest.raises(
        ValueError, match=r"unknown score 'error_rate': the table has \['log_density', 'rmse', 'cov"
    ):
        plot_comparison(table(), "error_rate")


# -- curves ----------------------------------------------------------------------------------------


def test_bands_of_numbers_are_exact_and_smooth() -> None:
    """A normal posterior and normal noise: quantiles by the formula, with draws enough only for the
    weights.
    """
    tasks = ragged_tasks(2)
    posterior = known(
        linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint("multivariate_normal")
    ).posterior()
    few = GRID[::10]
    drawn = curves(posterior, few.unsqueeze(-1), 20_000, 0)
    assert not drawn.of_mean and len(drawn.band.samples) == 20_000 * NOISE_POINTS
    q = posterior.distribution
    design = torch.stack([few, torch.ones_like(few)], -1)  # weight, bias
    mean = (design @ q.mean.squeeze(1).mT).mT
    sd = (
        torch.einsum("pi,tij,pj->tp", design, q.covariance_matrix.squeeze(1), design)
        .add(0.7**2)
        .sqrt()
    )
    low, high = drawn.band.interval(0.9)
    torch.testing.assert_close(
        low, mean - 1.645 * sd, rtol=0, atol=0.05
    )  # of 20,000 draws of the weights
    torch.testing.assert_close(high, mean + 1.645 * sd, rtol=0, atol=0.05)
    # a random number for each point of the grid would move each by some 0.05 from its neighbours
    low, _ = curves(posterior, GRID.unsqueeze(-1), 500, 0).band.interval(0.9)
    assert float(low.diff(n=2).abs().max()) < 0.04
    drawn = posterior.predict(GRID.unsqueeze(-1), 500)
    jagged, _ = Prediction(drawn.samples, drawn.mask, drawn.names).interval(0.9)
    assert float(jagged.diff(n=2).abs().max()) > 0.1


@pytest.mark.parametrize(
    "likelihood", [vm.likelihoods.Bernoulli(), vm.likelihoods.Poisson()], ids=repr
)
def test_bands_of_counts_are_of_the_mean(likelihood: Any) -> None:
    posterior = discrete(likelihood, [0, 1, 1, 0, 1])
    drawn = curves(posterior, GRID.unsqueeze(-1), 50, 0)
    assert drawn.of_mean and drawn.band is drawn.mean
    assert torch.equal(drawn.mean.samples, posterior.expected(GRID.unsqueeze(-1), 50).samples)


def discrete(likelihood: Any, y: Any, outputs: int = 1) -> vm.Posterior:
    x = np.linspace(-1, 1, len(y))[:, None]
    tasks = vm.TaskSet(
        [vm.Task((x, y), (x[:2], y[:2]), "a"), vm.Task((x[:3], y[:3]), name="b")], x_names=["dose"]
    )
    return known(
        vm.TaskModel(seeded(lambda: nn.Linear(1, outputs)), likelihood, vm.GaussianPrior(1.0)),
        tasks,
        vm.Joint(),
    ).posterior()


def legend_of(axes: Any) -> list[str]:
    figure = np.ravel(axes)[0].figure
    return [
        text.get_text()
        for text in (figure.legends or [np.ravel(axes)[0].get_legend()])[0].get_texts()
    ]


def test_the_legend_says_what_bands_and_dots_are() -> None:
    axes = plot_curves(
        discrete(vm.likelihoods.Gaussian(), np.array([0.0, 0.5, 1.0])),
        GRID,
        ["a", "b"],
        labels=(None, "weight (g)"),
    )
    assert legend_of(axes) == [
        "90 % of observations",
        "50 % of observations",
        "mean",
        "adapted to",
        "held out",
    ]
    figure = axes[0, 0].figure
    assert figure.get_supxlabel() == "dose" and figure.get_supylabel() == "weight (g)"
    assert [ax.get_title() for ax in axes[0]] == ["a", "b"]
    axes = plot_curves(discrete(vm.likelihoods.Poisson(), [0, 3, 1]), GRID, ["b"])
    assert legend_of(axes) == [
        "90 % of the mean",
        "50 % of the mean",
        "mean",
        "adapted to",
    ]


@pytest.mark.parametrize(
    ("number", "shape"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (7, (2, 4)), (20, (4, 5))]
)
def test_panels_stand_in_a_page(number: int, shape: tuple[int, int]) -> None:
    posterior = known(
        linear_model(vm.GaussianPrior(3.0)), ragged_tasks(20), vm.Joint("normal")
    ).posterior()
    axes = plot_curves(posterior, GRID, list(posterior.names[:number]), num_samples=10)
    assert axes.shape == shape
    width, height = axes[0, 0].figure.get_size_inches()
    assert width <= 10.0 and height <= 12.0
    assert [ax.get_visible() for ax in axes.flat].count(True) == number


def test_a_long_name_is_cut_at_its_beginning() -> None:
    names = [f"a very long name of a task that has the number {index}" for index in range(40)]
    tasks = vm.TaskSet([vm.Task(([[0.0], [1.0]], [0.0, 1.0]), name=name) for name in names])
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks.to(torch.float64), vm.Joint())
    titles = [
        ax.get_title() for ax in plot_curves(posterior.posterior(), None, names, num_samples=5).flat
    ]
    assert titles[39].startswith("…") and titles[39].endswith(" 39") and len(set(titles)) == 40


def test_without_x_the_grid_runs_over_the_tasks_rows() -> None:
    posterior = discrete(vm.likelihoods.Gaussian(), np.array([0.0, 0.5, 1.0]))
    line = plot_curves(posterior)[0, 1].lines[0].get_xdata()  # of both tasks
    assert (line[0], line[-1], len(line)) == (-1.0, 1.0, 101)
    # of a task without rows over those that were learned from
    fit = known(linear_model(vm.GaussianPrior(3.0)), ragged_tasks(2), vm.Joint("normal"))
    line = plot_curves(fit.adapt(vm.TaskSet([vm.Task(name="empty")])))[0, 0].lines[0].get_xdata()
    rows = torch.cat([part.x[part.mask].flatten() for part in all_parts(fit.tasks)])
    assert (line[0], line[-1]) == (float(rows.min()), float(rows.max()))


def all_parts(tasks: vm.TaskSet) -> list[Any]:
    batch = tasks.batch()
    return [part for part in (batch.support, batch.query) if part is not None]


def test_on_axes_of_ones_own() -> None:
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    axes = plot_curves(
        discrete(vm.likelihoods.Poisson(), [0, 3, 1]), GRID, ["a"], ax, labels=("mg", "n")
    )
    assert axes.shape == (1, 1) and axes[0, 0] is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("mg", "n") and "held out" in legend_of(ax)


def test_zeros_and_ones_are_drawn_apart_and_trials_as_shares() -> None:
    def dots(posterior: vm.Posterior) -> np.ndarray:
        return plot_curves(posterior, GRID, ["a"])[0, 0].collections[2].get_offsets()[:, 1].data

    y = [0, 1, 1, 0, 1]
    jittered = dots(discrete(vm.likelihoods.Bernoulli(), y))
    assert 0 < np.abs(jittered - y).max() < 0.05 and len(set(jittered)) == 5
    assert dots(discrete(vm.likelihoods.Poisson(), [0, 2, 1])).tolist() == [0, 2, 1]
    shares = dots(discrete(vm.likelihoods.Binomial(), [[1, 4], [3, 3], [0, 2]]))
    assert shares.tolist() == [0.25, 1.0, 0.0]


def test_curves_come_back_in_the_datas_units() -> None:
    tasks, scaling = vm.datasets.rats().standardized()
    posterior = known(linear_model(vm.GaussianPrior(3.0)), tasks, vm.Joint()).posterior()
    ax = plot_curves(posterior, GRID, ["1"], scaling=scaling)[0, 0]
    dots = ax.collections[2].get_offsets().data
    x, y = vm.datasets.rats()[0].support or ()
    assert np.allclose(dots[:, 0], x.flatten()) and np.allclose(dots[:, 1], y)
    line = ax.lines[0].get_xydata()
    assert np.allclose(line[:, 0], GRID * scaling.x_scale + scaling.x_loc)


@pytest.mark.parametrize(
    ("make", "tasks", "match"),
    [
        (
            lambda: discrete(vm.likelihoods.Poisson(), [0, 1]),
            ["c"],
            r"tasks must name some of \['a', 'b'\], ...; not \['c'\]",
        ),
        (lambda: discrete(vm.likelihoods.Poisson(), [0, 1]), [], "tasks must name some of"),
        (
            lambda: discrete(vm.likelihoods.Categorical(3), [0, 2], 3),
            ["a"],
            r"an observation has \(3,\) numbers",
        ),
        (
            lambda: known(net_of_two(), ragged_tasks(2, features=2), vm.Joint()).posterior(),
            ["sine 0"],
            r"drawn over one predictor, but a row of x has shape \(2,\)",
        ),
    ],
)
def test_what_has_no_curve(make: Any, tasks: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        plot_curves(make(), GRID, tasks)


def net_of_two() -> vm.TaskModel:
    return vm.TaskModel(
        seeded(lambda: nn.Linear(2, 1)), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0)
    )


def test_some_tasks_of_a_posterior_are_as_among_all() -> None:
    posterior = known(
        linear_model(vm.GaussianPrior(3.0)), ragged_tasks(4), vm.Joint("normal")
    ).posterior()
    some = posterior.take(["sine 3", "sine 1"])
    assert some.names == ("sine 3", "sine 1")
    torch.testing.assert_close(some.draws(5), posterior.draws(5)[:, [3, 1]], rtol=0, atol=0)
    with pytest.raises(KeyError, match="no task is called 'sine 9'"):
        posterior.take(["sine 9"])


# -- prior -----------------------------------------------------------------------------------------


def test_the_prior_is_drawn_with_its_intervals_and_the_tasks() -> None:
    fit = vm.fit(
        linear_model(vm.GaussianPrior(3.0)), vm.datasets.rats(), vm.Joint("multivariate_normal")
    )
    axes = plot_prior(fit)
    assert [ax.get_yticklabels()[0].get_text() for ax in axes[:, 0]] == ["day", "intercept"]
    assert legend_of(axes) == ["prior, 90 %", "prior, 50 %", "tasks' means", "theta0"]
    wide, narrow, dots, bar = axes[0, 0].collections
    loc, sd = float(fit.prior.loc["weight"]), float(fit.prior.sd["weight"])
    assert wide.get_segments()[0][:, 0] == pytest.approx([loc - 1.645 * sd, loc + 1.645 * sd])
    assert narrow.get_segments()[0][:, 0] == pytest.approx([loc - 0.674 * sd, loc + 0.674 * sd])
    assert dots.get_offsets()[:, 0].data == pytest.approx(
        fit.posterior().mean["weight"].flatten().numpy()
    )
    assert np.ptp(dots.get_offsets()[:, 1]) > 0.5 and bar.get_offsets()[0, 0] == pytest.approx(loc)


def test_many_weights_share_an_axis() -> None:
    axes = plot_prior(known(net_model(vm.GaussianPrior(3.0)), ragged_tasks(3), vm.Joint()), limit=8)
    assert axes.shape == (1, 1) and len(axes[0, 0].get_yticklabels()) == 8
    assert title_of(axes[0, 0]).endswith("8 of 10 weights shown")


def test_two_hundred_weights_stay_on_a_page() -> None:
    large = net_model(vm.GaussianPrior(3.0), width=66)
    ax = plot_prior(known(large, ragged_tasks(3), vm.Joint()), limit=199)[0, 0]
    assert ax.figure.get_size_inches()[1] <= 12.0
    assert ax.get_ylim()[0] > 198 and 20 < len(ax.get_yticklabels()) < 100


def test_curves_run_over_one_column_of_several() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(6):
        x = torch.rand(8, 2, generator=generator, dtype=torch.float64) * torch.tensor([4.0, 1.0])
        y = x @ torch.randn(2, generator=generator, dtype=torch.float64)
        y = y + 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
        tasks.append(vm.Task((x, y)))
    raw = vm.TaskSet(tasks, x_names=["dose", "age"])
    scaled, scaling = raw.standardized()
    model = vm.TaskModel(
        vm.LinearPredictor(["dose", "age"]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="per_parameter"),
    )
    for own, units in ((raw, None), (scaled, scaling)):
        posterior = vm.fit(model, own).posterior()
        figure, axes = plt.subplots(1, 2)
        vm.plot.plot_curves(posterior, None, list(raw.names[:2]), axes, scaling=units, over="age")
        line = axes[1].lines[0]
        assert axes[1].get_xlabel() == "age"
        ages = torch.as_tensor(line.get_xdata())
        dots = axes[1].collections[-1].get_offsets()
        assert np.allclose(np.asarray(dots[:, 0]), raw[1].support[0][:, 1])
        # the other column stays at its mean over the task's own rows
        rows = torch.stack([raw[1].support[0][:, 0].mean().expand(len(ages)), ages], -1)
        if units is not None:
            rows = (rows - units.x_loc) / units.x_scale
        mean = posterior.take([raw.names[1]]).expected(rows).mean[0]
        mean = mean if units is None else units.y_inverse(mean)
        assert np.allclose(line.get_ydata(), mean, atol=0.05)
        plt.close(figure)
    with pytest.raises(ValueError, match=r"no column of x is called 'ages'.* did you mean 'age'"):
        vm.plot.plot_curves(posterior, over="ages")
    with pytest.raises(ValueError, match=r"a row of x has shape \(2,\): see over="):
        vm.plot.plot_curves(posterior)
