"""Names and shapes of a task's weights: between named tensors and one vector theta."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The weights that differ between tasks, in a fixed order.

    shapes: shape of each weight tensor by parameter name, without task axis.
    fan_in: of a network, the inputs of the layer that a parameter belongs to, by parameter name; 1
        where it is left out.
    fixed: theta0 of the weights for which it is not learned, by parameter name; eta has no entry
        for them.

    >>> weights = Weights({"slope": torch.Size([]), "w": torch.Size([2])})
    >>> weights.size, weights.labels
    (3, ('slope', 'w[0]', 'w[1]'))
    >>> weights.unflatten(torch.tensor([1.0, 2.0, 3.0]))["w"]
    tensor([2., 3.])
    """

    shapes: Mapping[str, torch.Size]
    fixed: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    fan_in: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """D, the number of weights of one task."""
        return sum(self.sizes)

    @property
    def labels(self) -> tuple[str, ...]:
        """One readable name per weight.

        `0.bias[3]`, or the bare parameter name where it is a single number.
        """
        labels = []
        for name, shape in self.shapes.items():
            if math.prod(shape) == 1:
                labels.append(name)
                continue
            for index in itertools.product(*map(range, shape)):
                labels.append(f"{name}[{','.join(map(str, index))}]")
        return tuple(labels)

    def module(self, name: str) -> str:
        """The module that owns a parameter: `body.0` for `body.0.weight`.

        A bare name is its own module.
        """
        return name.rpartition(".")[0] or name

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.module(name) for name in self.names))

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `(..., *shape)` with common leading axes, to theta `(..., D)`.

        Of eta: theta0.  Where `fixed` stands in for names that are left out, it takes the leading
            axes of the others.
        """
        parts: list[Tensor | str] = []
        lead: torch.Size = torch.Size()
        for name, shape in self.shapes.items():
            if name not in named and name in self.fixed:
                parts.append(name)
                continue
            tensor = named[name]
            lead = tensor.shape[: tensor.dim() - len(shape)]
            parts.append(tensor.reshape((*lead, math.prod(shape))))
        if not any(isinstance(part, str) for part in parts):
            return torch.cat(cast("list[Tensor]", parts), -1)
        like = next(iter(named.values()))
        return torch.cat(
            [
                self.fixed[x].to(like).reshape(-1).expand(*lead, -1) if isinstance(x, str) else x
                for x in parts
            ],
            -1,
        )

    def unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        """theta `(..., D)` to tensors `(..., *shape)`."""
        # split, not slices: its backward is one concatenation instead of one padded sum per
        # parameter
        parts = theta.split(self.sizes, -1)
        return {
            name: part.reshape((*theta.shape[:-1], *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
