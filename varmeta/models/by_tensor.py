"""A network's numbers by tensor: what its table shows where single weights would be too many."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def are_many(named: Mapping[str, Tensor], most: int) -> bool:
    """Whether these are more than `most` numbers, and tensors say less of them in fewer rows."""
    total = sum(value.numel() for value in named.values())
    return total > most and len(named) <= total // 2


def of_tensor(name: str, value: Tensor) -> tuple[str, str]:
    """Its name with its shape, and the root mean square of its numbers.

    >>> import torch
    >>> of_tensor("0.weight", torch.tensor([[3.0, -4.0]]))
    ('0.weight (1, 2)', 'rms 3.5355')
    """
    shape = ", ".join(map(str, value.shape))
    return f"{name} ({shape})", f"rms {rms(value):.5g}"


def rms(value: Tensor) -> float:
    """The root mean square of a tensor's numbers."""
    return float(value.square().mean().sqrt())


def between(value: Tensor) -> str:
    """The range of its numbers, one where all are alike.

    >>> import torch
    >>> between(torch.tensor([0.5, 2.0])), between(torch.ones(3))
    ('0.5 to 2', '1')
    """
    low, high = (f"{float(end):.5g}" for end in (value.min(), value.max()))
    return low if low == high else f"{low} to {high}"
