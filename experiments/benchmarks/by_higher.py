"""Second-order MAML by higher, in the loop over tasks that its own examples write."""

from __future__ import annotations

import numpy as np
import torch

from experiments.benchmarks.torch_module import away, each_task, gradient_of, misfit, network
from experiments.benchmarks.work import LR, MAML_STEPS, Step, Unavailable, Work

try:
    import higher
except ImportError as error:
    raise Unavailable("not installed") from error


def maml(work: Work) -> list[Step]:
    net, tasks = network(work), each_task(work)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)

    def run() -> tuple[float, np.ndarray]:
        net.zero_grad()
        total = 0.0
        for x, y, u, v in tasks:
            with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(MAML_STEPS):
                    inner.step(misfit(fast, x, y) + away(fast.parameters(), net.parameters()))
                loss = misfit(fast, u, v)
                loss.backward()
            total += float(loss.detach())
        return total, gradient_of(net)

    return [Step(run, lambda found: found, way="innerloop_ctx, a loop over tasks")]
