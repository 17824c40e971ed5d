"""Which of a posterior's and a fit's numbers go into which ArviZ group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from varmeta import inference_data
from varmeta.bayes.divergence import location
from varmeta.hyper.posterior import IntegratedPosterior
from varmeta.hyper.result import natural
from varmeta.labels import coefficients

if TYPE_CHECKING:
    from varmeta.posterior import Posterior
    from varmeta.result import Fit

# Draws of all weights are left out beyond this many numbers (80 MB); their distance from theta0 always goes in.
MAX_WEIGHT_NUMBERS = 10_000_000


def posterior_groups(posterior: Posterior, num_samples: int, seed: int) -> Any:
    """The posterior of each task, its predictive, and the data, as an ArviZ object."""
    return _assemble(posterior, num_samples, seed, {}, {})


def fit_groups(fit: Fit, num_samples: int, seed: int) -> Any:
    """The training tasks' posteriors together with the record of the run (group `fit`)."""
    table = fit.history
    steps = table["step"].to_numpy(dtype=int)
    history = {str(name): table[name].to_numpy(dtype=float) for name in table.columns if name != "step"}
    attrs = {
        "objective": fit.loss_name,
        "loss": fit.loss,
        "converged": str(fit.converged),
        "stop": fit.stop,
        "seed": fit.seed,
        "config": {"strategy": repr(fit.strategy), "model": repr(fit.model)},
    }
    return _assemble(fit.posterior(), num_samples, seed, {"fit": history}, attrs, {"step": steps})


def _assemble(
    posterior: Posterior, num_samples: int, seed: int, more: dict[str, dict[str, Any]], attrs: dict[str, Any],
    coords: dict[str, Any] | None = None,
) -> Any:  # fmt: skip
    import varmeta

    model, delta = posterior.model, posterior.is_point
    draws = posterior.draws(num_samples, seed)
    prior = model.prior_distribution(posterior.eta)
    hyper = _hyper_draws(posterior, num_samples)
    with torch.no_grad():
        about = {"theta0": location(prior), "prior_sd": prior.stddev}
        named = coefficients(model, posterior.eta, posterior.trained.x_names)
        about |= {"coefficients": torch.stack(list(named.values()))} if named else {}
        groups: dict[str, dict[str, Any]] = {
            "posterior": {"distance": (draws - posterior.centres(num_samples)).norm(dim=-1)} | hyper,
            "constant_data": {} if hyper else about,
        }
        if draws.numel() <= MAX_WEIGHT_NUMBERS:
            groups["posterior"]["theta"] = draws
    dims = {
        "theta": ["task", "weight"], "distance": ["task"], "theta0": ["weight"], "prior_sd": ["weight"],
        "coefficients": ["coefficient"],
        "posterior_predictive/y": ["obs"], "observed_data/y": ["obs"], "log_likelihood/y": ["obs"],
    }  # fmt: skip
    dims |= {f"fit/{name}": ["step"] for name in more.get("fit", {})}
    obs_task: dict[str, Any] = {}
    support = posterior.support
    if bool(support.mask.any()):
        evaluated = posterior.evaluate(support, num_samples, seed)
        flat = support.mask
        assert evaluated.samples is not None
        tasks = np.array(posterior.names)[flat.nonzero()[:, 0].cpu().numpy()]
        groups["posterior_predictive"] = {"y": evaluated.samples[:, flat]}
        groups["observed_data"] = {"y": evaluated.y[flat]}
        if groups["observed_data"]["y"].dim() > 1:
            extra = groups["observed_data"]["y"].dim() - 1
            responses = ["response"] if extra == 1 else [f"response_{axis}" for axis in range(extra)]
            for group in ("posterior_predictive", "observed_data"):
                dims[f"{group}/y"] = ["obs", *responses]
        if not delta:  # a point's LOO would be its in-sample density
            groups["log_likelihood"] = {"y": evaluated.log_prob[:, flat]}
        if not delta and not hyper:  # with eta integrated out the draws are not those of a guide
            q = posterior.distribution
            log_q = q.log_prob(draws.unsqueeze(-2)).squeeze(-1)
            log_prior = posterior.prior.log_prob(draws.unsqueeze(-2)).squeeze(-1)
            log_joint = log_prior + evaluated.weighted
            groups["sample_stats"] = {"log_joint": log_joint, "log_q": log_q}
            dims |= {"log_joint": ["task"], "log_q": ["task"]}
        obs_task = {
            name: tasks for name in ("posterior_predictive", "observed_data", "log_likelihood") if name in groups
        }
    groups |= more
    facts = {
        "inference_library": "varmeta",
        "inference_library_version": varmeta.__version__,
        "guide": posterior.problem.guide.name,
        "posterior_kind": "delta" if delta else "integrated" if hyper else "gaussian",
    }
    labels = {"task": list(posterior.names), "weight": list(posterior.labels), **(coords or {})}
    labels |= {"coefficient": list(named)} if named and not hyper else {}
    arrays = {group: {name: _array(value) for name, value in values.items()} for group, values in groups.items()}
    return inference_data.to_arviz(arrays, dims, labels, obs_task, facts | attrs)


def _hyper_draws(posterior: Posterior, num_samples: int) -> dict[str, Tensor]:
    """Draws of eta in natural units, those behind the draws of the weights; none where eta is a point."""
    if not isinstance(posterior, IntegratedPosterior):
        return {}
    model, eta = posterior.model, posterior.eta_draws(num_samples)
    named = list(natural(model, eta, posterior.trained.x_names).items())
    size = model.weights.size
    found = {"theta0": torch.stack([value for _, value in named[:size]], -1)}
    found |= {
        name.replace(", ", ",").replace(" ", "_"): value for name, value in named[size:] if not name.startswith("sd(")
    }
    sds = [value for name, value in named if name.startswith("sd(")]
    return found | ({"prior_sd": torch.stack(sds, -1)} if sds else {})


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
