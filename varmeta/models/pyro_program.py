"""What a user's Pyro program may be, and what is left of Pyro's complaints about it.

That is its params, its plates, and what its observations come to.  `TaskModel.from_pyro` makes a
model of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

# plates and the site of a task's weights
TASKS, DATA, SITE = "tasks", "data", "theta"


def starts(params: Any) -> dict[str, Tensor]:
    """Where each param starts: at zeros of its shape, or at its tensor.

    Raises TypeError or ValueError, naming the param.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params must be a dict of shapes by name, such as {{'slope': ()}}, not {params!r}"
        )
    if not params:
        raise ValueError(
            "params must name at least one parameter and its shape, such as {'slope': ()}"
        )
    out = {}
    for name, value in params.items():
        if isinstance(value, (Tensor, np.ndarray)):
            out[name] = torch.as_tensor(value).detach().clone()
        elif isinstance(value, (tuple, list)) and all(isinstance(n, int) and n >= 0 for n in value):
            out[name] = torch.zeros(tuple(value))
        else:
            raise TypeError(
                f"params[{name!r}] is {value!r}, expected a shape, () for a single number or (3,) "
                "for three, or a tensor to start theta0 from"
            )
    return out


class RefusePlates(Messenger):
    """Refuses, within it, a plate beyond the first ones called `supplied`.

    It raises a ValueError: the axes are there already.
    """

    def __init__(self, supplied: set[str]) -> None:
        super().__init__()
        self.supplied = supplied

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        if msg["name"] not in self.supplied:
            raise ValueError(
                f"the program opens pyro.plate({msg['name']!r}), but the plates of tasks and of "
                "their observations are supplied: leave it out"
            )
        self.supplied = self.supplied - {msg["name"]}


def without_shapes(error: BaseException) -> str:
    """A message without the table of shapes that Pyro appends.

    In that table every number is varmeta's own.
    """
    return str(error).partition("\nTrace Shapes:")[0].rstrip()


def observed_site(trace: poutine.Trace) -> Any:
    """The site of the observations: the one called y, or the only one."""
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != SITE and not site_is_subsample(site)
    }
    if "y" in sites:
        return sites["y"]
    if len(sites) != 1:
        raise ValueError(
            f"the program samples {sorted(sites)}: call the observed site 'y', or sample just one"
        )
    return next(iter(sites.values()))


def observed_log_prob(
    trace: poutine.Trace, shape: tuple[int, ...] | None = None, weighted: bool = True
) -> Tensor:
    """log p(y | x, theta) of every observation, `(..., tasks, points)`, zero in the padding.

    weighted: times how often the observation counts (`poutine.scale`), as in the objective; a
        density has no such weight.

    Raises ValueError where the program observes nothing, keeps a latent site of its own, or
    broadcasts to another shape.
    """
    trace.compute_log_prob(lambda name, site: site["is_observed"] and name != SITE)
    total: Tensor | float = 0.0
    found = False
    for name, site in trace.nodes.items():
        if (
            site["type"] != "sample"
            or site_is_subsample(site)
            or (site["infer"] or {}).get("_deterministic")
        ):
            continue
        if site["is_observed"] and name != SITE:
            found = True
            total = total + (
                site["log_prob"]
                if weighted
                else scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            )
        elif name != SITE:
            raise ValueError(
                f"the program samples {name!r} without observing it: if that is the data, write "
                f"pyro.sample({name!r}, ..., obs=y); if it is a weight, name it in params, so that "
                "it gets a prior"
            )
    if not found:
        raise ValueError(
            "the program observes nothing: pyro.sample('y', ..., obs=y) must be reached when y is "
            "given"
        )
    assert isinstance(total, Tensor)
    if shape is not None and total.shape != shape:
        raise ValueError(
            f"the program's log density has shape {tuple(total.shape)}, but (theta points, tasks, "
            f"data points) = {shape} was expected: params broadcast as (..., tasks, 1, *shape) "
            "against x (tasks, points, ...)"
        )
    return total
