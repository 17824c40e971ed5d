"""Learning rates of inner steps by weight: their entries of eta, and what each number of phi takes.

Learned rates stand in eta as logarithms: "inner_lr.<weight>" by weight, "inner_lr.<module>" by
layer, "inner_lr" as one; those of single steps have the steps as their first axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.models.model import TaskModel
from varmeta.models.start import matches
from varmeta.numerics.first_order import GradientDescent
from varmeta.numerics.learning_rates import LearnedRates
from varmeta.numerics.tree import Tree
from varmeta.priors.weights import Weights

RATE = "inner_lr"
NOT_LEARNED = (
    "inner learning rates are learned by the derivative through the steps, which vm.Unrolled "
    "takes, and vm.FirstOrder with the steps' gradients held fixed: here give numbers, such as "
    "GradientDescent(lr=0.01)"
)
# Of phi: what has one number for each weight.
BY_WEIGHT = ("loc", "log_scale", "log_added")


def learned_rates(strategy: object) -> LearnedRates | None:
    """What a strategy learns of its inner steps, if anything."""
    rule = getattr(strategy, "minimizer", None)
    rate = rule.lr if isinstance(rule, GradientDescent) else None
    return rate if isinstance(rate, LearnedRates) else None


def initial_eta(strategy: object, model: TaskModel, like: Tensor) -> dict[str, Tensor]:
    """Where eta starts under a strategy: the model's, and the rates that it learns."""
    return model.init(like) | initial_rates(strategy, model, like)


def initial_rates(strategy: object, model: TaskModel, like: Tensor) -> dict[str, Tensor]:
    """The entries of eta that are the strategy's own, on the dtype and device of `like`."""
    learned = learned_rates(strategy)
    if learned is None:
        return {}
    steps = (getattr(strategy, "inner_steps", 1),) if learned.per_step else ()
    return {
        name: like.new_full((*steps, *shape), math.log(learned.start))
        for name, shape in _shapes(learned, model.weights).items()
    }


def without_rates(
    strategy: object, model: TaskModel, eta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The model's part of eta, on which alone a posterior depends."""
    learned = learned_rates(strategy)
    own = {} if learned is None else _shapes(learned, model.weights)
    return {name: value for name, value in eta.items() if name not in own}


def rates_by_name(strategy: object, model: TaskModel, eta: Mapping[str, Tensor]) -> Tree:
    """The learned rates themselves, by weight, layer or "all"; {} where none are learned."""
    learned = learned_rates(strategy)
    names = () if learned is None else _shapes(learned, model.weights)
    return {name.removeprefix(RATE).removeprefix(".") or "all": eta[name].exp() for name in names}


def check_inner_rates(strategy: object, model: TaskModel) -> None:
    """Raise ValueError where rates by weight do not fit the model's weights."""
    rule, weights = getattr(strategy, "minimizer", None), model.weights
    if not isinstance(rule, GradientDescent):
        return
    if isinstance(rule.lr, LearnedRates):
        taken = [name for name in _shapes(rule.lr, weights) if name in model.start]
        if taken:
            raise ValueError(
                f"the parameter name {taken[0]!r} is one that varmeta uses itself: rename it"
            )
    elif isinstance(rule.lr, tuple):
        _fixed(rule.lr, weights, torch.zeros(()))


def inner_rates(
    weights: Weights, rule: object, eta: Mapping[str, Tensor], phi: Tree
) -> Tree | None:
    """The learning rate of every entry of phi, `(steps or 1, 1, ...)`, differentiable in eta.

    None of a rule that has one rate.

    Raises ValueError where rates are to be learned that are not in eta.
    """
    if not isinstance(rule, GradientDescent) or not isinstance(rule.lr, tuple | LearnedRates):
        return None
    if isinstance(rule.lr, LearnedRates):
        if not eta.keys() >= _shapes(rule.lr, weights).keys():
            raise ValueError(NOT_LEARNED)
        rates = _vector(rule.lr, weights, eta).exp()
    else:
        rates = _fixed(rule.lr, weights, next(iter(phi.values())))
    rates = rates.reshape(-1, 1, weights.size)
    found = {}
    for name, x in phi.items():
        own = name in BY_WEIGHT and x.shape[1:] == (weights.size,)
        # what belongs to no one weight
        mean = None if own else rates.log().mean(-1).exp()
        found[name] = rates if mean is None else mean.reshape(-1, *(1 for _ in x.shape))
    return found


def _shapes(learned: LearnedRates, weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of each entry of eta, without steps."""
    if learned.per == "weight":
        return {f"{RATE}.{name}": tuple(shape) for name, shape in weights.shapes.items()}
    if learned.per == "layer":
        return {f"{RATE}.{name}": () for name in weights.modules}
    return {RATE: ()}


def _vector(learned: LearnedRates, weights: Weights, eta: Mapping[str, Tensor]) -> Tensor:
    """The logarithms for each weight, `(steps, D)` or `(D,)`."""
    if learned.per == "weight":
        return weights.flatten({name: eta[f"{RATE}.{name}"] for name in weights.names})
    if learned.per == "model":
        one = eta[RATE].unsqueeze(-1)
        return one.expand(*one.shape[:-1], weights.size)
    own = [eta[f"{RATE}.{weights.module(name)}"].unsqueeze(-1) for name in weights.names]
    parts = zip(own, weights.sizes, strict=True)
    return torch.cat([one.expand(*one.shape[:-1], size) for one, size in parts], -1)


def _fixed(
    given: tuple[tuple[str, float], ...] | tuple[float, ...], weights: Weights, like: Tensor
) -> Tensor:
    """Fixed rates, `(D,)`.  Raises ValueError where a pattern or a weight stays alone."""
    named = tuple(pair for pair in given if isinstance(pair, tuple))
    if not named:
        if len(given) != weights.size:
            raise ValueError(
                f"lr has {len(given)} rates, but a task has {weights.size} weights: one for each, "
                "in the order of fit.prior.labels, or rates by name, such as "
                "{'head.*': 0.1, '*': 0.01}"
            )
        return torch.tensor(given, dtype=like.dtype, device=like.device)
    own = zip(_matched(named, weights.names), weights.sizes, strict=True)
    return torch.cat([like.new_full((size,), rate) for rate, size in own])


@lru_cache(maxsize=64)
def _matched(given: tuple[tuple[str, float], ...], names: tuple[str, ...]) -> tuple[float, ...]:
    """The rate of each name: that of the first pattern that it matches."""
    for pattern, _ in given:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"lr names {pattern!r}, which matches none of the weights that vary between tasks, "
                f"{list(names)}{nearest(pattern, names)}"
            )
    found = []
    for name in names:
        own = [rate for pattern, rate in given if matches(name, pattern)]
        if not own:
            raise ValueError(
                f"lr has no rate for the weight {name!r}: add '*' for those that no pattern matches"
            )
        found.append(own[0])
    return tuple(found)
