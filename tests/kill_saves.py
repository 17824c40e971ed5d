"""Kill, interrupt and flip: does a saved fit survive?  `python -m tests.kill_saves --kills 200
--interrupts 60 --flips 1200`.

Kills and interrupts come at random moments while a process saves again and again over a good file.
Afterwards the file must be one of the two that were saved, whole, and of interrupts nothing else
may be left in the folder.  A file with one bit turned must be refused, or load with the very
numbers that were saved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

import varmeta as vm
from tests.cases import known, linear_model

SIZE = 4000  # points a task: a file of a megabyte takes long enough to be met while it is written


def fit(shift: float) -> vm.Fit:
    tasks = [
        vm.Task((torch.full((SIZE, 1), shift), torch.full((SIZE,), shift)), name=f"task {i}")
        for i in range(10)
    ]
    return known(
        linear_model(vm.GaussianPrior(3.0)), vm.TaskSet(tasks, dtype=torch.float64), vm.Joint()
    )


def small_fit() -> vm.Fit:
    return known(
        linear_model(vm.GaussianPrior(3.0)),
        vm.datasets.lines(3, num_support=4, noise=0.3),
        vm.Joint(),
    )


def save_for_ever(fits: list[vm.Fit], path: Path) -> None:
    """Save them in turn, until somebody ends it; in a process of its own."""
    # what a shell starts in the background ignores interrupts, and Python keeps to that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for turn in range(10**9):
            fits[turn % len(fits)].save(path)
    except KeyboardInterrupt:
        os._exit(0)
    except BaseException:
        os._exit(1)


def state(path: Path) -> str:
    """ "whole" where the file is one of the two fits, else what is wrong."""
    try:
        found = vm.load(path, linear_model(vm.GaussianPrior(3.0)))
    except Exception as error:  # anything at all is a file that cannot be read
        return f"unreadable ({type(error).__name__})"
    values = {
        float(value) for task in found.tasks if task.support for value in task.support[1].unique()
    }
    return "whole" if values in ({1.0}, {2.0}) else f"other numbers {values}"


def strike(number: int, how: signal.Signals, seed: int) -> dict[str, int]:
    """What `number` processes leave behind that are struck while they save."""
    chance, fits = random.Random(seed), [fit(1.0), fit(2.0)]
    counts = {"left beside": 0}
    for _ in range(number):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fit.pt"
            fits[0].save(path)
            process = os.fork()
            if process == 0:
                save_for_ever(fits, path)
            time.sleep(chance.uniform(0.01, 0.1))
            os.kill(process, how)
            os.waitpid(process, 0)
            found = state(path)
            counts["left beside"] += len(list(Path(folder).iterdir())) - 1
        counts[found] = counts.get(found, 0) + 1
    return counts


def flip(number: int, seed: int) -> dict[str, int]:
    """What becomes of a file with one bit turned: every bit of the header first, then bits at
    random.
    """
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, good = Path(folder) / "fit.pt", small_fit()
        good.save(path)
        data = path.read_bytes()
        chance = random.Random(seed)
        bits = [
            chance.randrange(8 * 97) if i % 4 == 0 else chance.randrange(8 * len(data))
            for i in range(number)
        ]
        for bit in bits:
            turned = bytearray(data)
            turned[bit // 8] ^= 1 << bit % 8
            path.write_bytes(turned)
            try:
                found = vm.load(path, good.model)
            except ValueError as error:
                outcome = "refused" if str(path) in str(error) else "refused without a path"
            except Exception as error:
                outcome = f"{type(error).__name__}"
            else:
                same = all(torch.equal(found.eta[name], value) for name, value in good.eta.items())
                outcome = "loaded the same" if same else "loaded OTHER numbers"
            counts[outcome] = counts.get(outcome, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=60)
    parser.add_argument("--flips", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = {
        "flips": flip(options.flips, options.seed),
        "kills": strike(options.kills, signal.SIGKILL, options.seed),
        "interrupts": strike(options.interrupts, signal.SIGINT, options.seed),
    }
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
