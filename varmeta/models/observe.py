"""The observations of a network's output under a likelihood, as a Pyro site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.likelihoods.base import Likelihood


def observe_output(
    likelihood: Likelihood, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None, batch: int
) -> Any:
    """Sample, or with y observe, the data given the network's output.

    The output's first `batch` axes are `(..., tasks, points)`.

    Raises TypeError where the likelihood returns no distribution, ValueError where that has not one
    for each row, and where an output and an observation differ in shape.
    """
    obs = None if y is None else likelihood.observed(y)
    if obs is not None and likelihood.kind != "classification":
        obs = obs.to(out.dtype)
    # a single channel is dropped, unless y has it too
    if likelihood.kind != "classification" and out.dim() == batch + 1 and out.shape[-1] == 1:
        out = out if obs is not None and obs.dim() == 3 else out.squeeze(-1)
    noise = likelihood.distribution(out, eta, y)
    if not isinstance(noise, torch.distributions.Distribution):
        raise TypeError(
            f"{type(likelihood).__name__}.distribution returned {kind_of(noise)}, expected a "
            "distribution of torch or Pyro over y"
        )
    if noise.batch_shape[:batch] != out.shape[:batch]:
        raise ValueError(
            f"{type(likelihood).__name__}.distribution returned one of batch shape "
            f"{tuple(noise.batch_shape)} for outputs of shape {tuple(out.shape)}, expected "
            f"{tuple(out.shape[:batch])} first, (..., tasks, rows): a distribution for each row"
        )
    if len(noise.batch_shape) > batch:
        noise = noise.to_event(len(noise.batch_shape) - batch)
    if obs is not None and noise.event_shape != obs.shape[2:]:
        # broadcasting would hide it
        raise ValueError(
            f"the network's output for a row, {tuple(out.shape[batch:])}, does not fit "
            f"{likelihood!r} of a y with rows of shape {tuple(obs.shape[2:])}"
        )
    weights = None if y is None else likelihood.weights(y)
    if weights is None:
        return pyro.sample("y", noise, obs=obs)
    with poutine.scale(scale=weights.to(out)):
        return pyro.sample("y", noise, obs=obs)
