"""Right values in fifty digits: Gaussian tasks solved densely, task by task, by mpmath."""

from __future__ import annotations

from dataclasses import dataclass

import mpmath as mp
import numpy as np

mp.mp.dps = 50


@dataclass
class GaussianTask:
    """y = X w + e with w ~ N(theta0, diag(1 / precision)), e ~ N(0, scale^2)."""

    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float


def matrix(values: np.ndarray) -> mp.matrix:
    values = np.atleast_2d(np.asarray(values, np.float64))
    return (
        mp.matrix([[mp.mpf(float(v)) for v in row] for row in values])
        if values.size
        else mp.matrix(*values.shape)
    )


def gaussian_task(
    design: np.ndarray, y: np.ndarray, theta0: np.ndarray, precision: np.ndarray, scale: float
) -> GaussianTask:
    """design `(n, D)`, y `(n,)`, theta0 and precision `(D,)`."""
    size, weights = design.shape
    noise = mp.mpf(float(scale)) ** 2
    x, response, centre = matrix(design), matrix(y[:, None]), matrix(theta0[:, None])
    posterior = mp.diag([mp.mpf(float(p)) for p in precision])
    shift = mp.matrix(weights, 1)
    log_evidence = mp.mpf(0)
    if size:
        prior_covariance = mp.diag([1 / mp.mpf(float(p)) for p in precision])
        residual = response - x * centre
        marginal = x * prior_covariance * x.T + noise * mp.eye(size)
        solved = mp.lu_solve(marginal, residual)
        quadratic = (residual.T * solved)[0]
        log_evidence = -(quadratic + mp.log(mp.det(marginal)) + size * mp.log(2 * mp.pi)) / 2
        posterior = posterior + x.T * x / noise
        shift = prior_covariance * x.T * solved
    covariance = posterior**-1
    mean = [float(centre[i] + shift[i]) for i in range(weights)]
    return GaussianTask(
        np.array(mean),
        np.array([float(mp.sqrt(covariance[i, i])) for i in range(weights)]),
        float(log_evidence),
    )


def log_evidence(
    design: np.ndarray, y: np.ndarray, theta0: np.ndarray, factor: np.ndarray, scale: float
) -> float:
    """log N(y; X theta0, (X L)(X L)' + scale^2 I), L `(D, D)` the factor of a dense covariance."""
    if not len(y):
        return 0.0
    x = matrix(design)
    moved, residual = x * matrix(factor), matrix(y[:, None]) - x * matrix(theta0[:, None])
    marginal = moved * moved.T + mp.mpf(float(scale)) ** 2 * mp.eye(len(y))
    quadratic = (residual.T * mp.lu_solve(marginal, residual))[0]
    return float(-(quadratic + mp.log(mp.det(marginal)) + len(y) * mp.log(2 * mp.pi)) / 2)


def least_squares_centre(
    designs: list[np.ndarray], ys: list[np.ndarray], precision: np.ndarray, scale: float
) -> np.ndarray | None:
    """theta0 of greatest marginal likelihood where precision and scale are given; None where the
    data leave it open.
    """
    weights = len(precision)
    information, right = mp.matrix(weights, weights), mp.matrix(weights, 1)
    prior_covariance = mp.diag([1 / mp.mpf(float(p)) for p in precision])
    for design, y in zip(designs, ys, strict=True):
        if len(y):
            x = matrix(design)
            marginal = x * prior_covariance * x.T + mp.mpf(float(scale)) ** 2 * mp.eye(len(y))
            both = marginal**-1 * x
            information += x.T * both
            right += both.T * matrix(y[:, None])
    # in sds of the columns, so that their units do not matter
    size = [mp.sqrt(information[i, i]) for i in range(weights)]
    if any(s == 0 for s in size):
        return None
    scaled = mp.matrix(
        [[information[i, j] / size[i] / size[j] for j in range(weights)] for i in range(weights)]
    )
    if mp.eigsy(scaled, eigvals_only=True)[0] < mp.mpf("1e-12"):
        return None
    found = mp.lu_solve(scaled, mp.matrix([right[i] / size[i] for i in range(weights)]))
    return np.array([float(found[i] / size[i]) for i in range(weights)])
