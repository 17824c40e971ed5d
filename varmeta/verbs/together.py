"""How the processes of a group begin a fit, and how they agree on one that each has made."""

from __future__ import annotations

from varmeta.fitting.callback import Callback
from varmeta.fitting.run import Run
from varmeta.group.processes import Processes


def begin_together(
    processes: Processes, run: Run, callback: Callback | None, progress: bool | None
) -> tuple[Callback | None, bool | None]:
    """Start all at the same eta; the callback and the progress bar, which are the first's alone.

    Raises ValueError where they do not go on from the same run.
    """
    if processes.size == 1:
        return callback, progress
    found = processes.all((run.step, run.eta))  # all have read a checkpoint before one is written
    steps = [step for step, _ in found]
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes go on from runs of {steps} steps, but must from the same: a folder of "
            "checkpoints must lie where all processes see it"
        )
    run.eta = found[0][1]
    return (callback, progress) if processes.is_first else (None, False)


def agree(processes: Processes, run: Run) -> None:
    """Take the first's run, in place, where every process has made the whole of it."""
    if processes.size > 1:
        run.__dict__.update(processes.all(run.__dict__ if processes.is_first else None)[0])
