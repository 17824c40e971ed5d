"""A program for several processes: how their fits end.  `python -m tests.group.ends kind folder`.

Each writes down what it saw, by its rank.  The last of them does what the kind says in its eighth
step; "whole" does nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import varmeta as vm
from tests.cases import linear_model, ragged_tasks

STEPS, EIGHTH = 20, 8


class Descent(torch.optim.SGD):
    """Which does something in one process at a step of all."""

    taken = 0
    at: str | None = None

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        Descent.taken += 1
        if Descent.taken == EIGHTH and Descent.at == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if Descent.taken == EIGHTH and Descent.at == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if Descent.taken == EIGHTH and Descent.at == "raise":
            raise ArithmeticError("in one process alone")
        return super().step(closure)


def fit(group: vm.Processes | None = None, lr: float = 1e-3, **options: Any) -> vm.Fit:
    return vm.fit(
        linear_model(vm.GaussianPrior(3.0)),
        ragged_tasks(7),
        vm.Joint("normal"),
        STEPS,
        lambda params: Descent(params, lr),
        batch_size=3,
        seed=1,
        processes=group,
        **options,
    )


def stop(row: dict[str, float]) -> None:
    if row["step"] == 5:
        raise vm.StopFit


def fail(row: dict[str, float]) -> None:
    if row["step"] == 5:
        raise KeyError("mine")


def gently(group: vm.Processes) -> dict[str, Any]:
    """Ends after which all go on."""
    found: dict[str, Any] = {"heard": 0}

    def heard(row: dict[str, float]) -> None:
        found["heard"] += 1

    found["stopped"] = fit(group, callback=stop).stop
    try:
        fit(group, callback=fail)
    except Exception as error:
        kept: Any = error
        found["callback"] = [type(error).__name__, str(error), kept.fit.stop]
    Descent.taken, Descent.at = 0, "interrupt" if group.rank == group.size - 1 else None
    broken = fit(group, callback=heard)
    found["interrupted"] = [broken.stop, len(broken.history), broken.loss]
    Descent.at = None
    on = fit(group, resume=broken)
    found["resumed"] = [on.loss, on.eta["weight"].tolist()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["lost"] = fit(group, lr=30.0).stop
    found["warned"] = [str(one.message) for one in caught]
    return found


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    rank, found = os.environ["RANK"], {}
    try:
        with vm.processes() as group:
            if kind == "gently":
                found = gently(group)
            else:
                Descent.at = kind if group.rank == group.size - 1 else None
                every = vm.Checkpoints(folder / "run", every=2)
                fit(group, checkpoint=every, resume=folder / "run")
    except Exception as error:
        found["error"] = [type(error).__name__, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # a process that runs in the background may be told to ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
