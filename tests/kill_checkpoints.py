"""Kill and terminate fits: what do their checkpoints keep?  `python -m tests.kill_checkpoints
--kills 200 --terms 20`.

One fit is started again and again, and struck at a random moment, checkpoints being written
included.  After SIGKILL every file of the folder must be readable, and the last one at most an
interval behind the last step that was taken.  After SIGTERM it must be that step, and the process
must have ended by the signal.  In the end the fit must be, to the last bit, one that was never
struck.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import varmeta as vm
from tests.cases import adam, net_model, ragged_tasks
from varmeta.files.folder import numbered

EVERY = 2  # a step takes about as long as a checkpoint, so that half of all moments meet one
MODEL, TASKS = net_model(vm.GaussianPrior(3.0), width=60), ragged_tasks(60)


class Steps:
    """How many steps a fit has taken, for another process to see."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 8)

    def __call__(self, row: dict[str, float]) -> None:
        self.memory[:] = int(row["step"]).to_bytes(8, "little")

    @property
    def taken(self) -> int:
        return int.from_bytes(self.memory[:], "little")


def fit(**options: Any) -> vm.Fit:
    options = {"num_steps": 10**6, "schedule": "constant", "compile": False} | options
    return vm.fit(
        MODEL, TASKS, vm.Joint("normal"), optimizer=adam, batch_size=30, progress=False, **options
    )


def started(folder: Path, steps: Steps) -> int:
    """A process that goes on with the folder's fit."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(ValueError):  # pytest's own, in a thread of another process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            every = vm.Checkpoints(folder, every=EVERY)
            fit(checkpoint=every, resume=folder, callback=steps)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    return process


def read(folder: Path) -> tuple[int, list[str]]:
    """The last readable checkpoint's step, and what cannot be read."""
    steps, bad = [0], []
    for step, file in numbered(folder).items():
        try:
            steps.append(vm.load(file, MODEL).run.step)
        except Exception as error:
            bad.append(f"{step}: {type(error).__name__}: {error}")
    return max(steps), bad


def strike(number: int, how: signal.Signals, seed: int) -> dict[str, Any]:
    """What is lost by a fit that is struck so many times."""
    chance, steps = random.Random(seed), Steps()
    found: dict[str, Any] = {"struck": number, "most steps lost": 0, "unreadable": [], "ends": {}}
    parts = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(number):
            before = steps.taken
            process = started(folder, steps)
            until = time.monotonic() + 60
            while steps.taken == before and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.1))
            os.kill(process, how)
            _, status = os.waitpid(process, 0)
            end = str(os.waitstatus_to_exitcode(status))
            found["ends"][end] = found["ends"].get(end, 0) + 1
            parts += sum(path.name.endswith(".part") for path in folder.iterdir())
            last, bad = read(folder)
            found["unreadable"] += bad
            found["most steps lost"] = max(found["most steps lost"], steps.taken - last)
            # what another process saw of steps that were lost is gone
            steps({"step": last})
        found["left beside"], found["steps"] = parts, last + 1
        rest = fit(num_steps=last + 1, checkpoint=folder, resume=folder)
    found["the same bits"] = same(rest, fit(num_steps=last + 1))
    return found


def same(one: vm.Fit, other: vm.Fit) -> bool:
    pairs: list[tuple[Any, Any]] = [(one.eta, other.eta), (one.run.state.phi, other.run.state.phi)]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a) and one.history.drop(
        columns="seconds"
    ).equals(other.history.drop(columns="seconds"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rounds: list[tuple[str, int, Callable[..., Any]]] = [
        ("SIGTERM", options.terms, lambda n, s: strike(n, signal.SIGTERM, s)),
        ("SIGKILL", options.kills, lambda n, s: strike(n, signal.SIGKILL, s)),
    ]
    for name, number, by in rounds:
        print(name, json.dumps(by(number, options.seed), indent=1), flush=True)


if __name__ == "__main__":
    main()
