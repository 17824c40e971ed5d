"""The same data in other units, or from another origin, give the same fit: by default, from where
the model starts.
"""

from __future__ import annotations

import functools
import math
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.results.doubts import doubts


def fit(
    frame: pd.DataFrame,
    x: list[str],
    likelihood: vm.likelihoods.Likelihood,
    learn: str = "full",
    **options: list[str],
) -> vm.Fit:
    tasks = vm.TaskSet.from_frame(frame, task="task", x=x, y="y")
    model = vm.TaskModel(
        nn.Linear(len(x), 1), likelihood, vm.GaussianPrior(learn_precision=learn), **options
    )
    return vm.fit(model, tasks, vm.Joint("multivariate_normal"))


def frame(name: str) -> pd.DataFrame:
    if name == "rats":
        return vm.datasets.rats(as_frame=True).rename(
            columns={"rat": "task", "day": "x", "weight": "y"}
        )
    return vm.datasets.radon(as_frame=True).rename(
        columns={"county": "task", "floor": "x", "log_radon": "y"}
    )


@functools.cache
def plain_fit(name: str) -> vm.Fit:
    """In the units of the data: what the fits in all other units are compared with."""
    torch.manual_seed(0)  # the network's start, whichever test comes first
    if name == "counts":
        return fit(counts(), ["x"], vm.likelihoods.Poisson())
    return fit(frame(name), ["x"], vm.likelihoods.Gaussian())


@pytest.mark.parametrize("factor", [1e-4, 100.0, 1e6])
@pytest.mark.parametrize("name", ["radon", "rats"])
def test_other_units_of_the_response(name: str, factor: float) -> None:
    data, plain = frame(name), plain_fit(name)
    scaled = fit(data.assign(y=factor * data["y"]), ["x"], vm.likelihoods.Gaussian())
    assert plain.converged and scaled.converged
    assert scaled.loss - len(data) * math.log(factor) == pytest.approx(plain.loss, abs=1e-6)
    torch.testing.assert_close(
        scaled.prior.covariance / factor**2, plain.prior.covariance, rtol=1e-4, atol=0.0
    )


@pytest.mark.parametrize("change", [(0.01, 0.0), (1e3, 0.0), (1.0, 50.0)])
@pytest.mark.parametrize("name", ["radon", "rats"])
def test_other_units_and_origins_of_the_predictor(name: str, change: tuple[float, float]) -> None:
    data, plain = frame(name), plain_fit(name)
    scale, shift = change
    moved = fit(data.assign(x=scale * data["x"] + shift), ["x"], vm.likelihoods.Gaussian())
    assert moved.converged and moved.loss == pytest.approx(plain.loss, abs=1e-6)
    assert scale * float(moved.prior.sd["weight"]) == pytest.approx(
        float(plain.prior.sd["weight"]), rel=1e-4
    )


def counts() -> pd.DataFrame:
    """Poisson counts with a random slope on a predictor of size 20, where a slope of 1 is an
    overflow.
    """
    generator = torch.Generator().manual_seed(0)
    x = 40 * torch.rand(30, 8, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.03]) + torch.tensor([0.4, 0.02]) * torch.randn(
        30, 2, generator=generator
    )
    y = torch.poisson((weights[:, :1] + weights[:, 1:] * x).exp(), generator=generator)
    task = torch.arange(30).repeat_interleave(8)
    return pd.DataFrame({"task": task, "x": x.flatten(), "y": y.flatten().long()})


@pytest.mark.filterwarnings("ignore:the fit is singular")  # which it may be in any units
@pytest.mark.parametrize("factor", [0.05, 10.0])
def test_counts(factor: float) -> None:
    data, plain = counts(), plain_fit("counts")
    scaled = fit(data.assign(x=factor * data["x"]), ["x"], vm.likelihoods.Poisson())
    assert plain.converged and scaled.converged
    assert scaled.loss == pytest.approx(plain.loss, abs=1e-6)


