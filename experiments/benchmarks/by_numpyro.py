"""The joint mean-field step by NumPyro's SVI, jitted: TraceMeanField_ELBO, two particles, a
hand-written guide.
"""

from __future__ import annotations

import math
from typing import Any

from experiments.benchmarks.work import (
    ADAM_LR,
    LOG_SD,
    PRECISION,
    SHAPES,
    Step,
    Unavailable,
    Work,
    flat,
    split,
)

try:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, TraceMeanField_ELBO
except ImportError as error:
    raise Unavailable("not installed") from error


def net(w: dict[str, Any], x: Any) -> Any:
    """Outputs `(tasks, points)` for weights `(tasks, ...)`."""
    h = jax.nn.relu(x[..., None] * jnp.swapaxes(w["0.weight"], -1, -2) + w["0.bias"][..., None, :])
    h = jax.nn.relu(h @ jnp.swapaxes(w["2.weight"], -1, -2) + w["2.bias"][..., None, :])
    return (h @ jnp.swapaxes(w["4.weight"], -1, -2))[..., 0] + w["4.bias"]


def joint(work: Work) -> list[Step]:
    return [
        _step(work, one_site, vectorize)
        for one_site in (True, False)
        for vectorize in (True, False)
    ]


def _step(work: Work, one_site: bool, vectorize: bool) -> Step:
    """one_site: the weights as one vector, or a site for each array."""
    x, y, tasks = jnp.asarray(work.x_support), jnp.asarray(work.y_support), work.tasks
    if one_site:
        theta0 = {"theta": jnp.asarray(flat(work.theta0), x.dtype)}
        loc = {
            "theta": jnp.concatenate(
                [jnp.asarray(work.loc[n]).reshape(tasks, -1) for n in SHAPES], -1
            )
        }
    else:
        theta0 = {name: jnp.asarray(value) for name, value in work.theta0.items()}
        loc = {name: jnp.asarray(value) for name, value in work.loc.items()}

    def model() -> None:
        log_precision = numpyro.param("log_precision", jnp.asarray(math.log(PRECISION), x.dtype))
        log_scale = numpyro.param("log_scale", jnp.zeros((), x.dtype))
        sd = jnp.exp(-0.5 * log_precision)
        drawn = {}
        with numpyro.plate("tasks", tasks, dim=-1):
            for name, start in theta0.items():
                centre = numpyro.param(f"theta0.{name}", start)
                prior = dist.Normal(centre, jnp.broadcast_to(sd, centre.shape)).to_event(
                    centre.ndim
                )
                drawn[name] = numpyro.sample(name, prior)
            out = net(split(drawn["theta"]) if one_site else drawn, x)
            numpyro.sample("y", dist.Normal(out, jnp.exp(log_scale)).to_event(1), obs=y)

    def guide() -> None:
        with numpyro.plate("tasks", tasks, dim=-1):
            for name, start in loc.items():
                centre = numpyro.param(f"loc.{name}", start)
                log_sd = numpyro.param(f"log_sd.{name}", jnp.full_like(start, LOG_SD))
                numpyro.sample(name, dist.Normal(centre, jnp.exp(log_sd)).to_event(start.ndim - 1))

    elbo = TraceMeanField_ELBO(num_particles=2, vectorize_particles=vectorize)
    svi = SVI(model, guide, numpyro.optim.Adam(ADAM_LR), elbo)
    begin = state = svi.init(jax.random.PRNGKey(0))
    # the state is given away: its memory is used again for the new one
    update = jax.jit(svi.update, donate_argnums=0)
    evaluate = jax.jit(lambda state, key: svi.evaluate(state._replace(rng_key=key)))
    keys = iter(jax.random.split(jax.random.PRNGKey(1), 100_000))
    begin, state = jax.tree.map(jnp.copy, begin), begin

    def run() -> Any:
        nonlocal state
        state, loss = update(state)
        return float(jax.block_until_ready(loss))

    way = ("one site" if one_site else "a site for each array") + (
        ", vmap over particles" if vectorize else ", map"
    )
    return Step(run, expected=lambda: float(evaluate(begin, next(keys))), way=way)
