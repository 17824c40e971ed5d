"""What every figure keeps to: where it draws, what it returns, how large it is, and that it can be
read, alone and in the column of a journal, with four tasks and with 160.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import varmeta as vm
from tests.cases import known, net_model
from tests.plot.test_plot import table
from varmeta import plot

FIGURES = [name for name in plot.__all__ if name.startswith("plot_")]
# what fits on a screen and a sheet of paper, and a column of a journal, in inches
PAGE, COLUMN = (10.0, 12.0), (3.3, 2.6)


@cache
def regression(number: int) -> vm.Fit:
    tasks = vm.datasets.lines(number, 4, 3, noise=0.5, seed=3, dtype=torch.float64)
    net = vm.LinearPredictor(["x"])
    model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full"))
    with warnings.catch_warnings():  # four tasks say little of a covariance
        warnings.simplefilter("ignore", RuntimeWarning)
        return vm.fit(model, tasks)


@cache
def network(number: int) -> vm.Fit:
    tasks = vm.datasets.sinusoids(number, 4, 3, dtype=torch.float64)
    return known(net_model(vm.GaussianPrior(3.0)), tasks, vm.Joint("normal"))


@cache
def landscape(number: int) -> vm.Landscape:
    at = torch.linspace(0, 6, number, dtype=torch.float64)[:, None]
    return vm.Landscape.of(lambda t, c: torch.sin(3 * t + c[..., 0]) + 0.2 * t**2, 1.0, at)


# for each figure: how it is called, and how many axes it takes
CALLS: dict[str, tuple[Callable[..., Any], int]] = {
    "plot_anchored_loss": (
        lambda n, **at: plot.plot_anchored_loss(landscape(n), 1.3, -2.6, 2.6, **at),
        1,
    ),
    "plot_comparison": (lambda n, **at: plot.plot_comparison(table(), "coverage", **at), 1),
    "plot_curves": (
        lambda n, **at: plot.plot_curves(
            regression(n).posterior(), None, list(regression(n).tasks.names[:2]), **at
        ),
        2,
    ),
    "plot_gaps": (lambda n, **at: plot.plot_gaps(np.linspace(-0.1, 2.0, n), **at), 1),
    "plot_minima": (lambda n, **at: plot.plot_minima(landscape(n), -3, 3, num_anchors=61, **at), 1),
    "plot_objectives": (
        lambda n, **at: plot.plot_objectives(landscape(n), -3, 3, num_anchors=61, **at),
        1,
    ),
    "plot_posteriors": (lambda n, **at: plot.plot_posteriors(regression(n), "x", **at), 1),
    "plot_prior": (lambda n, **at: plot.plot_prior(regression(n), **at), 2),
    "plot_prior_curves": (lambda n, **at: plot.plot_prior_curves(regression(n), **at), 1),
    "plot_shrinkage": (lambda n, **at: plot.plot_shrinkage(regression(n), **at), 1),
    "plot_weights": (lambda n, **at: plot.plot_weights(regression(n).posterior(), **at), 2),
}


def word_of(name: str) -> str:
    """`ax` or `axes`, whichever the figure takes."""
    words = set(inspect.signature(getattr(plot, name)).parameters) & {"ax", "axes"}
    assert len(words) == 1
    return words.pop()


def test_all_are_looked_at() -> None:
    assert sorted(CALLS) == sorted(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("number", [4, 160])
def test_a_figure_of_its_own_is_one_page(name: str, number: int) -> None:
    made = CALLS[name][0](number)
    (figure,) = map(plt.figure, plt.get_fignums())
    assert (figure.get_size_inches() <= PAGE).all()
    if word_of(name) == "ax":
        assert figure.axes == [made]
    else:
        assert made.ndim == 2 and list(made.flat) == figure.axes
    assert all(ax.get_title() for ax in figure.axes)
    assert_readable(figure)


@pytest.mark.parametrize("name", FIGURES)
def test_it_draws_on_the_axes_that_it_is_given_and_nowhere_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("it opened a window"))
    call, number = CALLS[name]
    figure = plt.figure(figsize=(6.8, 4.0), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axes, other = right.subplots(1, number, squeeze=False), left.subplots()
    settings = dict(mpl.rcParams)
    one = word_of(name) == "ax"
    made = call(8, **({"ax": axes[0, 0]} if one else {"axes": list(axes[0])}))
    assert made is axes[0, 0] if one else np.array_equal(made, axes)
    assert all(ax.has_data() for ax in axes.flat)
    assert plt.get_fignums() == [figure.number] and set(figure.axes) == {*axes.flat, other}
    assert not (other.has_data() or other.get_title() or figure.legends or right.legends)
    assert tuple(figure.get_size_inches()) == (6.8, 4.0) and dict(mpl.rcParams) == settings


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("number", [4, 160])
def test_it_can_be_read_in_a_column_of_a_journal(name: str, number: int) -> None:
    call, panels = CALLS[name]
    size = (COLUMN[0] * panels, COLUMN[1])
    figure, axes = plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)
    call(number, **({"ax": axes[0, 0]} if word_of(name) == "ax" else {"axes": axes}))
    assert_readable(figure)


def assert_readable(figure: Any) -> None:
    """No legend covers data, and no text leaves the figure."""
    figure.draw_without_rendering()
    page = figure.bbox.padded(2.0)
    for ax in figure.axes:
        legend, title = ax.get_legend(), ax.title.get_window_extent()
        assert page.containsx(title.x0) and page.containsx(title.x1)
        if legend is not None:
            inside = legend.get_window_extent().padded(-1.0)
            assert page.containsx(inside.x1)
            assert not any(inside.contains(*point) for point in drawn_on(ax))
    for legend in figure.legends:
        ends = legend.get_window_extent()
        assert page.containsx(ends.x0) and page.containsx(ends.x1)


def drawn_on(ax: Any) -> np.ndarray:
    """Where the points of curves and dots are on the screen; not lines across the axes."""
    parts = [line.get_xydata() for line in ax.lines if line.get_transform() == ax.transData]
    parts += [part.get_offsets() for part in ax.collections if len(part.get_offsets()) > 1]
    points = np.concatenate([np.zeros((0, 2)), *(np.asarray(part) for part in parts)])
    return ax.transData.transform(points[np.isfinite(points).all(1)])


def test_too_few_axes_are_refused() -> None:
    ax = plt.subplots()[1]
    for call in (CALLS[name][0] for name in FIGURES if word_of(name) == "axes"):
        with pytest.raises(ValueError, match="axes has 1 places, but 2 are drawn: give 2 axes"):
            call(4, axes=ax)


# -- fit.plot(), posterior.plot() ------------------------------------------------------------------


def test_a_fit_draws_its_prior_by_the_kind_of_model() -> None:
    weights = regression(8).plot()
    assert [ax.get_yticklabels()[0].get_text() for ax in weights.flat] == ["intercept", "x"]
    curves = network(8).plot(num_draws=5)
    assert curves.shape == (1, 1) and len(curves[0, 0].lines) == 6
    ax = plt.subplots()[1]
    assert network(8).plot(ax)[0, 0] is ax


def test_a_posterior_draws_curves_or_weights() -> None:
    curves = regression(160).posterior().plot(num_samples=20)
    assert curves.shape == (3, 4)
    assert curves[0, 0].get_title() == "line 3.0" and curves[2, 3].get_title() == "line 3.159"
    (legend,) = curves[0, 0].figure.legends
    assert legend.get_title().get_text() == "12 of 160 tasks"
    assert network(8).posterior().plot(num_samples=20).size == 8
    tasks = vm.TaskSet([vm.Task((torch.zeros(3, 0), torch.randn(3))) for _ in range(4)])
    model = vm.TaskModel(vm.LinearPredictor([]), vm.likelihoods.Gaussian(), vm.GaussianPrior(1.0))
    weights = known(model, tasks, vm.Joint("normal")).posterior().plot()
    assert [ax.get_xlabel() for ax in weights.flat] == ["intercept"]


def test_classes_over_one_predictor_have_no_curve_to_draw() -> None:
    tasks = vm.TaskSet([vm.Task((torch.randn(6, 1), torch.arange(6) % 3)) for _ in range(3)])
    model = vm.TaskModel(torch.nn.Linear(1, 3), vm.likelihoods.Categorical(3))
    fit = known(model, tasks, vm.Joint("normal"))
    assert fit.plot().shape == (6, 1) and fit.posterior().plot().shape == (1, 6)


def test_what_has_no_figure_says_so() -> None:
    from varmeta.display.drawn import Drawn

    with pytest.raises(TypeError, match="a Drawn has no figure of its own: see varmeta.plot"):
        Drawn().plot()


def test_matplotlib_is_imported_when_a_figure_is_drawn() -> None:
    import subprocess
    import sys

    code = "import sys, varmeta; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
