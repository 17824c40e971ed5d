"""Which of a posterior's and a fit's numbers go into which ArviZ group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta.files.version import __version__
from varmeta.guides.kl import location
from varmeta.models.eta import natural
from varmeta.models.labels import coefficients
from varmeta.posteriors import arviz as inference_data
from varmeta.posteriors.draws import Draws
from varmeta.posteriors.observer import Observer

# Draws of all weights are left out beyond this many numbers (80 MB); their distance from theta0
# always goes in.
MAX_WEIGHT_NUMBERS = 10_000_000


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
    q, model = observer.q, observer.model
    delta = q.is_point
    draws = q.theta(num_samples, seed)
    prior = model.prior_distribution(q.eta)
    hyper = _hyper_draws(q, num_samples, x_names)
    with torch.no_grad():
        about = {"theta0": location(prior), "prior_sd": prior.stddev}
        named = coefficients(model, q.eta, x_names)
        about |= {"coefficients": torch.stack(list(named.values()))} if named else {}
        found: dict[str, dict[str, Any]] = {
            "posterior": {"distance": (draws.squeeze(-2) - q.centres(num_samples)).norm(dim=-1)}
            | hyper,
            "constant_data": {} if hyper else about,
        }
        if draws.numel() <= MAX_WEIGHT_NUMBERS:
            found["posterior"]["theta"] = draws.squeeze(-2)
    dims = {
        "theta": ["task", "weight"],
        "distance": ["task"],
        "theta0": ["weight"],
        "prior_sd": ["weight"],
        "coefficients": ["coefficient"],
        "posterior_predictive/y": ["obs"],
        "observed_data/y": ["obs"],
        "log_likelihood/y": ["obs"],
    }
    obs_task: dict[str, Any] = {}
    support = q.batch.support
    if bool(support.mask.any()):
        evaluated = observer.evaluate(support, num_samples, seed)
        flat = support.mask
        assert evaluated.samples is not None
        tasks = np.array(q.batch.names)[flat.nonzero()[:, 0].cpu().numpy()]
        found["posterior_predictive"] = {"y": evaluated.samples[:, flat]}
        found["observed_data"] = {"y": evaluated.y[flat]}
        if found["observed_data"]["y"].dim() > 1:
            extra = found["observed_data"]["y"].dim() - 1
            responses = (
                ["response"] if extra == 1 else [f"response_{axis}" for axis in range(extra)]
            )
            for group in ("posterior_predictive", "observed_data"):
                dims[f"{group}/y"] = ["obs", *responses]
        if not delta:  # a point's LOO would be its in-sample density
            found["log_likelihood"] = {"y": evaluated.log_prob[:, flat]}
        if not delta and not hyper:  # with eta integrated out the draws are not those of a guide
            log_q = q.distribution.log_prob(draws).squeeze(-1)
            log_prior = q.prior.log_prob(draws).squeeze(-1)
            log_joint = log_prior + evaluated.weighted
            found["sample_stats"] = {"log_joint": log_joint, "log_q": log_q}
            dims |= {"log_joint": ["task"], "log_q": ["task"]}
        obs_task = {
            name: tasks
            for name in ("posterior_predictive", "observed_data", "log_likelihood")
            if name in found
        }
    facts = {
        "inference_library": "varmeta",
        "inference_library_version": __version__,
        "guide": q.guide_name,
        "posterior_kind": q.kind,
    }
    labels: dict[str, Any] = dict(names)
    labels |= {"coefficient": list(named)} if named and not hyper else {}
    if record is not None:
        found["fit"] = dict(record.history)
        dims |= {f"fit/{name}": ["step"] for name in record.history}
        labels |= {"step": record.steps}
        facts |= record.facts
    arrays = {
        group: {name: _array(value) for name, value in values.items()}
        for group, values in found.items()
    }
    return inference_data.to_arviz(arrays, dims, labels, obs_task, facts)


def _hyper_draws(q: Draws, num_samples: int, x_names: tuple[str, ...] | None) -> dict[str, Tensor]:
    """Draws of eta in natural units, those behind the draws of the weights; none where eta is a
    point.
    """
    eta = q.etas(num_samples)
    if not eta:
        return {}
    named = list(natural(q.model, eta, x_names).items())
    size = q.model.weights.size
    found = {"theta0": torch.stack([value for _, value in named[:size]], -1)}
    found |= {
        name.replace(", ", ",").replace(" ", "_"): value
        for name, value in named[size:]
        if not name.startswith("sd(")
    }
    sds = [value for name, value in named if name.startswith("sd(")]
    return found | ({"prior_sd": torch.stack(sds, -1)} if sds else {})


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
