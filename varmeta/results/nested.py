"""Whether one fitted model is a special case of another, by how the two are built.

A model is nested in another where it sets some of the other's parameters to numbers: coefficients
to 0, correlations to 0, precisions equal, or the variance of a weight to 0.  The last lies on the
edge of what a variance may be, which a likelihood ratio must know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import name_of
from varmeta.files.plain import plain
from varmeta.likelihoods.base import Likelihood
from varmeta.models import constants
from varmeta.models.linear_predictor import LinearPredictor
from varmeta.models.model import TaskModel
from varmeta.priors.factors import together
from varmeta.results.result import Fit


@dataclass(frozen=True)
class Nested:
    """The smaller model is a special case of the larger.

    zero: the weights whose variance is 0 in the smaller model.
    variances: how many variances these are.
    is_regular: whether the larger model's other parameters are determined where the two meet.
    """

    zero: tuple[str, ...] = ()
    variances: int = 0
    is_regular: bool = True


def nested(small: Fit, large: Fit) -> Nested | str:
    """How the first fit's model is nested in the second's; why that is not known, in words."""
    why = _another_likelihood(small.model.likelihood, large.model.likelihood)
    why = why or _another_net(small, large) or _another_mean(small, large)
    return why or _covariances(small.model, large.model)


def other_fixed_effects(one: Fit, other: Fit) -> str | None:
    """Where two fits' means are not linear in the same columns; None where they are."""
    for a, b in ((one, other), (other, one)):
        why = _another_net(a, b) or _another_mean(a, b)
        if why:
            return why
    return None


def _another_likelihood(small: Likelihood | None, large: Likelihood | None) -> str | None:
    if type(small) is not type(large):
        return f"their likelihoods are {small!r} and {large!r}"
    if small is None or large is None:
        return None
    ours, theirs = small.constructed_with, large.constructed_with
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, Likelihood):
            why = _another_likelihood(value, other)
            if why:
                return why
        elif name.startswith("learn_"):
            if value and not other:
                return f"{name.removeprefix('learn_')} is learned in the smaller only"
        elif not theirs.get(f"learn_{name}", False) and plain(value) != plain(other):
            # what is learned in the larger may have any value in the smaller
            return f"their likelihoods are {small!r} and {large!r}"
    return None


def _another_net(small: Fit, large: Fit) -> str | None:
    """What in the smaller's network or program is not the larger's, columns left out aside."""
    a, b = small.model, large.model
    if small.tasks.names != large.tasks.names:
        return "their tasks stand in another order"
    x, z = (fit.tasks.support_rows.x.cpu().double() for fit in (small, large))
    if type(a.net) is LinearPredictor and type(b.net) is LinearPredictor:
        return _other_columns(a.net, b.net, x, z)
    if a.net is None and b.net is None:
        programs = [model.constructed_with["program"] for model in (a, b)]
        if programs[0] is not programs[1]:
            return f"their programs, {' and '.join(map(name_of, programs))}, are code"
    elif type(a.net) is not type(b.net) or plain(a.net) != plain(b.net):
        return "their networks are not of one structure"
    elif constants.fingerprint(a.net, a.constants) != constants.fingerprint(b.net, b.constants):
        return "their networks hold other constants"
    if {n: v.shape for n, v in _own(a).items()} != {n: v.shape for n, v in _own(b).items()}:
        return "their parameters are not the same"
    return None if torch.equal(x, z) else "their x differs, in its numbers or the order of its rows"


def _own(model: TaskModel) -> dict[str, Tensor]:
    """The parameters of the network or program, without coefficients of covariates."""
    return {n: value for n, value in model.start.items() if n not in model.coefficients}


def _other_columns(a: LinearPredictor, b: LinearPredictor, x: Tensor, z: Tensor) -> str | None:
    missing = [name for name in a.columns if name not in b.columns]
    missing += [a.intercept_name] if a.intercept_name not in ("", b.intercept_name) else []
    if missing:
        return f"{missing} {'is' if len(missing) == 1 else 'are'} in the smaller only"
    if set(a.offset) != set(b.offset):
        return "their offsets are not the same"
    for position, name in enumerate(a.columns):
        if not torch.equal(x[:, position], z[:, b.columns.index(name)]):
            return f"the column {name!r} differs, in its numbers or the order of its rows"
    return None


