"""What capturing and compiling costs, and whether compile="auto" ever loses to running eagerly.

    python -m experiments.benchmarks.overhead '{"strategy": "joint", "compile": "auto", "steps":
    100, "tasks": 100}'

A fresh process for each point, with a compiler cache of its own, so that nothing is compiled
already.  The same fit is then
run a second time: what was captured must not be captured again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

STEPS = (10, 100, 500, 1_000, 2_000, 5_600)
STRATEGIES = ("joint", "unrolled")
MODES: tuple[str | bool, ...] = (False, "auto", True)


def main() -> None:
    asked = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        print(json.dumps(asked | measure(**asked)))


def measure(
    strategy: str, compile: Literal["auto", True, False], steps: int, tasks: int
) -> dict[str, Any]:
    """Seconds of `fit` the first and the second time, and of its steps without the slowest."""
    import torch

    import varmeta as vm
    from experiments.benchmarks import ours
    from experiments.benchmarks.work import ADAM_LR, LR, MAML_STEPS, PRECISION, make_work

    work = make_work(tasks)
    model = ours.model_of(work, vm.likelihoods.Gaussian(), vm.GaussianPrior(PRECISION))
    chosen = (
        vm.Joint("normal")
        if strategy == "joint"
        else vm.Unrolled("delta", "query", MAML_STEPS, vm.GradientDescent(LR))
    )

    def fit() -> tuple[float, list[float]]:
        seconds: list[float] = []
        begin = perf_counter()
        vm.fit(
            model,
            ours.tasks_of(work),
            chosen,
            steps,
            lambda p: torch.optim.Adam(p, lr=ADAM_LR),
            compile=compile,
            progress=False,
            callback=lambda row: seconds.append(row["seconds"]),
        )
        return perf_counter() - begin, seconds

    first, record = fit()
    second, again = fit()
    between = sorted(b - a for a, b in pairwise(record))
    return {
        "first_s": first,
        "second_s": second,
        "step_ms": 1e3 * between[len(between) // 2],
        # what the first fit took beyond the second: tracing, compiling, and what torch loads
        "overhead_s": first - second,
        "slowest_step_second_ms": 1e3 * max(b - a for a, b in pairwise(again)),
    }


if __name__ == "__main__":
    main()
