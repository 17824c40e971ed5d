"""The iMAML meta-gradient by jaxopt: its gradient descent, differentiated implicitly with its CG;
jitted, vmap over tasks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from experiments.benchmarks.work import CG_STEPS, INNER_STEPS, LR, Step, Unavailable, Work

try:
    import jax
    import jaxopt

    from experiments.benchmarks.by_jax import inner, outer, step_of
except ImportError as error:
    raise Unavailable("not installed") from error


def imaml(work: Work) -> list[Step]:
    # tol=0: exactly that many steps, as everybody else takes
    solver = jaxopt.GradientDescent(
        inner, stepsize=LR, maxiter=INNER_STEPS, acceleration=False, tol=0.0, implicit_diff=True,
        implicit_diff_solve=partial(jaxopt.linear_solve.solve_cg, maxiter=CG_STEPS, tol=0.0),
    )  # fmt: skip

    def of_task(theta0: dict[str, Any], x: Any, y: Any, u: Any, v: Any) -> Any:
        return outer(solver.run(theta0, theta0, x, y).params, u, v)

    def whole(theta0: dict[str, Any], *data: Any) -> Any:
        total = lambda theta0: jax.vmap(of_task, (None, 0, 0, 0, 0))(theta0, *data).sum()  # noqa: E731
        return jax.value_and_grad(total)(theta0)

    return [step_of(work, whole, "GradientDescent, implicit, solve_cg")]
