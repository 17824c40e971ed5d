"""The joint mean-field step by Pyro's SVI: TraceMeanField_ELBO, two particles, a hand-written guide
under the tasks' plate.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from experiments.benchmarks.by_torch import net
from experiments.benchmarks.work import ADAM_LR, LOG_SD, PRECISION, SHAPES, Step, Work, flat, split


def joint(work: Work) -> list[Step]:
    return [_step(work, vectorize) for vectorize in (True, False)]


def _step(work: Work, vectorize: bool) -> Step:
    x, y = torch.as_tensor(work.x_support), torch.as_tensor(work.y_support)
    start = {
        name: torch.as_tensor(value).to(x)
        for name, value in (("theta0", flat(work.theta0)), ("loc", _rows(work)))
    }

    def model() -> None:
        theta0 = pyro.param("theta0", lambda: start["theta0"].clone())
        log_precision = pyro.param("log_precision", lambda: x.new_tensor(PRECISION).log())
        log_scale = pyro.param("log_scale", lambda: x.new_zeros(()))
        with pyro.plate("tasks", work.tasks, dim=-2):
            sd = torch.exp(-0.5 * log_precision).expand(theta0.shape)
            theta = pyro.sample("theta", dist.Normal(theta0, sd).to_event(1))
            with pyro.plate("points", x.shape[1], dim=-1):
                out = net(split(theta.squeeze(-2)), x)
                pyro.sample("y", dist.Normal(out, log_scale.exp()), obs=y)

    def guide() -> None:
        loc = pyro.param("loc", lambda: start["loc"].unsqueeze(-2).clone())
        log_sd = pyro.param("log_sd", lambda: torch.full_like(loc, LOG_SD))
        with pyro.plate("tasks", work.tasks, dim=-2):
            pyro.sample("theta", dist.Normal(loc, log_sd.exp()).to_event(1))

    elbo = TraceMeanField_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=2)
    # a store of its own: several ways live side by side
    store: Any = pyro.params.param_store.ParamStoreDict().get_state()
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": ADAM_LR, "clip_norm": 1e30}), elbo)

    def inside(what: Any) -> float:
        nonlocal store
        with pyro.validation_enabled(False):
            pyro.get_param_store().set_state(store)
            found = what()
            store = pyro.get_param_store().get_state()
            pyro.get_param_store().clear()
        return float(found)

    way = "particles vectorised" if vectorize else "particles in a loop"
    return Step(lambda: inside(svi.step), expected=lambda: inside(svi.evaluate_loss), way=way)


def _rows(work: Work) -> Any:
    import numpy as np

    return np.concatenate([work.loc[name].reshape(work.tasks, -1) for name in SHAPES], -1)
