"""Several inputs of a row, as dicts have them, side by side in one array and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import kind_of, whole_number
from varmeta.tasks.arrays import as_tensor, to_dtype


class Parts:
    """What a row of x is made of where a network takes several inputs, as from a dict of arrays.

    A row of x is one array, so the parts stand side by side in it: `pack` puts them there, and
    `unpack`, in the network's `forward` or in a program, gives them back.

    shapes: of each part of a row, by name: `image=(3, 32, 32)`, `age=()`.

    Raises ValueError and TypeError for what is no shape.

    >>> parts = Parts(image=(1, 2, 2), age=())
    >>> x = parts.pack({"image": torch.ones(5, 1, 2, 2), "age": torch.zeros(5)})
    >>> tuple(x.shape), {name: tuple(part.shape) for name, part in parts.unpack(x).items()}
    ((5, 5), {'image': (5, 1, 2, 2), 'age': (5,)})
    """

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        if not shapes:
            raise ValueError("Parts() names no part: give each one's shape, such as age=()")
        for name, shape in shapes.items():
            what = f"the shape of {name!r}"
            if not isinstance(shape, tuple):
                raise TypeError(f"{what} must be a tuple, such as (3,) or (), not {kind_of(shape)}")
            for size in shape:
                whole_number(f"a size in {what}", size)
        self.shapes = shapes
        self._sizes = [math.prod(shape) for shape in shapes.values()]

    def __repr__(self) -> str:
        return f"Parts({', '.join(f'{name}={shape}' for name, shape in self.shapes.items())})"

    def pack(self, arrays: Mapping[str, Any]) -> Tensor:
        """One x `(rows, columns)` of arrays by name, each `(rows, *shape)`.

        In the widest of their floating dtypes, if any is floating, else as they are: bytes stay
        bytes, other whole numbers become int64.

        Raises TypeError for what is no dict of numbers; ValueError for other names, shapes and
        numbers of rows, and for whole numbers that a floating dtype beside them cannot hold.
        """
        if not isinstance(arrays, Mapping):
            raise TypeError(f"pack takes a dict of arrays, not {kind_of(arrays)}")
        missing = [name for name in self.shapes if name not in arrays]
        if missing:
            raise ValueError(f"the arrays lack {missing}: give all of {list(self.shapes)}")
        more = [name for name in arrays if name not in self.shapes]
        if more:
            raise ValueError(f"pack is given {more[0]!r}, which is none of {list(self.shapes)}")
        found = {name: self._checked(name, arrays[name]) for name in self.shapes}
        first, rows = next((name, len(part)) for name, part in found.items())
        for name, part in found.items():
            if len(part) != rows:
                raise ValueError(f"{name!r} has {len(part)} rows, but {first!r} has {rows}")
        kinds = [part.dtype for part in found.values()]
        floating = [kind for kind in kinds if kind.is_floating_point]
        kind = reduce(torch.promote_types, floating or kinds)
        columns = zip(found.items(), self._sizes, strict=True)
        return torch.cat(
            [
                to_dtype(part, kind, repr(name)).reshape(rows, size)
                for (name, part), size in columns
            ],
            1,
        )

    def _checked(self, name: str, array: Any) -> Tensor:
        part, shape = as_tensor(array, repr(name)), self.shapes[name]
        if not part.dim():
            raise ValueError(f"{name!r} is a single number, expected one row per point")
        if tuple(part.shape[1:]) != shape:
            raise ValueError(
                f"a row of {name!r} has shape {tuple(part.shape[1:])}, expected {shape}"
            )
        return part

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """The parts of x `(..., columns)` by name, views of shape `(..., *shape)`.

        In the dtype of x: whole numbers, which are floating in a batch, are given to an
        `nn.Embedding` as they are, and elsewhere take `.long()`.

        Raises ValueError where x has another number of columns.
        """
        # what torch.fx puts in the place of x has no numbers to compare
        if isinstance(x, Tensor) and x.shape[-1:] != (sum(self._sizes),):
            raise ValueError(
                f"x has {x.shape[-1] if x.dim() else 'no'} columns, but the parts "
                f"({', '.join(self.shapes)}) make {sum(self._sizes)}: give x as pack made it"
            )
        split = torch.split(x, self._sizes, -1)
        return {
            name: split[i].unflatten(-1, shape) if shape else split[i].squeeze(-1)
            for i, (name, shape) in enumerate(self.shapes.items())
        }
