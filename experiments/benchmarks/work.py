"""The work that every library is given: sinusoids seen at 10 + 10 points, a 1-40-40-1 ReLU network,
and its given start.

Per task i, with theta the network's weights, r the residuals and lambda = 2 the prior's precision:

    F_i(theta) = 1/2 sum r_support^2 + lambda/2 |theta - theta0|^2    the inner problem
    G_i(theta) = 1/2 sum r_query^2 + points/2 log(2 pi)               the outer objective

with G_i a Gaussian's -log density.

imaml: 16 gradient steps on F from theta0, then 5 steps of CG on (d2F) u = dG; the meta-gradient is
sum_i lambda u_i.
maml:  5 gradient steps, and the derivative of sum_i G_i through them.
joint: q_i = N(loc_i, diag(sd_i)^2); loss sum_i KL[q_i || N(theta0, 1/lambda)] - E_q log N(y;
       net(x), sigma), two draws a step; one Adam step of loc, log sd, theta0, log lambda and log
       sigma.

Everything is numpy, so that no library's own start or data gets in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH = 40
POINTS = 10
PRECISION = 2.0
INNER_STEPS, CG_STEPS, MAML_STEPS = 16, 5, 5
LR = 0.01
HALF_LOG_2PI = 0.5 * float(np.log(2 * np.pi))
ADAM_LR = 1e-2
Arrays = dict[str, np.ndarray]


def shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Named as torch names them, in its order and shapes (outputs, inputs)."""
    return {
        "0.weight": (width, 1), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,),
        "4.weight": (1, width), "4.bias": (1,),
    }  # fmt: skip


SHAPES = shapes(WIDTH)
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


@dataclass(frozen=True)
class Work:
    """x_support, y_support, x_query, y_query: `(tasks, 10)`; theta0 by name; loc `(tasks, ...)` a
    guide away from theta0.
    """

    x_support: np.ndarray
    y_support: np.ndarray
    x_query: np.ndarray
    y_query: np.ndarray
    theta0: Arrays
    loc: Arrays

    @property
    def tasks(self) -> int:
        return len(self.x_support)


LOG_SD = -2.0  # of every guide, where the joint step starts


@dataclass(frozen=True)
class Step:
    """One library's way to do the work.

    run: the whole step; returns when its numbers are there.
    values: from what run returned, the loss summed over tasks and the flat gradient in theta0, in
        float64.
    expected: for a step with noise of its own, the loss at the start as one draw more each time it
        is called.
    way: which of a library's ways this is.
    """

    run: Callable[[], Any]
    values: Callable[[Any], tuple[float, np.ndarray]] | None = None
    expected: Callable[[], float] | None = None
    way: str = ""


class Unavailable(RuntimeError):
    """A peer that is not installed, or that cannot do this work; the sentence goes into the
    table.
    """


def make_work(tasks: int, dtype: str = "float32", seed: int = 0, width: int = WIDTH) -> Work:
    """Tasks y = a sin(x + b), and weights drawn as torch's `Linear` draws them.

    a is in (0.03, 0.3): with larger residuals some Hessians are indefinite, where CG is not defined
        and codes differ.
    """
    rng = np.random.default_rng(seed)
    theta0 = {}
    for name, shape in shapes(width).items():
        fan_in = 1 if name.startswith("0.") else width
        theta0[name] = rng.uniform(-(fan_in**-0.5), fan_in**-0.5, shape).astype(dtype)
    loc = {}
    for name, value in theta0.items():
        loc[name] = value + np.asarray(0.05, dtype) * rng.standard_normal(
            (tasks, *value.shape), np.float32
        )
    amplitude, phase = rng.uniform(0.03, 0.3, (tasks, 1)), rng.uniform(0.0, np.pi, (tasks, 1))
    x = rng.uniform(-2.0, 2.0, (2, tasks, POINTS))
    y = amplitude * np.sin(x + phase)
    x, y = x.astype(dtype), y.astype(dtype)
    return Work(x[0], y[0], x[1], y[1], theta0, loc)


def flat(arrays: Arrays) -> np.ndarray:
    """One vector, in float64."""
    return np.concatenate(
        [np.asarray(arrays[name], dtype=np.float64).reshape(-1) for name in arrays]
    )


def split(values: Any) -> dict[str, Any]:
    """The arrays by name of `(..., SIZE)`; of any library's arrays."""
    found, begin = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        found[name] = values[..., begin : begin + size].reshape(*values.shape[:-1], *shape)
        begin += size
    return found