def test_what_the_data_do_not_tell_apart_is_said() -> None:
    """One row per task: the intercept's spread and the noise are one number."""
    data = counts().groupby("task").head(1).assign(y=lambda d: d["y"] + 0.1 * d["x"] % 1.0)
    with pytest.warns(
        RuntimeWarning, match="can hardly tell log_precision.bias and log_scale apart"
    ):
        fit(data, ["x"], vm.likelihoods.Gaussian(), "per_parameter", shared=["weight"])
    twice = frame("radon").assign(z=lambda d: 2 * d["x"])
    with pytest.warns(RuntimeWarning, match="can hardly tell weight apart.*leave one out"):
        fit(twice, ["x", "z"], vm.likelihoods.Gaussian(), "per_parameter", shared=["weight"])


def test_a_fit_that_has_not_converged_warns_unless_the_user_chose_its_end() -> None:
    tasks = vm.datasets.radon()
    model = vm.TaskModel(
        nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = vm.fit(model, tasks, vm.Joint("multivariate_normal"), num_steps=2)
    assert not short.converged and doubts(short, own_end=True) == []
    assert doubts(short)[0].startswith(
        "the fit has not converged: after 2 Newton steps on the evidence: give more by num_steps"
    )


def test_noise_that_vanishes_is_called_out() -> None:
    """Two points per task and a line through both: the best noise is none, so no fit converges."""
    model = vm.TaskModel(nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    tasks = vm.datasets.lines(10, num_support=2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="noise scale runs to zero"):
        vm.fit(model, tasks, vm.Joint("delta"), num_steps=60)
    with pytest.warns(RuntimeWarning, match="has not converged"):
        vm.fit(model, tasks[:2], vm.Joint("delta"))


@pytest.mark.parametrize(
    ("x_by", "y_by", "y_from"), [(1.0, 1.0, 1e8), (1.0, 1e12, 0.0), (1e-12, 1.0, 0.0)]
)
def test_units_and_origins_alone_are_no_doubt(x_by: float, y_by: float, y_from: float) -> None:
    """A fit without a warning in plain units has none in others."""

    def fitted(x_by: float, y_by: float, y_from: float) -> vm.Fit:
        tasks = vm.datasets.lines(20, num_support=6, noise=0.3, dtype=torch.float64)
        rows = [(x_by * task.support[0], y_from + y_by * task.support[1]) for task in tasks]
        model = vm.TaskModel(
            nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full")
        )
        return vm.fit(model, vm.TaskSet([vm.Task(support=one) for one in rows]))

    plain, other = fitted(1.0, 1.0, 0.0), fitted(x_by, y_by, y_from)
    assert doubts(plain) == doubts(other) == []
    assert other.loss - 120 * math.log(y_by) == pytest.approx(plain.loss, abs=1e-6)


def test_rows_that_are_nearly_exact_are_no_doubt_of_the_prior() -> None:
    """The spread of the tasks' lines is found however exact their rows are."""
    tasks = vm.datasets.lines(20, num_support=6, noise=0.0, dtype=torch.float64)
    sds = []
    for scale in (1e-3, 1e-6):
        known = vm.likelihoods.Gaussian(scale, learn_scale=False)
        model = vm.TaskModel(nn.Linear(1, 1), known, vm.GaussianPrior(learn_precision="full"))
        fit = vm.fit(model, tasks)
        assert doubts(fit) == []
        sds.append(model.weights.flatten(fit.prior.sd))
    torch.testing.assert_close(sds[0], sds[1], rtol=1e-4, atol=0.0)


def test_a_response_that_does_not_vary_is_called_out_wherever_it_is() -> None:
    rows = vm.datasets.lines(5, num_support=6, dtype=torch.float64)
    model = vm.TaskModel(nn.Linear(1, 1).double(), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    for constant in (3.0, 1e8):
        parts = [task.support for task in rows]
        flat = [vm.Task(support=(x, torch.full_like(y, constant))) for x, y in parts]
        with pytest.warns(RuntimeWarning) as said:
            vm.fit(model, vm.TaskSet(flat), vm.Joint("multivariate_normal"))
        sentences = [str(one.message) for one in said]
        assert any("noise scale runs to zero" in one for one in sentences)
        assert not any("weights explain nothing" in one for one in sentences)
