"""An ensemble: several etas of one model, learned from different starts, of equal weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.models.initialised import initialised, not_drawn
from varmeta.models.model import TaskModel


@dataclass(frozen=True, repr=False)
class Ensemble:
    """Members of equal weight, each with an eta of its own.

    points: their etas by name, `(members, ...)`.
    losses: the objective of each over all training tasks, `(members,)`, nats.
    """

    points: dict[str, Tensor]
    losses: Tensor

    hyperguide = "ensemble"
    is_reliable = True

    def __len__(self) -> int:
        return len(self.losses)

    @property
    def rows(self) -> Tensor:
        return torch.arange(len(self), device=self.losses.device)

    @property
    def draws(self) -> dict[str, Tensor]:
        """The same: each member once."""
        return self.points

    @property
    def best(self) -> dict[str, Tensor]:
        """eta of the member with the lowest objective."""
        lost = torch.where(self.losses.isfinite(), self.losses, torch.inf)
        return {name: value[lost.argmin()] for name, value in self.points.items()}

    def __repr__(self) -> str:
        return f"<Ensemble: {len(self)} members>"


def starts(model: TaskModel, number: int, seed: int, like: Tensor) -> dict[str, Tensor]:
    """Where the members start: the first where the model does, each other at fresh random layers.

    `(number, ...)` by name, on the dtype and device of `like`; a function of the seed alone.

    Raises ValueError where there are no layers to draw anew, or they do not say how.
    """
    if model.net is None:
        raise ValueError("an ensemble's members start at networks of their own: there is none here")
    undrawn = not_drawn(model)
    if undrawn is not None:
        raise ValueError(
            f"the members of an ensemble start at fresh random layers, but {undrawn} has no "
            "reset_parameters() to draw its parameters anew: give it one"
        )
    seeds = ((seed * 1_000_003 + member) % 2**63 for member in range(1, number))
    eta = [model.init(like), *(initialised(model, own).init(like) for own in seeds)]
    return {name: torch.stack([one[name] for one in eta]) for name in eta[0]}
