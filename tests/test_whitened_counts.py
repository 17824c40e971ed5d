"""Whitened columns take the expectation by the weighted points that the objective has, where it has them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, optimize, stats

import varmeta as vm


def test_counts_under_a_dense_prior_keep_their_spread() -> None:
    """Twelve groups of Poisson counts: the evidence by scipy's quadrature; unweighted, the points ended at an sd of 0."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"g": np.arange(120) % 12, "x": rng.uniform(10, 20, 120)})
    frame["y"] = rng.poisson(np.exp(0.1 * frame["x"] - 0.5 + 0.3 * rng.normal(size=12)[frame["g"]]))
    groups = [(part["x"].to_numpy(), part["y"].to_numpy()) for _, part in frame.groupby("g")]

    def minus_log_evidence(at: np.ndarray) -> float:
        intercept, slope, log_sd = at
        total = 0.0
        for x, y in groups:

            def joint(z: float, x: np.ndarray = x, y: np.ndarray = y) -> float:
                rate = np.exp(intercept + np.exp(log_sd) * z + slope * x)
                return float(np.exp(stats.poisson(rate).logpmf(y).sum()) * stats.norm.pdf(z))

            total -= np.log(integrate.quad(joint, -6.0, 6.0, epsabs=0.0, epsrel=1e-9, limit=200)[0])
        return total

    best = optimize.minimize(minus_log_evidence, [-0.6, 0.115, -1.2], method="Nelder-Mead", options={"xatol": 1e-4})
    tasks = vm.TaskSet.from_frame(frame, task="g", x=["x"], y="y")
    prior = vm.GaussianPrior(learn_precision="full")
    model = vm.TaskModel(vm.LinearPredictor(["x"]).double(), vm.likelihoods.Poisson(), prior, shared=["x"])
    fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    # a bound, and nearly tight
    assert best.fun - 1e-6 < fit.loss < best.fun + 0.05
    assert float(fit.prior.sd["intercept"]) == pytest.approx(float(np.exp(best.x[2])), abs=0.01)
