"""The learned prior as ArviZ lists it: theta0, sds, correlations, noise, then what is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.models.hyper_posterior import natural
from varmeta.models.labels import coefficients
from varmeta.models.model import TaskModel
from varmeta.posteriors.draws import Draws

# Numbers of eta up to which a point stands among the draws, so that a summary begins with it; of a
# network theta0 and the sds stand in "constant_data".
MAX_NUMBERS = 200
DIMS = {
    "theta0": ["weight"],
    "prior_sd": ["weight"],
    "correlation": ["pair"],
    "shared": ["shared_weight"],
    "coefficients": ["coefficient"],
}


@dataclass(frozen=True)
class PriorNumbers:
    """What the prior is, as variables of ArviZ's.

    draws: by variable, `(draws, ...)`; constants: without the axis of draws; labels: by dimension,
        those of `DIMS`.
    """

    draws: dict[str, Tensor]
    constants: dict[str, Tensor]
    labels: dict[str, list[str]]


def prior_numbers(q: Draws, num_samples: int, x_names: tuple[str, ...] | None) -> PriorNumbers:
    """The prior's numbers behind each of `num_samples` draws.

    The same in all where eta is a point.
    """
    drawn = q.etas(num_samples)
    eta = drawn or {name: value.unsqueeze(0) for name, value in q.eta.items()}
    if not drawn and sum(value.numel() for value in eta.values()) > MAX_NUMBERS:
        return _constants(q.model, q.eta, x_names)
    found, labels = _named(q.model, eta, x_names)
    if not drawn and "prior_sd" not in found:  # given, not learned
        found["prior_sd"] = q.model.prior_distribution(q.eta).stddev.detach().unsqueeze(0)
    order = ("theta0", "prior_sd", "correlation")
    first = {name: found.pop(name) for name in order if name in found}
    last = {name: found.pop(name) for name in ("shared", "coefficients") if name in found}
    draws = first | found | last
    return PriorNumbers(
        {name: value.expand(num_samples, *value.shape[1:]) for name, value in draws.items()},
        {},
        labels,
    )


def _named(
    model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """The variables with a leading axis as in eta, and the labels of their other one."""
    left = list(natural(model, eta, x_names).items())

    def next_ones(number: int) -> tuple[list[str], Tensor | None]:
        taken, left[:] = left[:number], left[number:]
        return [name for name, _ in taken], (
            torch.stack([value for _, value in taken], -1) if taken else None
        )

    def size_of(names: Mapping[str, object] | tuple[str, ...]) -> int:
        return sum(eta[name][0].numel() for name in names)

    size, prior = model.weights.size, model.prior
    pairs = size * (size - 1) // 2 if prior.correlates else 0
    learned = prior.learn_precision is not None
    found, labels = {}, {}
    for variable, number in {
        "theta0": size,
        "shared": size_of(model.shared),
        "coefficients": size_of(tuple(model.coefficients)),
        "prior_sd": size * learned,
        "correlation": pairs * learned,
    }.items():
        names, values = next_ones(number)
        if values is not None:
            found[variable] = values
            labels[DIMS[variable][0]] = names
    if "pair" in labels:
        labels["pair"] = [name.removeprefix("cor(").removesuffix(")") for name in labels["pair"]]
    # the sds are of the weights, under their names
    return found | {name.replace(" ", "_"): value for name, value in left}, labels


def _constants(
    model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None
) -> PriorNumbers:
    named = coefficients(model, eta, x_names)
    with torch.no_grad():
        prior = model.prior_distribution(eta)
        found = {"theta0": prior.mean, "prior_sd": prior.stddev}
        if named:
            found["coefficients"] = torch.stack(list(named.values()))
    return PriorNumbers({}, found, {"coefficient": list(named)} if named else {})
