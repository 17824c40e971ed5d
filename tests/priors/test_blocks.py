"""Weights that are correlated in blocks, against the marginal likelihood by numpy and scipy."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

import varmeta as vm

TASKS, ROWS = 25, 8
BLOCKS = [["intercept", "x"], ["z", "w"]]
# where the weights stand, which are in no order of blocks
COLUMNS, AT = ["z", "x", "w"], ((0, 2), (1, 3))


@cache
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(TASKS), ROWS)
    x, z, w = rng.normal(3.0, 1.0, g.size), rng.normal(size=g.size), rng.normal(size=g.size)
    a = rng.multivariate_normal([1.0, 2.0], [[1.0, 0.5], [0.5, 0.6]], TASKS)[g]
    b = rng.multivariate_normal([0.0, 0.0], [[0.7, -0.3], [-0.3, 0.6]], TASKS)[g]
    mean = a[:, 0] + a[:, 1] * x + b[:, 0] * z + b[:, 1] * w
    y = mean + 0.5 * rng.normal(size=g.size)
    return pd.DataFrame({"g": g, "x": x, "z": z, "w": w, "y": y})


def fit(blocks: Any, **options: Any) -> vm.Fit:
    tasks = vm.TaskSet.from_frame(table(), task="g", x=COLUMNS, y="y")
    prior = vm.GaussianPrior(learn_precision="full", blocks=blocks)
    net = vm.LinearPredictor(COLUMNS)
    return vm.fit(vm.TaskModel(net, vm.likelihoods.Gaussian(), prior), tasks, **options)


def least(restricted: bool) -> float:
    """The least of -log p(y), theta0 profiled or integrated out, over both blocks and the noise."""
    frame = table()
    rows = frame.groupby("g")
    parts = [(np.column_stack([np.ones(len(r)), r[COLUMNS]]), r["y"].to_numpy()) for _, r in rows]

    def loss(p: np.ndarray) -> float:
        covariance = np.zeros((4, 4))
        for at, entries in zip(AT, (p[:3], p[3:6]), strict=True):
            lower = np.zeros((2, 2))
            lower[np.tril_indices(2)] = entries
            covariance[np.ix_(at, at)] = lower @ lower.T
        total, quadratic = 0.5 * len(frame) * np.log(2 * np.pi), np.zeros((5, 5))
        for design, y in parts:
            own = design @ covariance @ design.T + np.exp(2 * p[6]) * np.eye(len(y))
            root = np.linalg.cholesky(own)
            white = np.linalg.solve(root, np.column_stack([design, y]))
            quadratic += white.T @ white
            total += np.log(root.diagonal()).sum()
        fixed = np.linalg.solve(quadratic[:4, :4], quadratic[:4, 4])
        total += 0.5 * (quadratic[4, 4] - quadratic[4, :4] @ fixed)
        if restricted:
            total += 0.5 * np.linalg.slogdet(quadratic[:4, :4])[1] - 2 * np.log(2 * np.pi)
        return float(total)

    start = np.array([1.0, 0.5, 0.5, 0.8, -0.3, 0.6, np.log(0.5)])
    return float(minimize(loss, start, method="BFGS").fun)


@pytest.mark.parametrize("hyperguide", [None, "reml"])
def test_the_fit_is_the_maximum_of_the_marginal_likelihood(hyperguide: Any) -> None:
    found = fit(BLOCKS, hyperguide=hyperguide)
    assert found.loss == pytest.approx(least(hyperguide == "reml"), abs=1e-8)
    covariance = found.prior.covariance
    apart = torch.tensor([[i % 2 != j % 2 for j in range(4)] for i in range(4)])
    assert not bool(covariance[apart].any()) and bool((covariance[~apart] != 0).all())


def test_one_block_is_a_dense_covariance_and_none_a_diagonal_one() -> None:
    one, every = fit([["intercept", "z", "x", "w"]]), fit(None)
    torch.testing.assert_close(one.prior.covariance, every.prior.covariance, rtol=1e-6, atol=1e-9)
    # a parameter in no block is one by itself
    tasks = vm.TaskSet.from_frame(table(), task="g", x=COLUMNS, y="y")
    prior = vm.GaussianPrior(learn_precision="per_parameter")
    model = vm.TaskModel(vm.LinearPredictor(COLUMNS), vm.likelihoods.Gaussian(), prior)
    assert fit([]).loss == pytest.approx(vm.fit(model, tasks).loss, abs=1e-8)


def test_the_posterior_of_eta_has_no_correlation_between_blocks() -> None:
    found = fit(BLOCKS, hyperguide="multivariate_normal").hyperparameters()
    assert [name for name in found.index if name.startswith("cor")] == [
        "cor(intercept, x)",
        "cor(z, w)",
    ]


def test_a_fit_is_kept(tmp_path: Any) -> None:
    found = fit(BLOCKS)
    found.save(tmp_path / "blocks.fit")
    again = vm.load(tmp_path / "blocks.fit", found.model)
    torch.testing.assert_close(again.prior.covariance, found.prior.covariance)
    other = vm.TaskModel(
        vm.LinearPredictor(COLUMNS),
        vm.likelihoods.Gaussian(),
        vm.GaussianPrior(learn_precision="full", blocks=[["intercept", "z"], ["x", "w"]]),
    )
    with pytest.raises(ValueError, match="is a fit of another model"):
        vm.load(tmp_path / "blocks.fit", other)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"blocks": ["x"], "learn_precision": "full"}, TypeError, "a list of lists"),
        ({"blocks": [["x"]]}, ValueError, "set learn_precision='full'"),
        ({"blocks": [["x"], ["x"]], "learn_precision": "full"}, ValueError, "more than once"),
    ],
)
def test_what_is_refused(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        vm.GaussianPrior(**options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks name \['age'\], but the weights"):
        fit([["intercept", "age"]])
