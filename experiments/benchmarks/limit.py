"""What fraction of the machine's limit the compiled meta-gradient reaches.

    python -m experiments.benchmarks.limit '{"tasks": 1000}'

Needed: floating-point operations of the matrix products, counted on the eager step by
`torch.utils.flop_counter` (what is elementwise is not counted), and the bytes that must pass
through memory if nothing is read or written twice.  The machine's rates are measured beside it, in
turns: a batched product of the same shapes, and a large copy.  The limit is the longer of the two
times; the fraction is that over the time that was measured.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks import ours
from experiments.benchmarks.pairs import alternate, quartiles
from experiments.benchmarks.work import (
    CG_STEPS,
    INNER_STEPS,
    MAML_STEPS,
    POINTS,
    SIZE,
    WIDTH,
    make_work,
)

# Vectors of D numbers a task that are read or written.  A gradient step reads and writes theta.  A
# step of CG reads theta and p and writes A p, reads x, p, r, A p and writes x and r, reads r and p
# and writes p.
GRADIENT_PASSES, CG_PASSES = 2, 12
PASSES = {
    "imaml": INNER_STEPS * GRADIENT_PASSES + CG_STEPS * CG_PASSES,
    # forward: the iterates are kept; backward: each is read, with the adjoint read and written
    "maml": MAML_STEPS * (GRADIENT_PASSES + 3),
}
COPY_MB = 256


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps([asked | {"case": case} | measure(case, **asked) for case in PASSES]))


def measure(case: str, tasks: int, seconds: float = 6.0) -> dict[str, Any]:
    work = make_work(tasks)
    make = getattr(ours, case)
    with FlopCounterMode(display=False) as counter:
        make(work, False).run()
    flops, needed = float(counter.get_total_flops()), 4.0 * SIZE * tasks * PASSES[case]
    left, right = torch.randn(tasks, POINTS, WIDTH), torch.randn(tasks, WIDTH, WIDTH)
    out = torch.empty(tasks, POINTS, WIDTH)
    source = torch.randn(COPY_MB * 2**18)
    target = torch.empty_like(source)
    compiled = make(work, True)
    compiled.run()
    mine, product = alternate(compiled.run, lambda: torch.bmm(left, right, out=out), seconds)
    _, copy = alternate(lambda: None, lambda: target.copy_(source), seconds / 2)
    step, bmm, moved = (1e-3 * quartiles(times)["ms"] for times in (mine, product, copy))
    flop_rate = 2.0 * tasks * POINTS * WIDTH * WIDTH / bmm
    byte_rate = 2.0 * 4.0 * source.numel() / moved
    limit = max(flops / flop_rate, needed / byte_rate)
    return {
        "gflop": flops / 1e9,
        "gb": needed / 1e9,
        "bmm_gflop_per_s": flop_rate / 1e9,
        "copy_gb_per_s": byte_rate / 1e9,
        "flop_ms": 1e3 * flops / flop_rate,
        "byte_ms": 1e3 * needed / byte_rate,
        "limit_ms": 1e3 * limit,
        "ours_ms": 1e3 * step,
        "fraction": limit / step,
    }


if __name__ == "__main__":
    main()
