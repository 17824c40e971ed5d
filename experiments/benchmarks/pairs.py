"""Ours beside one peer, on the same work in one process: first the same values, then times,
alternating.

    python -m experiments.benchmarks.pairs '{"case": "imaml", "peer": "jax", "tasks": 100}'

prints one line of JSON.  A process for each pair, so that thread pools and memory of the others do
not disturb it.  The two sides take turns in short blocks, so a machine that slows down slows both;
the first call of a block is not counted, since the other side has just used the caches.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from experiments.benchmarks.work import Step, Unavailable, make_work

# Where a peer is looked at; "torch_x" are the ways of the hand-written torch.
PEERS = {
    "imaml": ("jax", "jaxopt", "torchopt", "paper", "torch compiled", "torch eager", "ours eager"),
    "maml": ("jax", "torchopt", "higher", "torch compiled", "torch eager", "ours eager"),
    "joint": (
        "pyro",
        "numpyro",
        "torch compiled",
        "torch torch.compile",
        "torch eager",
        "ours eager",
    ),
}
MODULES = {"paper": "by_imaml"}
BLOCK_SECONDS, MIN_BLOCKS = 0.15, 3


def main() -> None:
    asked = json.loads(sys.argv[1])
    print(json.dumps(asked | compare(**asked)))


def compare(
    case: str,
    peer: str,
    tasks: int,
    dtype: str = "float32",
    seconds: float = 20.0,
    timed: bool = True,
    compiled: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """One pair: the gaps between the values, then medians and quartiles of both in milliseconds and
    their ratio.

    device: of ours and of the peers that run on torch; JAX takes the one that it was installed for.
    """
    on(device)
    try:
        theirs = _peer(case, peer, tasks, dtype)
    except Unavailable as reason:
        return {"note": str(reason)}
    ours = _ours(case, tasks, dtype, compiled)
    found: dict[str, Any] = {}
    # a step with a state is judged at its first call, so nothing may run before
    first = ours.run()
    gaps = [_gaps(case, ours, first, step) for step in theirs]
    gaps = [gap | _disagrees(gap, dtype) for gap in gaps]
    ready = [(step, gap) for step, gap in zip(theirs, gaps, strict=True) if "error" not in gap]
    if not ready:
        return {"note": gaps[0]["error"]}
    if not timed:
        return found | _worst([gap for _, gap in ready])
    if len(ready) > 1:  # the fastest
        ready.sort(key=lambda pair: statistics.median(_once(pair[0].run) for _ in range(5)))
    step, gap = ready[0]
    found |= gap | {"way": step.way, "ways": len(theirs)}
    mine, other = alternate(ours.run, step.run, seconds)
    found |= {f"ours_{k}": v for k, v in quartiles(mine).items()} | {
        f"peer_{k}": v for k, v in quartiles(other).items()
    }
    # block by block, so that what slows both cancels
    ratios = [b / a for a, b in zip(_medians(mine), _medians(other), strict=True)]
    return found | {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def on(device: str) -> None:
    """Let all tensors of this process be made on that device."""
    import torch

    if device != "cpu":
        torch.set_default_device(device)


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any], seconds: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds per call of both, block by block; at least MIN_BLOCKS blocks each, about `seconds` in
    all.
    """
    begin = perf_counter()
    mine: list[list[float]] = []
    other: list[list[float]] = []
    while len(mine) < MIN_BLOCKS or perf_counter() - begin < seconds:
        mine.append(_block(ours))
        other.append(_block(theirs))
    return mine, other


def _block(run: Callable[[], Any]) -> list[float]:
    first = _once(run)
    if first > 2.0:  # of a call that long the caches are no part
        return [first]
    times: list[float] = []
    begin = perf_counter()
    while len(times) < 3 or perf_counter() - begin < BLOCK_SECONDS:
        times.append(_once(run))
    return times


def _once(run: Callable[[], Any]) -> float:
    begin = perf_counter()
    run()
    return perf_counter() - begin


def quartiles(blocks: list[list[float]]) -> dict[str, float]:
    low, middle, high = np.quantile([t for block in blocks for t in block], [0.25, 0.5, 0.75])
    return {"ms": 1e3 * middle, "q1_ms": 1e3 * low, "q3_ms": 1e3 * high}


def _medians(blocks: list[list[float]]) -> list[float]:
    return [statistics.median(block) for block in blocks]


def _ours(case: str, tasks: int, dtype: str, compiled: bool = True) -> Step:
    from experiments.benchmarks import ours

    step: Step = getattr(ours, case)(make_work(tasks, dtype), compiled)
    return step


def _peer(case: str, peer: str, tasks: int, dtype: str) -> list[Step]:
    library, _, way = peer.partition(" ")
    if library == "ours":
        return [_ours(case, tasks, dtype, compiled=False)]
    module = importlib.import_module(
        f"experiments.benchmarks.{MODULES.get(library, 'by_' + library)}"
    )
    work = make_work(tasks, dtype)
    if library == "torch" and case == "joint":
        from experiments.benchmarks import ours

        steps: list[Step] = module.joint(work, ours.joint_noise(work))
    else:
        steps = getattr(module, case)(work)
    return [step for step in steps if not way or step.way.partition(",")[0] == way]


def _gaps(case: str, ours: Step, first: Any, step: Step) -> dict[str, Any]:
    """How far the peer's loss and gradient are from ours, relative; of noisy losses, in standard
    errors of the mean.
    """
    try:
        found = step.run() if step.values is not None else None
        if step.values is not None and ours.values is not None:
            (loss, gradient), (other, peers) = ours.values(first), step.values(found)
            return {
                "loss_gap": abs(loss - other) / abs(loss),
                "gradient_gap": float(np.linalg.norm(gradient - peers) / np.linalg.norm(gradient)),
            }
        assert ours.expected is not None and step.expected is not None
        mine, theirs = [
            np.array([draw() for _ in range(24)]) for draw in (ours.expected, step.expected)
        ]
        error = float(np.sqrt(mine.var() / len(mine) + theirs.var() / len(theirs)))
        gap = abs(float(mine.mean() - theirs.mean()))
        return {"loss_gap": gap / abs(float(mine.mean())), "standard_errors": gap / error}
    except Exception as error:
        return {"error": f"fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"}


# Relative, in float32 and float64; iMAML's five steps of CG magnify float32's rounding.  Noisy
# losses in standard errors alone.
LARGEST = {
    "loss_gap": {"float32": 1e-4, "float64": 1e-8},
    "gradient_gap": {"float32": 1e-3, "float64": 1e-6},
    "standard_errors": {"float32": 5.0, "float64": 5.0},
}


def _disagrees(gap: dict[str, Any], dtype: str) -> dict[str, Any]:
    """An error where the two do not do the same work, which is then not timed."""
    judged = ("standard_errors",) if "standard_errors" in gap else ("gradient_gap", "loss_gap")
    for name in judged:
        if (
            name in gap and not gap[name] <= LARGEST[name][dtype]
        ):  # what is not a number is no agreement
            return {"error": f"does other work: {name} {gap[name]:.1e}"}
    return {}


def _worst(gaps: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: max(gap[name] for gap in gaps) for name in gaps[0]}


if __name__ == "__main__":
    main()
