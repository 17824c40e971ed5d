"""The guide behind a name, or around a factory of Pyro guides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from varmeta.bayes.guide import Delta, Dense, Guide, MeanField, PyroGuide
from varmeta.bayes.laplace import Laplace
from varmeta.bayes.structured import LowRank

GUIDES: dict[str, type[Guide]] = {guide.name: guide for guide in (Delta, MeanField, Dense, LowRank, Laplace)}


def make_guide(guide: str | Callable[..., Any] | Guide) -> Guide:
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
                f"unknown guide {guide!r}: choose one of {sorted(GUIDES)}, or pass a factory of a Pyro guide"
            )
        return GUIDES[guide]()
    if isinstance(guide, torch.nn.Module):
        kind = type(guide).__name__
        raise TypeError(
            f"guide must be a name or a callable that makes a Pyro guide, not a guide that is made already: give {kind} itself, "
            f"or lambda model: {kind}(model, ...)"
        )
    if not callable(guide):
        raise TypeError(f"guide must be a name or a callable that makes a Pyro guide, not {type(guide).__name__}")
    return PyroGuide(guide)
