"""Arithmetic on trees: `dict[str, Tensor]` whose tensors all have the task axis first.

A number with the task axis, such as an inner product, has shape `(tasks,)`; it is broadcast against
a tree by `scale` and `where`.  Nothing here knows what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def rows(number: Tensor, like: Tensor) -> Tensor:
    """View `(tasks,)` so that it broadcasts against `like`, `(tasks, ...)`."""
    return number.reshape(number.shape + (1,) * (like.dim() - 1))


def map_tree(function: Callable[..., Tensor], *trees: Tree) -> Tree:
    return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}


def add(a: Tree, b: Tree, alpha: float | Tensor = 1.0) -> Tree:
    """a + alpha b; `alpha` a number or one number per task, `(tasks,)`."""
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        return map_tree(lambda x, y: x + rows(alpha, y) * y, a, b)
    return map_tree(lambda x, y: x + alpha * y, a, b)


def scale(a: Tree, alpha: float | Tensor) -> Tree:
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        return map_tree(lambda x: rows(alpha, x) * x, a)
    return map_tree(lambda x: alpha * x, a)


def dot(a: Tree, b: Tree) -> Tensor:
    """Inner product of each task, `(tasks,)`."""
    # reshape to (tasks, -1) also serves a parameter that is a scalar in each task
    parts = [(a[name] * b[name]).reshape(len(a[name]), -1).sum(-1) for name in a]
    return torch.stack(parts).sum(0)


def norm(a: Tree) -> Tensor:
    """Euclidean norm of each task, `(tasks,)`."""
    return dot(a, a).sqrt()


def where(mask: Tensor, a: Tree, b: Tree) -> Tree:
    """Rows of `a` where `mask`, `(tasks,)`, holds, else rows of `b`."""
    return map_tree(lambda x, y: torch.where(rows(mask, x), x, y), a, b)


def take(a: Tree, index: Tensor | slice) -> Tree:
    return map_tree(lambda x: x[index], a)


def put(a: Tree, index: Tensor, b: Tree) -> Tree:
    """A copy of `a` with the rows `index` replaced by `b`."""
    return map_tree(lambda x, y: x.index_copy(0, index, y), a, b)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tree:
    """Those of floating numbers in another precision."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def detach(a: Tree) -> Tree:
    return map_tree(Tensor.detach, a)


def leaves(a: Tree) -> Tree:
    """Detached copies that ask for a gradient: they share no memory with `a`."""
    return map_tree(lambda x: x.detach().clone().requires_grad_(), a)


def zeros_like(a: Tree) -> Tree:
    return map_tree(torch.zeros_like, a)


def num_tasks(a: Tree) -> int:
    return len(next(iter(a.values())))


def one_for_each(losses: Tensor, a: Tree, who: str) -> Tensor:
    """The losses, where there is one for each of a's tasks; ValueError where not.

    who: what returned them, as its user knows it.
    """
    tasks = num_tasks(a)
    if losses.shape != (tasks,):
        raise ValueError(
            f"{who} must return one loss per task, shape ({tasks},), not {tuple(losses.shape)}: "
            "sum over everything but the task axis"
        )
    return losses


def flatten(a: Tree) -> Tensor:
    """One row per task, `(tasks, size)`, in the order of the names."""
    return torch.cat([x.reshape(len(x), -1) for x in a.values()], -1)


def unflatten(flat: Tensor, like: Tree) -> Tree:
    """The inverse of `flatten` for a tree shaped as `like`; the leading axis may differ."""
    sizes = [x[0].numel() for x in like.values()]
    parts = flat.split(sizes, -1)
    return {
        name: part.reshape(len(flat), *x.shape[1:])
        for (name, x), part in zip(like.items(), parts, strict=True)
    }


def named_parts(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a vector `(size,)` under the names and in the shapes of `like`, no task axis.

    >>> named_parts(torch.arange(3.0), {"a": torch.zeros(()), "b": torch.zeros(1, 2)})
    {'a': tensor(0.), 'b': tensor([[1., 2.]])}
    """
    parts = vector.split([value.numel() for value in like.values()]) if like else ()
    return {
        name: part.reshape(value.shape)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }
