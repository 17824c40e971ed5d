"""What may be said of a `GaussianPrior`: its arguments one by one, and what excludes what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from varmeta._checks import kind_of, one_of, whole_number
from varmeta.priors.hyperprior import Hyperprior

LearnPrecision = Literal["shared", "per_module", "per_parameter", "full", "low_rank"]
# Names of parameters whose weights are correlated with each other, and with no others.
Blocks = tuple[tuple[str, ...], ...]
LEARN_PRECISION: tuple[LearnPrecision | None, ...] = (None, *get_args(LearnPrecision))


def check_precision(precision: Any, learn_precision: Any) -> None:
    """Raise ValueError or TypeError for a precision that is none.

    Also for one that is to be learned in no known way.
    """
    one_of("learn_precision", learn_precision, LEARN_PRECISION)
    if isinstance(precision, Mapping):
        for name, value in precision.items():
            _count(value, f"the precision of {name!r}")
    elif precision is not None:
        count = _count(precision, "the precision")
        if count != 1:
            raise ValueError(
                f"the precision must be one number, not {count}: give a dict by parameter name"
            )


def _count(value: Any, what: str) -> int:
    """How many precisions these are."""
    if isinstance(value, (str, bool)):
        hint = (
            f": write GaussianPrior(learn_precision={value!r})" if value in LEARN_PRECISION else ""
        )
        raise TypeError(f"{what} must be a number, not {value!r}{hint}")
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} must be a number or a tensor, not {kind_of(value)}") from error
    if not bool((tensor > 0).all()) or not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} must be positive and finite, not {tensor.tolist()}")
    return tensor.numel()


def checked_covariance(
    covariance: Tensor | None, precision: object, learn_precision: LearnPrecision | None
) -> Tensor | None:
    """The covariance in floating numbers.  Raises ValueError where it is none, or is said twice."""
    if covariance is None:
        return None
    covariance = torch.as_tensor(covariance)
    covariance = covariance if covariance.is_floating_point() else covariance.to(torch.float64)
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(
            f"covariance must be a square matrix, not of shape {tuple(covariance.shape)}"
        )
    if bool(torch.linalg.cholesky_ex(covariance).info) or not torch.allclose(
        covariance, covariance.mT
    ):
        raise ValueError("covariance must be symmetric and positive definite")
    if precision is not None:
        raise ValueError(
            "give a precision or a covariance, not both: they are two ways to say the same"
        )
    if learn_precision not in (None, "full"):
        raise ValueError(
            f"a dense covariance goes with learn_precision=None or 'full', not {learn_precision!r}"
        )
    return covariance


def check_hyperpriors(
    hyperprior: object, scale_hyperprior: Hyperprior, learn_precision: LearnPrecision | None
) -> None:
    """Raise ValueError or TypeError for a density of what is not learned.

    Also for two densities of the same.
    """
    if hyperprior is not None:
        if not isinstance(hyperprior, torch.distributions.Distribution):
            raise TypeError(
                "hyperprior must be a distribution over the precision, not "
                f"{type(hyperprior).__name__}"
            )
        if learn_precision is None:
            raise ValueError(
                "a hyperprior needs a precision to act on: set learn_precision, or leave it out"
            )
        if learn_precision == "full":
            raise ValueError(
                "a hyperprior on a dense covariance is not offered: use "
                "learn_precision='per_parameter'"
            )
    if scale_hyperprior is not None and learn_precision is None:
        raise ValueError(
            "a scale_hyperprior needs a standard deviation to act on: set learn_precision, or "
            "leave it out"
        )
    if scale_hyperprior is not None and hyperprior is not None:
        raise ValueError(
            "give a hyperprior on the precision or a scale_hyperprior on the sd, not both"
        )
    if isinstance(scale_hyperprior, Mapping) and learn_precision == "shared":
        raise ValueError(
            "with learn_precision='shared' there is one sd: scale_hyperprior must be one "
            "distribution"
        )


def checked_lkj(lkj: float, learn_precision: LearnPrecision | None) -> float:
    if not (lkj > 0 and math.isfinite(lkj)):
        raise ValueError(f"lkj must be a positive finite number, not {lkj}")
    if lkj != 1.0 and learn_precision != "full":
        raise ValueError(
            f"lkj={lkj:g} is a density of learned correlations, of any kind, and "
            f"learn_precision={learn_precision!r} learns none or some: set learn_precision='full', "
            "or leave it out"
        )
    return float(lkj)


def checked_rank(rank: int | None, learn_precision: LearnPrecision | None) -> int | None:
    """Whether it is less than a task's weights is known when these are: see `start.rank_of`."""
    if rank is None:
        return None
    if learn_precision != "low_rank":
        raise ValueError(
            f"rank={rank!r} is that of learn_precision='low_rank', not of {learn_precision!r}: set "
            "it, or leave the rank out"
        )
    whole_number("rank", rank)
    return int(rank)


def checked_learn_loc(learn_loc: bool | Sequence[str]) -> bool | tuple[str, ...]:
    if isinstance(learn_loc, bool):
        return learn_loc
    if not isinstance(learn_loc, (list, tuple)) or not all(
        isinstance(name, str) for name in learn_loc
    ):
        raise TypeError(
            f"learn_loc must be True, False or a list of parameter names, not {learn_loc!r}"
        )
    return tuple(learn_loc)


def checked_blocks(
    blocks: Sequence[Sequence[str]] | None,
    learn_precision: LearnPrecision | None,
    covariance: Tensor | None,
) -> Blocks | None:
    """The blocks as tuples of names; see `GaussianPrior`.

    Raises TypeError for what lists no lists of names; ValueError for a name in two blocks, and
    where no covariance of blocks is learned.
    """
    if blocks is None:
        return None
    if isinstance(blocks, str) or any(isinstance(names, str) for names in blocks):
        raise TypeError(f"blocks must be a list of lists of parameter names, not {blocks!r}")
    if learn_precision != "full" or covariance is not None:
        raise ValueError(
            "blocks divide a covariance that is learned: set learn_precision='full', and give no "
            "covariance"
        )
    found = tuple(tuple(map(str, names)) for names in blocks)
    every = [name for names in found for name in names]
    twice = sorted({name for name in every if every.count(name) > 1})
    if twice:
        raise ValueError(f"blocks name {twice} more than once: a weight is in one block")
    return found
