"""A network on numbers far from those it starts with learns nothing, which `fit` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import varmeta as vm
from varmeta.models.responses import far_from_start

L = vm.likelihoods


def network(inputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1))


def model(net: nn.Module, likelihood: L.Likelihood | None = None) -> vm.TaskModel:
    return vm.TaskModel(net, likelihood or L.Gaussian(), vm.GaussianPrior())


def waves(x: float = 1.0, y: float = 1.0, shift: float = 0.0) -> vm.TaskSet:
    made = vm.datasets.sinusoids(6, 10, seed=0)
    return vm.TaskSet(
        [replace(t, support=(x * t.support[0] + shift, y * t.support[1]), query=None) for t in made]
    )


FAR: dict[str, tuple[vm.TaskSet, str]] = {
    "seconds": (waves(x=3600.0), "x has mean -1266 and sd 9313, but a network"),
    "years": (waves(shift=1980.0), "x has mean 19[0-9]* and sd 2.587"),
    "metres of a molecule": (waves(x=1e-9), "x has mean .*e-10"),
    "large y": (waves(y=1000.0), "y has mean .* and sd"),
    "small y": (waves(y=1e-3), "y has mean .* and sd 0.00"),
}


@pytest.mark.parametrize("what", FAR)
def test_fit_names_the_column_and_what_to_do(what: str) -> None:
    tasks, sentence = FAR[what]
    adam = torch.optim.Adam
    with pytest.warns(RuntimeWarning, match=sentence + r".*tasks.standardized\(model.likelihood\)"):
        vm.fit(model(network()), tasks, vm.Joint("delta"), 1, adam)
    # with a shared body the head is linear, and the body is not
    body = vm.TaskModel(network(), L.Gaussian(), vm.GaussianPrior(), shared=["0.*"])
    assert far_from_start(body, tasks) is not None
    scaled, _ = tasks.standardized(L.Gaussian())
    assert far_from_start(model(network()), scaled) is None


def test_columns_have_their_names() -> None:
    frame = pd.DataFrame({"g": [0, 0, 1], "a": [0.0, 1.0, 0.5], "year": [1980.0, 1990.0, 2000.0]})
    frame["y"] = [0.0, 1.0, 1.0]
    tasks = vm.TaskSet.from_frame(frame, task="g", x=["a", "year"], y="y")
    assert "x's column 'year' has mean 1990 and sd 8.165" in str(
        far_from_start(model(network(2)), tasks)
    )
    plain = vm.TaskSet([vm.Task(([[0.0, 1980.0], [1.0, 1990.0]], [0.0, 1.0]))])
    assert "column 1 of x has mean 1985" in str(far_from_start(model(network(2)), plain))


def rare() -> vm.TaskSet:
    x = np.zeros((3000, 1))
    x[0] = 1.0
    return vm.TaskSet([vm.Task((x, np.linspace(-1.0, 1.0, 3000)))])


def of(x: object, y: object) -> vm.TaskSet:
    return vm.TaskSet([vm.Task((x, y))])


QUIET: dict[str, Callable[[], tuple[vm.TaskModel, vm.TaskSet]]] = {
    "sines": lambda: (model(network()), waves()),
    "a line": lambda: (model(nn.Linear(1, 1)), waves(3600.0, 1000.0)),
    "linear layers": lambda: (
        model(nn.Sequential(nn.Flatten(1), nn.Linear(1, 1))),
        waves(3600.0, 1000.0),
    ),
    "a rare event": lambda: (model(network()), rare()),
    "a constant column": lambda: (model(network()), of([[1.0], [1.0]], [0.0, 1.0])),
    "bytes": lambda: (
        model(network()),
        of(torch.tensor([[0], [255]], dtype=torch.uint8), [0.0, 1.0]),
    ),
    "codes": lambda: (
        model(nn.Sequential(nn.Embedding(90, 4), nn.Flatten(1), nn.Tanh(), nn.Linear(4, 1))),
        of([[3], [80]], [0.0, 1.0]),
    ),
    "counts": lambda: (model(network(), L.Poisson()), of([[0.0], [1.0]], [300, 500])),
    "no rows": lambda: (model(network()), vm.TaskSet([vm.Task()])),
}


@pytest.mark.parametrize("what", QUIET)
def test_no_word_where_there_is_nothing_to_say(what: str) -> None:
    assert far_from_start(*QUIET[what]()) is None
