"""Alg as a distribution: the estimators against exact smoothed objectives, computed by quadrature and by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from scipy.interpolate import CubicSpline
from scipy.optimize import brentq

import varmeta as vm

# f has a minimum about every 2.1; lambda = 1 and steps that reach across a ridge or two
LAMBDA, STEPS, LR, TEMPERATURE, START = 1.0, 12, 0.08, 0.5, 0.6
ANCHORS = np.linspace(-2.4, 2.3, 20)


def f(t):
    return np.sin(3 * t) + 0.2 * t**2


def slope(t, anchor):
    return 3 * np.cos(3 * t) + 0.4 * t + LAMBDA * (t - anchor)


def program(params, x, y):
    t = params["theta"]
    pyro.factor("f", -(torch.sin(3 * t) + 0.2 * t**2))


def one_function():
    model = vm.TaskModel.from_pyro(program, {"theta": torch.zeros((), dtype=torch.float64)}, vm.GaussianPrior(LAMBDA))
    point = ([[0.0]], [0.0])
    return model, vm.TaskSet([vm.Task(support=point, query=point, name="f")], dtype=torch.float64)


def estimate(model, tasks, strategy, anchor, blocks=50):
    """Mean and standard error of the gradient over blocks of draws, and the mean of its moving part."""
    rows = []
    for seed in range(blocks):
        result = vm.meta_gradient(model, tasks, strategy, seed, {"theta": torch.tensor(float(anchor))})
        rows.append((float(result.grads["theta"]), float(result.moving["theta"])))
        assert torch.allclose(result.grads["theta"], result.moving["theta"] + result.selecting["theta"])
    total, moving = np.array(rows).T
    return total.mean(), total.std(ddof=1) / math.sqrt(blocks), moving.mean()


def central(objective, anchor, h=1e-4):
    return (objective(anchor + h) - objective(anchor - h)) / (2 * h)


def sd(k, cooling):
    return math.sqrt(2 * LR * TEMPERATURE * (1 - k / STEPS if cooling else 1.0))


def smoothed_by_start(anchor):
    """E f(theta_K) over theta_0 ~ N(anchor, START^2), K steps of gradient descent: quadrature over theta_0."""
    z = np.linspace(-9, 9, 200_001)
    weight = np.exp(-0.5 * z**2)
    t = anchor + START * z
    for _ in range(STEPS):
        t = t - LR * slope(t, anchor)
    return (weight * f(t)).sum() / weight.sum()


GRID = np.linspace(-7, 7, 1401)


def smoothed_by_langevin(anchor):
    """E f(theta_K) over K Langevin steps from the anchor: the value function, backwards over a grid."""
    value = f(GRID)
    for _ in range(STEPS):
        value = _kernel(GRID, anchor, sd(0, False)) @ value
    return float(CubicSpline(GRID, value)(anchor))


def _kernel(x, anchor, scale):
    kernel = np.exp(-0.5 * ((x[None, :] - (x - LR * slope(x, anchor))[:, None]) / scale) ** 2)
    return kernel / kernel.sum(1, keepdims=True)


def smoothed_at_minima(anchor):
    """sum_k P(basin k) f(minimum k) after K cooled Langevin steps from a random start: the density, forwards."""
    step = GRID[1] - GRID[0]
    density = np.exp(-0.5 * ((GRID - anchor) / START) ** 2)
    density /= density.sum() * step
    for k in range(STEPS):
        mean = GRID - LR * slope(GRID, anchor)
        scale = sd(k, True)
        kernel = np.exp(-0.5 * ((GRID[:, None] - mean[None, :]) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
        density = kernel @ density * step
    values = slope(GRID, anchor)
    changes = np.flatnonzero(values[:-1] * values[1:] < 0)
    roots = [brentq(slope, GRID[i], GRID[i + 1], args=(anchor,), xtol=1e-14) for i in changes]
    minima, ridges = roots[::2], roots[1::2]
    cumulative = CubicSpline(GRID, density).antiderivative()
    edges = [GRID[0], *ridges, GRID[-1]]
    return sum((cumulative(b) - cumulative(a)) * f(m) for a, b, m in zip(edges, edges[1:], minima, strict=False))


NOISY = {
    "start, through the steps": (
        vm.Unrolled("delta", "query", alg=vm.StochasticAlg(STEPS, LR, start_scale=START, num_draws=2000)),
        smoothed_by_start,
    ),
    "Langevin, score": (
        vm.Unrolled(
            "delta", "query", alg=vm.StochasticAlg(STEPS, LR, temperature=TEMPERATURE, cooling=False, num_draws=2000)
        ),
        smoothed_by_langevin,
    ),
    "Langevin and start, score and minimum": (
        vm.Implicit(
            "delta",
            "query",
            alg=vm.StochasticAlg(STEPS, LR, start_scale=START, temperature=TEMPERATURE, num_draws=2000),
            on_unconverged="ignore",
        ),
        smoothed_at_minima,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOISY)
def test_the_gradient_is_that_of_the_smoothed_objective(kind):
    strategy, objective = NOISY[kind]
    model, tasks = one_function()
    z, missed = [], []
    for anchor in ANCHORS:
        exact = central(objective, anchor)
        mean, error, moving = estimate(model, tasks, strategy, anchor)
        z.append((mean - exact) / error)
        missed.append((exact - moving) / error)
    print(kind, np.round(z, 2), np.round(missed, 1))
    assert np.abs(z).max() < 3.0
    assert 0.4 < np.square(z).mean() < 2.0  # the standard errors are neither too small nor too large
    # the implicit part alone is biased at most anchors
    assert np.median(np.abs(missed)) > 3.0