def _another_mean(small: Fit, large: Fit) -> str | None:
    """What the smaller's theta0, shared parameters and coefficients can be and the larger's not."""
    a, b = small.model, large.model
    lost = [name for name in a.start if name in small.eta and name not in large.eta]
    if lost:
        return f"the mean of {lost} is estimated in the smaller only"
    for name, held in b.weights.fixed.items():
        # a column that the smaller lacks has the coefficient 0 there
        other = a.weights.fixed.get(name, torch.zeros_like(held))
        if not torch.equal(held.double(), other.double()):
            return f"theta0 of {name!r} is held at other values"
    for name, (_, feature) in a.coefficients.items():
        values = [fit.tasks.features[feature].double() for fit in (small, large)]
        if not torch.equal(*values):
            return f"the feature {feature!r} of {name!r} has other values"
    return None


def _covariances(a: TaskModel, b: TaskModel) -> Nested | str:
    """How the smaller's covariance of a task's weights is one of the larger's."""
    missing = [name for name in a.weights.names if name not in b.weights.names]
    if missing:
        return f"{missing} {'varies' if len(missing) == 1 else 'vary'} in the smaller only"
    extra = tuple(name for name in b.weights.names if name not in a.weights.names)
    size = sum(b.weights.shapes[name].numel() for name in extra)
    kind = b.prior.learn_precision
    if kind == "full":
        at = [b.weights.labels.index(name) for name in a.weights.labels]
        if bool((_correlated(a) & ~_correlated(b)[at][:, at]).any()):
            return "weights are correlated in the smaller that are in other blocks of the larger"
        return Nested(extra, size)
    if kind == "low_rank":
        return _in_low_rank(a, b, extra, size)
    correlates = (a.prior.correlates or a.prior.dense) and a.weights.size > 1
    if kind is None and b.prior.dense:
        same = a.prior.learn_precision is None and plain(a.prior.covariance) == plain(
            b.prior.covariance
        )
        return Nested() if same and not extra else "the larger's covariance is given"
    if correlates:
        return "weights are correlated in the smaller only"
    return _in_groups(_owners(a), _owners(b), extra, kind is not None)


def _correlated(model: TaskModel) -> Tensor:
    """Which weights may be correlated, `(D, D)`, bool."""
    prior, size = model.prior, model.weights.size
    if prior.blocks is not None:
        return together(prior.blocks, model.weights)
    if prior.correlates or prior.dense:
        return torch.ones(size, size, dtype=torch.bool)
    return torch.eye(size, dtype=torch.bool)


def _in_low_rank(a: TaskModel, b: TaskModel, extra: tuple[str, ...], size: int) -> Nested | str:
    ranks = a.prior.rank_for(a.weights), b.prior.rank_for(b.weights)
    if not extra and ranks[0] == ranks[1]:
        return Nested()
    if ranks[0] > ranks[1] or (not ranks[0] and (a.prior.correlates or a.prior.dense)):
        return "the larger's directions are too few for the smaller's covariance"
    return Nested(extra, size, is_regular=False)


def _in_groups(
    ours: dict[str, list[Any]], theirs: dict[str, list[Any]], extra: tuple[str, ...], learned: bool
) -> Nested | str:
    """Of independent weights: the larger's equal precisions must be equal in the smaller too."""
    members: dict[Any, set[Any]] = {}
    for name, owners in ours.items():
        for mine, its in zip(owners, theirs[name], strict=True):
            members.setdefault(its, set()).add(mine)
    added = {its for name in extra for its in theirs[name]}
    if added and not learned:
        return f"the larger's variance of {list(extra)} is given, and not 0"
    if added & set(members):
        return f"the larger gives {list(extra)} the variance of other weights, which 0 cannot be"
    if any(len(values) > 1 for values in members.values()):
        return "weights have one precision in the larger and several in the smaller"
    if not learned and any(values != {its} for its, values in members.items()):
        return "precisions are given in the larger, and not the smaller's"
    return Nested(extra, len(added))


def _owners(model: TaskModel) -> dict[str, list[Any]]:
    """What decides each weight's precision, by parameter name: a group, or a given number."""
    prior, weights = model.prior, model.weights
    if prior.learn_precision is None:
        given = prior.log_precision(weights, {}, torch.zeros((), dtype=torch.float64))
        return {n: value.reshape(-1).tolist() for n, value in weights.unflatten(given).items()}
    of: dict[str, Callable[[str, int], str]] = {
        "shared": lambda name, i: "",
        "per_module": lambda name, i: weights.module(name),
    }
    owner = of.get(prior.learn_precision, lambda name, i: f"{name}[{i}]")
    return {n: [owner(n, i) for i in range(s.numel())] for n, s in weights.shapes.items()}
