"""The shared work written by hand in JAX, jitted: one task's function under vmap.

ways: the inner loop unrolled or a scan; the Hessian product as a jvp of the gradient at every step,
or linearised once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks.work import (
    CG_STEPS,
    HALF_LOG_2PI,
    INNER_STEPS,
    LR,
    MAML_STEPS,
    PRECISION,
    Step,
    Unavailable,
    Work,
    flat,
)  # fmt: skip

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise Unavailable("not installed") from error

Tree = dict[str, Any]


def net(w: Tree, x: Any) -> Any:
    h = jax.nn.relu(x[:, None] * w["0.weight"][:, 0] + w["0.bias"])
    h = jax.nn.relu(h @ w["2.weight"].T + w["2.bias"])
    return h @ w["4.weight"][0] + w["4.bias"]


def inner(w: Tree, theta0: Tree, x: Any, y: Any) -> Any:
    away = sum(jnp.sum((w[name] - theta0[name]) ** 2) for name in w)
    return 0.5 * jnp.sum((net(w, x) - y) ** 2) + 0.5 * PRECISION * away


def outer(w: Tree, x: Any, y: Any) -> Any:
    return 0.5 * jnp.sum((net(w, x) - y) ** 2) + HALF_LOG_2PI * len(y)


def repeat(step: Callable[[Any], Any], start: Any, steps: int, scan: bool) -> Any:
    if scan:
        return jax.lax.scan(lambda carry, _: (step(carry), None), start, length=steps)[0]
    for _ in range(steps):
        start = step(start)
    return start


def dot(a: Tree, b: Tree) -> Any:
    return sum(jnp.vdot(a[name], b[name]) for name in a)


def imaml_of_task(scan: bool, linearize: bool) -> Callable[..., Any]:
    def of_task(theta0: Tree, x: Any, y: Any, u: Any, v: Any) -> Any:
        slope = jax.grad(lambda w: inner(w, theta0, x, y))
        w = repeat(
            lambda w: jax.tree.map(lambda a, g: a - LR * g, w, slope(w)), theta0, INNER_STEPS, scan
        )
        loss, b = jax.value_and_grad(outer)(w, u, v)
        product = (
            jax.linearize(slope, w)[1] if linearize else lambda p: jax.jvp(slope, (w,), (p,))[1]
        )

        def cg(carry: Any) -> Any:
            solution, r, p, rr = carry
            ap = product(p)
            alpha = rr / dot(p, ap)
            solution = jax.tree.map(lambda s, d: s + alpha * d, solution, p)
            r = jax.tree.map(lambda s, d: s - alpha * d, r, ap)
            new = dot(r, r)
            return solution, r, jax.tree.map(lambda s, d: s + new / rr * d, r, p), new

        solution = repeat(cg, (jax.tree.map(jnp.zeros_like, b), b, b, dot(b, b)), CG_STEPS, scan)[0]
        return loss, jax.tree.map(lambda s: PRECISION * s, solution)

    return of_task


def maml_of_task(scan: bool) -> Callable[..., Any]:
    def of_task(theta0: Tree, x: Any, y: Any, u: Any, v: Any) -> Any:
        def loss(theta0: Tree) -> Any:
            slope = jax.grad(lambda w: inner(w, theta0, x, y))
            w = repeat(
                lambda w: jax.tree.map(lambda a, g: a - LR * g, w, slope(w)),
                theta0,
                MAML_STEPS,
                scan,
            )
            return outer(w, u, v)

        return jax.value_and_grad(loss)(theta0)

    return of_task


def maml_of_sum(scan: bool) -> Callable[..., Any]:
    """The gradient of the sum over tasks, instead of the sum of the tasks' gradients."""

    def whole(theta0: Tree, x: Any, y: Any, u: Any, v: Any) -> Any:
        def of_task(start: Tree, x: Any, y: Any, u: Any, v: Any) -> Any:
            slope = jax.grad(lambda w: inner(w, start, x, y))
            w = repeat(
                lambda w: jax.tree.map(lambda a, g: a - LR * g, w, slope(w)),
                start,
                MAML_STEPS,
                scan,
            )
            return outer(w, u, v)

        return jax.value_and_grad(
            lambda t: jax.vmap(of_task, (None, 0, 0, 0, 0))(t, x, y, u, v).sum()
        )(theta0)

    return whole


def imaml(work: Work) -> list[Step]:
    ways = {
        (scan, once): over_tasks(imaml_of_task(scan, once))
        for scan in (True, False)
        for once in (True, False)
    }
    return [
        step_of(
            work,
            whole,
            f"{'scan' if scan else 'unrolled'}, {'linearised once' if once else 'jvp of grad'}",
        )
        for (scan, once), whole in ways.items()
    ]


def maml(work: Work) -> list[Step]:
    steps = [step_of(work, over_tasks(maml_of_task(scan)), _name(scan)) for scan in (True, False)]
    return steps + [
        step_of(work, maml_of_sum(scan), _name(scan) + ", gradient of the sum")
        for scan in (True, False)
    ]


def _name(scan: bool) -> str:
    return "scan" if scan else "unrolled"


def over_tasks(of_task: Callable[..., Any]) -> Callable[..., Any]:
    def whole(theta0: Tree, *data: Any) -> Any:
        losses, gradients = jax.vmap(of_task, (None, 0, 0, 0, 0))(theta0, *data)
        return losses.sum(), jax.tree.map(lambda g: g.sum(0), gradients)

    return whole


def step_of(work: Work, whole: Callable[..., Any], way: str) -> Step:
    """whole(theta0, x, y, u, v) -> (loss, gradient by name), jitted; values in float64."""
    if work.x_support.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    theta0 = {name: jnp.asarray(value) for name, value in work.theta0.items()}
    data = [jnp.asarray(a) for a in (work.x_support, work.y_support, work.x_query, work.y_query)]
    jitted = jax.jit(whole)

    def values(found: Any) -> tuple[float, np.ndarray]:
        return float(found[0]), flat(
            {name: np.asarray(found[1][name]) for name in work.theta0}
        )  # JAX sorts the names

    return Step(lambda: jax.block_until_ready(jitted(theta0, *data)), values, way=way)
