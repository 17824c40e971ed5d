"""Where a prior's precisions start, and whether what is said of them fits a task's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.priors.check import LearnPrecision
from varmeta.priors.factors import first_trapezoid
from varmeta.priors.hyperprior import Hyperprior
from varmeta.priors.weights import Weights

Start = float | Mapping[str, float | Tensor] | None
# Of each weight's variance, on average, what the shared directions have at the start.
SHARE = 0.2
# Columns where none are asked for.
RANK = 5


def check_names(
    start: Start,
    learn_precision: LearnPrecision | None,
    scale_hyperprior: Hyperprior,
    weights: Weights,
) -> None:
    """Raise ValueError for names that are none of a task's weights, or leave some out."""
    known = {*weights.names, *weights.modules}
    unknown = set(start if isinstance(start, Mapping) else ()) - known
    if unknown:
        raise ValueError(
            f"precision names {sorted(unknown)}, but the weights and modules are {sorted(known)}"
            f"{nearest(sorted(unknown), known)}"
        )
    if isinstance(start, Mapping):
        missing = [name for name in weights.names if not {name, weights.module(name)} & set(start)]
        if missing:
            raise ValueError(
                f"precision is a dict but says nothing about {missing}: name each, or its module"
            )
    if isinstance(scale_hyperprior, Mapping):
        known = set(weights.modules if learn_precision == "per_module" else weights.names)
        unknown = set(scale_hyperprior) - known
        if unknown:
            raise ValueError(
                f"scale_hyperprior names {sorted(unknown)}, but the learned sds are of "
                f"{sorted(known)}{nearest(sorted(unknown), known)}"
            )


def log_precisions(
    start: Start, learn_precision: LearnPrecision | None, weights: Weights, like: Tensor
) -> Tensor:
    """log lambda of every weight at the start, `(D,)`."""
    if start is None and learn_precision not in (None, "full"):
        counts = [weights.fan_in.get(name, 1) for name in weights.names]
        return torch.cat(
            [
                like.new_full((size,), math.log(n))
                for size, n in zip(weights.sizes, counts, strict=True)
            ]
        )
    if not isinstance(start, Mapping):
        return like.new_full((weights.size,), 0.0 if start is None else math.log(start))
    parts = []
    for name, shape in weights.shapes.items():
        value = torch.as_tensor(start.get(name, start.get(weights.module(name))))
        if value.numel() != 1 and value.shape != shape:
            raise ValueError(
                f"the precision of {name!r} has shape {tuple(value.shape)}: expected one "
                f"number, or {tuple(shape)}"
            )
        parts.append(value.to(like).log().expand(shape).reshape(-1))
    return torch.cat(parts)


def rank_of(rank: int | None, size: int) -> int:
    """The columns of a low-rank prior over `size` weights.

    Raises ValueError where there are too few weights for it.
    """
    if size < 2:
        raise ValueError(
            "learn_precision='low_rank' learns what tasks have in common along several weights, "
            "but a task has 1 weight: use learn_precision='per_parameter'"
        )
    if rank is not None and rank >= size:
        raise ValueError(
            f"rank={rank} must be less than the {size} weights of a task: give at most "
            f"{size - 1}, or use learn_precision='full'"
        )
    return min(RANK, size - 1) if rank is None else rank


def is_told_apart(size: int, rank: int) -> bool:
    """Whether a covariance of `rank` directions and own variances has one factor, up to signs.

    Source: Ledermann, Psychometrika 2 (1937).

    >>> is_told_apart(6, 3), is_told_apart(6, 4)
    (True, False)
    """
    return (size - rank) ** 2 >= size + rank


def factor_entries(size: int, rank: int, like: Tensor) -> Tensor:
    """The factor W of a low-rank prior at the start, from its diagonal down.

    A column of zeros would be a saddle, which no gradient leaves.
    """
    length = math.sqrt(SHARE / (1.0 - SHARE) * size / rank)
    return (length * first_trapezoid(size, rank)).to(like)
