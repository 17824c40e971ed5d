"""The guide behind a name, or around a factory of Pyro guides."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, Literal, get_args

import torch

from varmeta._checks import name_of, nearest
from varmeta.guides.delta import Delta
from varmeta.guides.dense import Dense
from varmeta.guides.guide import Guide
from varmeta.guides.laplace import Laplace
from varmeta.guides.mean_field import MeanField
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.guides.quadrature import Quadrature
from varmeta.guides.structured import LowRank
from varmeta.models.model import TaskModel

GuideName = Literal["delta", "normal", "multivariate_normal", "low_rank", "laplace", "quadrature"]
GUIDE_NAMES: tuple[GuideName, ...] = get_args(GuideName)
GUIDES: dict[str, type[Guide]] = dict(
    zip(GUIDE_NAMES, (Delta, MeanField, Dense, LowRank, Laplace, Quadrature), strict=True)
)

# Up to here joint Newton steps find a dense guide's fit, and a mean-field one ends far above it
# (`experiments.choices`, guide).
MAX_DENSE_SIZE = 20
# Where the posterior is known nothing is searched for: a task costs the cube of its weights.
MAX_KNOWN_SIZE = 300


def default_guide(model: TaskModel) -> GuideName:
    """The name of the guide where none was asked for.

    Dense for few weights per task, under a dense prior, and where a task's posterior is known to be
    Gaussian, else mean-field.

    A mean-field guide leaves out how a task's weights depend on each other, and with it the prior's
    sds come out too small (sleepstudy's uncorrelated intercepts: 20.4 where the maximum of the
    likelihood has 24.2).
    """
    few = MAX_KNOWN_SIZE if model.is_linear_gaussian else MAX_DENSE_SIZE
    return "multivariate_normal" if model.weights.size <= few or model.prior.dense else "normal"


def make_guide(guide: GuideName | Callable[..., Any] | Guide) -> Guide:
    """The guide behind a name, or around a factory of Pyro guides.

    Raises ValueError for an unknown name.
    """
    if isinstance(guide, PyroGuide):
        return PyroGuide(guide.factory)  # each serves one model
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, str):
        if guide not in GUIDES:
            raise ValueError(
                f"unknown guide {guide!r}: choose one of {GUIDE_NAMES}, or pass a factory of a "
                f"Pyro guide{nearest(guide, GUIDE_NAMES)}"
            )
        return GUIDES[guide]()
    if isinstance(guide, torch.nn.Module):
        kind = type(guide).__name__
        raise TypeError(
            "guide must be a name or a callable that makes a Pyro guide, not a guide that is made "
            f"already: give {kind} itself, or lambda model: {kind}(model, ...)"
        )
    if not callable(guide):
        raise TypeError(
            "guide must be a name or a callable that makes a Pyro guide, not "
            f"{type(guide).__name__}"
        )
    _check_factory(guide)
    return PyroGuide(guide)


def _check_factory(guide: Callable[..., Any]) -> None:
    """Raise TypeError for a function that does not take the model, and it alone."""
    try:
        signature(guide).bind(None)
    except TypeError as error:
        raise TypeError(
            f"guide must be a factory, model -> Pyro guide, which {name_of(guide)!r} is not "
            f"({error}).  A plain Pyro guide function keeps its numbers in Pyro's global store: "
            "make it a PyroModule that holds them, and give its class, or take "
            "lambda model: AutoNormal(model) (docs/extend.md)"
        ) from error
    except ValueError:  # written in C, so it cannot be asked
        pass
