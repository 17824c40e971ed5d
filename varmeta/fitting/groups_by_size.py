"""The losses of all tasks, group by group, where one function of all of them is asked for.

Groups: `tasks/groups.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from varmeta.guides.pyro_guide import PyroGuide
from varmeta.numerics.tree import Tree, take
from varmeta.strategies.problem import Losses, Problem
from varmeta.tasks import Batch


def elbo_losses(problem: Problem, batch: Batch, name: Literal["elbo", "inner"] = "elbo") -> Losses:
    """F_i `(tasks,)`, as `problem.losses(name, batch, 0)` gives them, group by group."""
    found = batch.by_size()
    # a user's guide makes its module for one number of tasks
    if len(found) == 1 or isinstance(problem.guide, PyroGuide):
        return problem.losses(name, batch, 0)
    parts = [(rows, problem.losses(name, group, 0)) for rows, group in found]
    back = torch.cat([rows for rows, _ in parts]).argsort()

    def fn(phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([losses(take(phi, rows), eta) for rows, losses in parts])[back]

    return fn
