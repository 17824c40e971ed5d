"""Made-up tasks: a known curve for each, as a function of a seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varmeta.numerics.noise import normal, task_id, uniform
from varmeta.tasks import Task, TaskSet


def sinusoids(
    num_tasks: int,
    num_support: int = 10,
    num_query: int = 0,
    seed: int = 0,
    *,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    x_range: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
    dtype: torch.dtype | None = None,
) -> TaskSet:
    """y = a sin(x - b) with a ~ U(amplitude), b ~ U(phase) for each task.

    x ~ U(x_range) for each point.

    The ranges are those of Finn, Abbeel and Levine, Model-Agnostic Meta-Learning, ICML 2017.  x
    `(points, 1)`, y `(points,)`; `noise` is the sd of normal noise in support and query.  dtype
    None: torch's default.

    The tasks are a function of the seed: more tasks, or more points, begin with those of a smaller
    call.  Tasks of another seed have other names, so that training and test sets can be told apart.

    Raises ValueError for numbers, ranges or a noise that make no sense.

    >>> tasks = sinusoids(3, 5, 10, seed=1)
    >>> tasks
    TaskSet(3 tasks, 15 support points (5 to 5 per task),
            30 query points (10 to 10 per task), x (1,), float32)
    >>> tasks.names
    ('sinusoid 1.0', 'sinusoid 1.1', 'sinusoid 1.2')
    """
    _check_range("amplitude", amplitude)
    _check_range("phase", phase)

    def curves(ids: Tensor) -> Curves:
        a, b = uniform(seed, 0, ids, 1, 2)[0].unsqueeze(-1).unbind(1)  # (tasks, 1) each
        return lambda x: _between(a, amplitude) * torch.sin(x - _between(b, phase))

    return _tasks(
        "sinusoid", curves, num_tasks, num_support, num_query, seed, x_range, noise, dtype
    )


def polynomials(
    num_tasks: int,
    num_support: int = 10,
    num_query: int = 0,
    seed: int = 0,
    *,
    loc: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    scale: float | Sequence[float] = 1.0,
    x_range: tuple[float, float] = (-1.0, 1.0),
    noise: float = 0.1,
    dtype: torch.dtype | None = None,
) -> TaskSet:
    """y = sum_k c_k x^k + noise, with c_k ~ N(loc[k], scale[k]^2) for each task.

    It is a mixed model whose prior is known.

    loc: the prior mean of every coefficient, constant first, so its length is the degree + 1.
    scale: the prior sd of every coefficient, or one for all; 0 for a coefficient that all tasks
    share. The rest as for `sinusoids`; x is `(points, 1)`, not its powers.

    >>> tasks = polynomials(2, 3, loc=(1.0, 0.0, 2.0), scale=0.0, noise=0.0, dtype=torch.float64)
    >>> x, y = tasks[0].support
    >>> torch.allclose(y, 1 + 2 * x[:, 0] ** 2)
    True
    """
    curves = _polynomial_curves(seed, loc, scale)
    return _tasks(
        "polynomial", curves, num_tasks, num_support, num_query, seed, x_range, noise, dtype
    )


def lines(
    num_tasks: int,
    num_support: int = 10,
    num_query: int = 0,
    seed: int = 0,
    *,
    intercept: tuple[float, float] = (0.0, 1.0),
    slope: tuple[float, float] = (0.0, 1.0),
    x_range: tuple[float, float] = (-1.0, 1.0),
    noise: float = 0.1,
    dtype: torch.dtype | None = None,
) -> TaskSet:
    """y = a + b x + noise, with a ~ N(intercept) and b ~ N(slope): `polynomials` of degree 1.

    intercept and slope are given as (mean, sd).

    >>> lines(4, 5).names[0]
    'line 0.0'
    """
    (mean_a, sd_a), (mean_b, sd_b) = intercept, slope
    curves = _polynomial_curves(seed, (mean_a, mean_b), (sd_a, sd_b))
    return _tasks("line", curves, num_tasks, num_support, num_query, seed, x_range, noise, dtype)


Curves = Callable[[Tensor], Tensor]  # x (tasks, points) -> y (tasks, points)


def _polynomial_curves(
    seed: int, loc: Sequence[float], scale: float | Sequence[float]
) -> Callable[[Tensor], Curves]:
    means = torch.tensor([float(value) for value in loc], dtype=torch.float64)
    sds = torch.as_tensor(scale, dtype=torch.float64)
    if not len(means):
        raise ValueError("loc is empty: give the mean of at least the constant")
    if sds.dim() > 1 or (sds.dim() == 1 and len(sds) != len(means)):
        raise ValueError(
            f"scale must be one number or {len(means)}, as many as loc has, not {scale!r}"
        )
    if not bool(means.isfinite().all() & sds.isfinite().all() & (sds >= 0).all()):
        raise ValueError(
            f"prior means must be finite, sds finite and not negative; got {loc!r} and {scale!r}"
        )

    def curves(ids: Tensor) -> Curves:
        coefficients = means + sds * _normals(seed, 0, ids, len(means))  # (tasks, degree + 1)
        powers = torch.arange(len(means), dtype=torch.float64)
        return lambda x: (coefficients.unsqueeze(1) * x.unsqueeze(-1) ** powers).sum(-1)

    return curves


def _tasks(
    kind: str,
    curves: Callable[[Tensor], Curves],
    num_tasks: int,
    num_support: int,
    num_query: int,
    seed: int,
    x_range: tuple[float, float],
    noise: float,
    dtype: torch.dtype | None,
) -> TaskSet:
    """Points on every task's curve.

    Curves, inputs and noise of support and query have streams of their own.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, not {num_tasks}")
    if num_support < 0 or num_query < 0:
        raise ValueError(
            f"num_support and num_query must not be negative, got {num_support} and {num_query}"
        )
    if not 0 <= noise < math.inf:
        raise ValueError(
            f"noise is a standard deviation: it must be finite and not negative, not {noise}"
        )
    _check_range("x_range", x_range)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    names = [f"{kind} {seed}.{i}" for i in range(num_tasks)]
    ids = torch.tensor([task_id(name) for name in names])
    curve = curves(ids)

    def points(number: int, stream: int) -> list[tuple[Tensor, Tensor]]:
        x = _between(uniform(seed, stream, ids, 1, number)[0], x_range)
        y = curve(x) + noise * _normals(seed, stream, ids, number)
        return list(zip(x.unsqueeze(-1).to(dtype), y.to(dtype), strict=True))

    supports, queries = points(num_support, 1), points(num_query, 2)
    return TaskSet(
        [
            Task(*parts)
            for parts in zip(
                supports, queries if num_query else [None] * num_tasks, names, strict=True
            )
        ],
        dtype=dtype,
    )


def _normals(seed: int, stream: int, ids: Tensor, number: int) -> Tensor:
    """Draws `(tasks, number)`, of which fewer are the first of more: the two of every pair side by
    side.
    """
    pairs = (number + 1) // 2
    return (
        normal(seed, stream, ids, 1, 2 * pairs)[0]
        .reshape(len(ids), 2, pairs)
        .mT.flatten(1)[:, :number]
    )


def _between(unit: Tensor, ends: tuple[float, float]) -> Tensor:
    low, high = ends
    return low + (high - low) * unit


def _check_range(name: str, ends: tuple[float, float]) -> None:
    low, high = ends
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{name} must be (low, high) with finite low <= high, not {ends!r}")
