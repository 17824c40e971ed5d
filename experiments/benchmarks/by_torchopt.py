"""The shared work by torchopt, in the loop over tasks that its own examples write."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks.torch_module import away, each_task, gradient_of, misfit, network
from experiments.benchmarks.work import (
    CG_STEPS,
    INNER_STEPS,
    LR,
    MAML_STEPS,
    Step,
    Unavailable,
    Work,
)

try:
    import torchopt
except ImportError as error:
    raise Unavailable("not installed") from error


class _Inner(  # type: ignore[call-arg]
    torchopt.nn.ImplicitMetaGradientModule,
    linear_solve=torchopt.linear_solve.solve_cg(maxiter=CG_STEPS, rtol=0.0, atol=0.0),
):
    """A task's network, whose optimum is differentiated implicitly with respect to `meta`."""

    def __init__(self, meta: nn.Module) -> None:
        super().__init__()
        self.meta = meta
        self.net = torchopt.module_clone(meta, by="deepcopy", detach_buffers=True)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return misfit(self.net, x, y) + away(self.parameters(), self.meta.parameters())

    def solve(self, x: Tensor, y: Tensor) -> Any:
        params = tuple(self.parameters())
        optimizer = torchopt.SGD(params, lr=LR)
        with torch.enable_grad():
            for _ in range(INNER_STEPS):
                loss = self.objective(x, y)
                optimizer.zero_grad()
                loss.backward(inputs=params)
                optimizer.step()
        return self


def imaml(work: Work) -> list[Step]:
    meta, tasks = network(work), each_task(work)

    def run() -> tuple[float, np.ndarray]:
        meta.zero_grad()
        total = 0.0
        for x, y, u, v in tasks:
            solved = _Inner(meta).solve(x, y)
            loss = misfit(solved.net, u, v)
            loss.backward()
            total += float(loss.detach())
        return total, gradient_of(meta)

    return [
        Step(
            run, lambda found: found, way="ImplicitMetaGradientModule, solve_cg, a loop over tasks"
        )
    ]


def maml(work: Work) -> list[Step]:
    net, tasks = network(work), each_task(work)
    optimizer = torchopt.MetaSGD(net, lr=LR)

    def run() -> tuple[float, np.ndarray]:
        theta0 = list(net.parameters())
        for value in theta0:
            value.grad = None
        begin = (
            torchopt.extract_state_dict(net, by="reference"),
            torchopt.extract_state_dict(optimizer, by="reference"),
        )
        total = 0.0
        for x, y, u, v in tasks:
            for _ in range(MAML_STEPS):
                optimizer.step(misfit(net, x, y) + away(net.parameters(), theta0))
            loss = misfit(net, u, v)
            loss.backward()
            total += float(loss.detach())
            torchopt.recover_state_dict(net, begin[0])
            torchopt.recover_state_dict(optimizer, begin[1])
        return total, gradient_of(net)

    return [Step(run, lambda found: found, way="MetaSGD, a loop over tasks")]
