"""Which of a posterior's and a fit's numbers go into which ArviZ group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta.files.version import __version__
from varmeta.graphs.process import FILTERS
from varmeta.posteriors import arviz as inference_data
from varmeta.posteriors.arviz_prior import DIMS as PRIOR_DIMS
from varmeta.posteriors.arviz_prior import prior_numbers
from varmeta.posteriors.observer import Observer

# Draws of all weights are left out beyond this many numbers (80 MB); their distance from theta0
# always goes in.
MAX_WEIGHT_NUMBERS = 10_000_000
# After the draws, by "variable" or "group/variable".
DIMS = PRIOR_DIMS | {
    "theta": ["task", "weight"],
    "distance": ["task"],
    "posterior_predictive/y": ["obs"],
    "observed_data/y": ["obs"],
    "log_likelihood/y": ["obs"],
    "log_joint": ["task"],
    "log_q": ["task"],
}


@dataclass(frozen=True)
class Record:
    """What a fit tells of its run: numbers by name at each of `steps`, and facts about it."""

    steps: np.ndarray
    history: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def groups(
    observer: Observer,
    names: Mapping[str, Any],
    num_samples: int,
    seed: int,
    x_names: tuple[str, ...] | None = None,
    record: Record | None = None,
) -> Any:
    """The posterior of each task, its predictive, and the data, as an ArviZ object.

    names: the labels of the axes "task" and "weight".  record: what a fit adds of its run.
    """
    q = observer.q
    draws = q.theta(num_samples, seed)
    prior = prior_numbers(q, num_samples, x_names)
    with torch.no_grad():
        distance = (draws.squeeze(-2) - q.centres(num_samples)).norm(dim=-1)
    # a summary lists them in this order
    found: dict[str, dict[str, Any]] = {
        "posterior": dict(prior.draws),
        "constant_data": prior.constants,
    }
    if draws.numel() <= MAX_WEIGHT_NUMBERS:
        found["posterior"]["theta"] = draws.squeeze(-2)
    found["posterior"]["distance"] = distance
    is_drawn = bool(q.etas(1))
    observed = _observed(observer, draws, seed, of_guide=not is_drawn)
    found |= observed.groups
    facts = {
        "inference_library": "varmeta",
        "inference_library_version": __version__,
        "guide": q.guide_name,
        "posterior_kind": q.kind,
    }
    labels: dict[str, Any] = prior.labels | dict(names)
    dims = DIMS | observed.dims
    if record is not None:
        found["fit"] = dict(record.history)
        dims |= {f"fit/{name}": ["step"] for name in record.history}
        labels |= {"step": record.steps}
        facts |= record.facts
    order = _order(num_samples, seed, is_drawn)
    arrays = {
        group: {
            name: _array(value) if group in inference_data.NO_DRAWS else _array(value)[order]
            for name, value in values.items()
        }
        for group, values in found.items()
    }
    with FILTERS:
        return inference_data.to_arviz(arrays, dims, labels, observed.tasks, facts)


def _order(number: int, seed: int, shuffled: bool) -> np.ndarray:
    """In which order the draws are stored.

    Those of eta come as their points were laid out, which a convergence diagnostic would take for
    chains that have not mixed.
    """
    return np.random.default_rng(seed).permutation(number) if shuffled else np.arange(number)


@dataclass(frozen=True)
class _Observed:
    """The groups of the data, the dimensions of y where a row has several, and by group the task of
    each observation.
    """

    groups: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    tasks: dict[str, np.ndarray] = field(default_factory=dict)


def _observed(observer: Observer, draws: Tensor, seed: int, of_guide: bool) -> _Observed:
    """The data, their predictive and what the draws are worth.

    of_guide: whether a guide made them, with eta a point.
    """
    q, support = observer.q, observer.q.batch.support
    flat = support.mask
    if not bool(flat.any()):
        return _Observed()
    evaluated = observer.evaluate(support, len(draws), seed)
    assert evaluated.samples is not None
    y = evaluated.y[flat]
    found = {"posterior_predictive": {"y": evaluated.samples[:, flat]}, "observed_data": {"y": y}}
    dims: dict[str, list[str]] = {}
    if y.dim() > 1:
        extra = y.dim() - 1
        responses = ["response"] if extra == 1 else [f"response_{axis}" for axis in range(extra)]
        dims = {f"{group}/y": ["obs", *responses] for group in found}
    if not q.is_point:  # a point's LOO would be its in-sample density
        found["log_likelihood"] = {"y": evaluated.log_prob[:, flat]}
    task = np.array(q.batch.names)[flat.nonzero()[:, 0].cpu().numpy()]
    tasks = dict.fromkeys(found, task)
    if of_guide and not q.is_point:
        log_q = q.distribution.log_prob(draws).squeeze(-1)
        log_prior = q.prior.log_prob(draws).squeeze(-1)
        fitted = evaluated.weighted
        # the guide is fitted to other numbers than are predicted
        if observer.model.predictive is not observer.model:
            fitted = observer.log_likelihood(draws, q.eta)
        found["sample_stats"] = {"log_joint": log_prior + fitted, "log_q": log_q}
    return _Observed(found, dims, tasks)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
