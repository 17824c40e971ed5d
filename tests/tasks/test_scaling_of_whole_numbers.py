"""Whole numbers in y: classes, counts, or numbers like any others, which the likelihood knows."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import varmeta as vm
from tests.cases import seeded
from tests.conftest import shared_data
from varmeta import likelihoods as L

RNG = np.random.default_rng(0)
X = [RNG.normal(10.0, 3.0, 8) for _ in range(12)]
# a chick's own level and rate, so that all of a dense covariance is determined
GRAMS = [
    np.rint(150 + 40 * u + (8 + 5 * v) * (x - 10) + RNG.normal(0, 6, 8)).astype(int)
    for x, (u, v) in zip(X, RNG.normal(size=(12, 2)), strict=True)
]
WEIGHTS = [RNG.integers(1, 5, 8) for _ in X]


def grams(kind: Any = None, weights: bool = False) -> vm.TaskSet:
    y = [np.stack([g, w], -1) if weights else g for g, w in zip(GRAMS, WEIGHTS, strict=True)]
    return vm.TaskSet(
        [
            vm.Task((x[:, None], one if kind is None else one.astype(kind)))
            for x, one in zip(X, y, strict=True)
        ]
    )


def model(likelihood: L.Likelihood) -> vm.TaskModel:
    return vm.TaskModel(
        seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(learn_precision="full")
    )


def fixed(likelihood: L.Likelihood) -> vm.TaskModel:
    return vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), likelihood, vm.GaussianPrior(2.0))


@pytest.mark.parametrize("likelihood", [L.Gaussian(), L.StudentT(), L.Gaussian(per_task=True)])
def test_integers_are_numbers_where_the_likelihood_says_so(likelihood: L.Likelihood) -> None:
    """As the same numbers in float64, to the last digit, and back again."""
    whole, scaling = grams().standardized(likelihood)
    floating, same = grams(float).standardized()
    assert torch.equal(whole.batch().support.y, floating.batch().support.y)
    pooled = np.concatenate(GRAMS)
    assert float(scaling.y_loc) == pytest.approx(pooled.mean(), rel=1e-14)
    assert float(scaling.y_scale) == pytest.approx(pooled.std(), rel=1e-14)
    assert torch.equal(scaling.y_inverse(torch.ones(3)), same.y_inverse(torch.ones(3)))
    # further tasks get the same, whole or not
    assert torch.equal(scaling.apply(grams(float)).batch().support.y, whole.batch().support.y)


@pytest.mark.parametrize(
    "likelihood",
    [
        L.Poisson(),
        L.Categorical(400),
        L.NegativeBinomial(),
        L.Binomial(400),
        L.Ordinal(400),
        L.LogNormal(),
    ],
)
@pytest.mark.parametrize("kind", [None, float])
def test_classes_counts_and_logarithms_stay(likelihood: L.Likelihood, kind: Any) -> None:
    tasks, scaling = grams(kind).standardized(likelihood)
    assert torch.equal(tasks.batch().support.y, grams(kind).batch().support.y)
    assert torch.equal(scaling.y_inverse(torch.ones(3)), torch.ones(3))
    assert float(tasks.batch().support.x.mean()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", [None, float])
def test_the_column_of_weights_stays(kind: Any) -> None:
    """The prior in raw units, fitted to standardised y, is that of the raw data; lmer's weights."""
    likelihood = L.Weighted(L.Gaussian(), precision=True)
    tasks, scaling = grams(kind, weights=True).standardized(likelihood)
    y = tasks.batch().support.y
    assert torch.equal(y[..., 1], torch.as_tensor(np.stack(WEIGHTS)).to(y))
    torch.testing.assert_close(
        y[..., 0], grams(float).standardized()[0].batch().support.y, rtol=1e-12, atol=1e-12
    )
    # two points, which a scaling of both columns would broadcast against
    mean = np.concatenate(GRAMS).mean()
    assert np.allclose(
        scaling.y_inverse(torch.zeros(3, 2)).numpy(), np.full((3, 2), mean), rtol=1e-6
    )
    dense = vm.Joint("multivariate_normal")
    back = scaling.raw_prior(vm.fit(model(likelihood), tasks, dense))
    raw = vm.fit(model(likelihood), grams(float, weights=True), dense).prior
    assert float(back.scale) == pytest.approx(float(raw.scale), rel=1e-4)
    for name in raw.loc:
        torch.testing.assert_close(back.loc[name], raw.loc[name], rtol=1e-3, atol=1e-3)


def test_fit_says_that_y_was_left_raw() -> None:
    tasks, _ = grams().standardized()
    pooled = np.concatenate(GRAMS)
    numbers = (
        rf"is not \(mean {pooled.mean():.4g}, sd {pooled.std():.4g}\)"
        r".*standardized\(model.likelihood\)"
    )
    for some in (tasks, tasks[:4], tasks.to(torch.float32)):
        with pytest.warns(RuntimeWarning, match=numbers if len(some) == 12 else "is not"):
            vm.fit(fixed(L.Gaussian()), some, vm.Joint("delta"), num_steps=1)


@pytest.mark.parametrize("likelihood", [L.Poisson(), L.LogNormal()])
def test_no_word_where_it_is_right_to_leave_y(likelihood: L.Likelihood) -> None:
    vm.fit(
        model(likelihood),
        grams().standardized()[0],
        vm.Joint("delta") if False else vm.Implicit("laplace"),
        num_steps=1,
    )


def test_only_a_likelihood_says_what_y_is() -> None:
    with pytest.raises(
        TypeError,
        match=r"likelihood must be one of varmeta.likelihoods, such as Gaussian\(\) or "
        r"model.likelihood",
    ):
        grams().standardized(model(L.Gaussian()))  # type: ignore[arg-type]


def test_large_float32_numbers_are_standardised_too() -> None:
    """Their squares overflow float32; an infinite sd would make every number 0."""
    x = torch.tensor([[1e30], [3e30]])
    tasks, scaling = vm.TaskSet([vm.Task((x, torch.tensor([1e25, -1e25])))]).standardized()
    assert tasks[0].support[0].flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)
    assert tasks[0].support[1].tolist() == pytest.approx([1.0, -1.0], rel=1e-6)
    assert float(scaling.x_scale) == pytest.approx(1e30, rel=1e-6)


def test_chickweights_whole_grams() -> None:
    """Told of the likelihood, grams as integers are the tasks that grams as floats are; y's sd is
    71 g.
    """
    with (shared_data("chickweight") / "data.csv").open() as file:
        rows = list(csv.DictReader(file))
    chicks = sorted({row["Chick"] for row in rows}, key=int)

    def tasks(kind: Any) -> vm.TaskSet:
        made = []
        for name in chicks:
            own = [row for row in rows if row["Chick"] == name]
            time = np.array([[float(row["Time"])] for row in own])
            made.append(
                vm.Task(
                    (time, np.array([int(row["weight"]) for row in own]).astype(kind)), name=name
                )
            )
        return vm.TaskSet(made)

    whole, scaling = tasks(np.int64).standardized(L.Gaussian())
    floating, _ = tasks(np.float64).standardized()
    assert torch.equal(whole.batch().support.y, floating.batch().support.y)
    assert float(scaling.y_scale) == pytest.approx(71.0, abs=0.1)
