"""Nodes of a traced graph: names, shapes, and which hold memory of their own."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types as anything at all


def shape_of(node: Any) -> tuple[int, ...]:
    """() also for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def is_view(target: Any) -> bool:
    """Whether an operation only looks at what another wrote; a reshape counts as one."""
    return target is operator.getitem or (isinstance(target, OpOverload) and target.is_view)
