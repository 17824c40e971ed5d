"""Where theta0 and the shared parameters start, by name.

Here: what they may be called, where the prior puts them, and which it holds there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.likelihoods.base import SCALE
from varmeta.priors.factors import FACTOR, PRECISION, TRIL
from varmeta.priors.gaussian_prior import GaussianPrior


def check_names(
    start: Mapping[str, Tensor],
    shared: tuple[str, ...],
    constants: tuple[str, ...],
    own: Collection[str],
) -> None:
    """Raise ValueError for names of parameters that cannot be kept.

    That is a pattern of nothing that is learned, and a parameter that has the name of another entry
    of eta.

    own: the likelihood's entries.
    """
    for pattern in shared:
        if any(matches(name, pattern) for name in start):
            continue
        fixed = [name for name in constants if matches(name, pattern)]
        if fixed:
            raise ValueError(
                f"shared pattern {pattern!r} matches only parameters with requires_grad=False "
                f"({fixed[0]!r} first), which are constants: leave the pattern out, or have "
                "them learned by requires_grad_(True)"
            )
        raise ValueError(
            f"shared pattern {pattern!r} matches none of the parameters {sorted(start)}"
            f"{nearest(pattern, start)}"
        )
    for name in start:
        if name in (SCALE, TRIL, FACTOR, *own) or name.partition(".")[0] == PRECISION:
            raise ValueError(
                f"the parameter name {name!r} is one that varmeta uses itself: rename it"
            )


def placed_by(prior: GaussianPrior, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """theta0 and coefficients where the prior's loc puts them.

    Raises ValueError for a name that there is not, in a loc_hyperprior too, and for another shape.
    """
    unknown = set(prior.start_loc) - set(start)
    if unknown:
        raise ValueError(
            f"the prior's loc names {sorted(unknown)}, but the parameters are {sorted(start)}"
            f"{nearest(sorted(unknown), start)}"
        )
    placed = {}
    for name, value in prior.start_loc.items():
        value = (
            value.detach()
            if isinstance(value, Tensor)
            else torch.as_tensor(value, dtype=torch.float64)
        )
        if value.numel() != 1 and value.shape != start[name].shape:
            raise ValueError(
                f"the prior's loc of {name!r} has shape {tuple(value.shape)}: expected "
                f"{tuple(start[name].shape)}"
            )
        placed[name] = value.expand(start[name].shape).clone()
    named = prior.loc_hyperprior if isinstance(prior.loc_hyperprior, Mapping) else {}
    stray = set(named) - set(start)
    if stray:
        raise ValueError(
            f"loc_hyperprior names {sorted(stray)}, but the parameters are {sorted(start)}"
            f"{nearest(sorted(stray), start)}"
        )
    return placed


def held_by(prior: GaussianPrior, varying: list[str]) -> list[str]:
    """The weights whose theta0 is not learned.  Raises ValueError for a name that there is not."""
    learned = prior.learn_loc
    if isinstance(learned, bool):
        held = [] if learned else varying
    else:
        for pattern in learned:
            if not any(matches(name, pattern) for name in varying):
                raise ValueError(
                    f"learn_loc names {pattern!r}, but the weights that vary between tasks are "
                    f"{varying} (what is shared is always learned){nearest(pattern, varying)}"
                )
        held = [name for name in varying if not any(matches(name, pattern) for pattern in learned)]
    named = prior.loc_hyperprior if isinstance(prior.loc_hyperprior, Mapping) else {}
    both = [name for name in held if name in named]
    if both:
        raise ValueError(
            f"loc_hyperprior is about theta0 of {both}, which learn_loc holds fixed: leave one out"
        )
    if held == varying and prior.loc_hyperprior is not None and not named:
        raise ValueError(
            f"loc_hyperprior is about theta0, all of which learn_loc={learned!r} holds fixed: "
            "leave one out"
        )
    return held


def matches(name: str, pattern: str) -> bool:
    # the name itself too: a column may be called "dose [mg]"
    return name == pattern or fnmatch.fnmatchcase(name, pattern)
