"""Observations under draws of the weights: site, densities, means, class probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta.models.pyro_program import SITE
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data


@dataclass(frozen=True)
class Evaluated:
    """Observations under draws of the weights.

    y `(tasks, points, ...)`; log_prob `(draws, tasks, points)`, 0 in the padding.

    weighted: log_prob times how often each observation counts, added up over a task's points,
        `(draws, tasks)`: what they add to the log joint density.
    mean: an observation's mean under each draw, `(draws, tasks, points, ...)`, None where the
        distribution does not tell.
    probs: for classes their probabilities, averaged over the draws, `(tasks, points, classes)`.
    samples: draws of observations, where asked for.  Of a point there is one draw of the weights,
        under which the samples are drawn all the same.
    """

    data: Data
    y: Tensor
    log_prob: Tensor
    weighted: Tensor
    mean: Tensor | None
    probs: Tensor | None
    samples: Tensor | None


@contextlib.contextmanager
def quiet_scope(seed: int, device: torch.device) -> Iterator[None]:
    """No gradients, no validation, and a random state of one's own that is put back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), validation_enabled(False), torch.random.fork_rng(devices=devices):
        # not torch.manual_seed, which would seed the devices that are not forked too
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def class_probabilities(fn: dist.TorchDistribution) -> Tensor:
    """`(..., classes)`; for a Bernoulli, of 0 and of 1."""
    return (
        torch.stack([1.0 - fn.probs, fn.probs], -1) if isinstance(fn, dist.Bernoulli) else fn.probs
    )


def samples_more(trace: poutine.Trace) -> bool:
    """Whether the program draws other numbers than the observations, on which they depend."""
    drawn = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not (site["is_observed"] or poutine.util.site_is_subsample(site))
        and name != SITE
    ]
    return len(drawn) > 1


def known_mean(fn: dist.TorchDistribution) -> Tensor | None:
    """The mean, NaN where there is none (Cauchy's).

    None for classes and where the distribution does not tell.
    """
    if isinstance(fn, dist.Categorical):
        return None
    try:
        return fn.mean
    except NotImplementedError:
        return None


def mean_of(fn: dist.TorchDistribution) -> Tensor:
    if isinstance(fn, dist.Categorical):
        return fn.probs
    try:
        mean = fn.mean
    except NotImplementedError:
        mean = None
    if mean is None or bool(mean.isnan().any()):
        raise ValueError(
            f"a {type(fn).__name__} observation has no mean here: use predict(x) and its interval"
        )
    return mean
