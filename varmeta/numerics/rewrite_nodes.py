"""What the rewriting of graphs calls nodes and their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types as anything at all


def shape_of(node: Any) -> tuple[int, ...]:
    """() also for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
