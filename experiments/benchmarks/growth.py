"""How time and peak memory of the iMAML meta-gradient grow with tasks, weights and inner steps.

    python -m experiments.benchmarks.growth '{"tasks": 100, "width": 40, "inner_steps": 16,
    "compiled": true}'

prints one line of JSON.  A fresh process for each point: peak memory is the largest the process
ever had, less what it had once everything was imported; on a GPU ("device": "cuda") the most that
torch had allocated there.  Compiling needs memory of its own, the same at every size.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
from time import perf_counter
from typing import Any

GRID: dict[str, tuple[str, tuple[int, ...], dict[str, int]]] = {
    # axis: what it is called in the plot, its values, the others
    "tasks": ("tasks", (10, 100, 1_000, 10_000, 100_000), {"width": 40, "inner_steps": 16}),
    "width": ("weights a task", (8, 30, 98, 314, 998), {"tasks": 10, "inner_steps": 16}),
    "inner_steps": ("inner steps", (10, 30, 100, 300, 1_000), {"tasks": 100, "width": 40}),
}
SMOKE = {"tasks": (10, 30), "width": (8, 16), "inner_steps": (10, 20)}


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(asked | measure(**asked)))


def measure(
    tasks: int, width: int, inner_steps: int, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Seconds of the first call and of a later one, and peak memory in MB."""
    import torch

    from experiments.benchmarks import ours
    from experiments.benchmarks.pairs import on
    from experiments.benchmarks.work import make_work

    on(device)

    # autograd and the linear algebra load what they need at their first use
    torch.ones(8, 8, requires_grad=True).square().matmul(torch.ones(8, 8)).sum().backward()
    imported = _peak()
    work = make_work(tasks, width=width)
    data = _peak()
    step = ours.imaml(work, compiled, inner_steps)
    begin = perf_counter()
    step.run()
    first = perf_counter() - begin
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1.0 and len(times) < 20):
        begin = perf_counter()
        step.run()
        times.append(perf_counter() - begin)
        if times[0] > 20.0:
            break
    return {
        "weights": sum(a.size for a in work.theta0.values()),
        "first_s": first,
        "s": statistics.median(times),
        "peak_mb": _peak(),
        "above_import_mb": _peak() - imported,
        "data_mb": data - imported,
    }


def _peak() -> float:
    import torch

    if torch.get_default_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
