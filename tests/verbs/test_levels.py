"""The level of an interval is a probability, whoever is asked for one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import varmeta as vm
from varmeta.posteriors import calibration, metrics


@cache
def fit(hyperguide: str = "delta") -> vm.Fit:
    model = vm.TaskModel(
        vm.LinearPredictor(["x"]),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="shared"),
    )
    return vm.fit(
        model, vm.datasets.lines(8, num_query=3, noise=0.3), hyperguide=hyperguide, progress=False
    )


ONE = torch.ones(3)
ASKED: dict[str, Callable[[Any], Any]] = {
    "hyperparameters": lambda level: fit("multivariate_normal").hyperparameters(level=level),
    "score": lambda level: fit().posterior().score(level=level),
    "interval": lambda level: fit().posterior().predict([[0.0]]).interval(level),
    "compare": lambda level: vm.compare(
        {"joint": vm.Joint()}, fit().model, fit().tasks, fit().tasks, seeds=1, budget=2, level=level
    ),
    "plot_prior_curves": lambda level: vm.plot.plot_prior_curves(
        fit(), [[0.0], [1.0]], level=level
    ),
    "metrics.normal": lambda level: metrics.normal(
        ONE[:, None], ONE[:, None, None], ONE[:, None], level
    ),
    "calibration.interval_coverage": lambda level: calibration.interval_coverage(
        ONE[:, None], ONE[:1], level
    ),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("level", [5, 90, 0, 1, -0.5, math.nan])
def test_a_level_that_is_no_probability_is_refused(name: str, level: float) -> None:
    with pytest.raises(
        ValueError, match=f"level must be a probability between 0 and 1, such as 0.9, not {level}"
    ):
        ASKED[name](level)


@pytest.mark.parametrize("name", ASKED)
def test_a_level_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="level must be a probability"):
        ASKED[name]("90 %")


def test_a_level_decides_how_wide_an_interval_is() -> None:
    half, most = (fit("multivariate_normal").hyperparameters(level=level) for level in (0.5, 0.95))
    assert bool((most["low"] < half["low"]).all() and (half["high"] < most["high"]).all())
