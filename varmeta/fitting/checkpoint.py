"""What a run that was cut short needs to go on bit for bit, beside the record of a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from varmeta.fitting.callback import Callback


@dataclass(frozen=True)
class Checkpoint:
    """Beside eta, phi, the optimiser's state and the history, which every fit has.

    settings: of the fit, as plain values, by the names of its arguments.
    versions: what it ran under, by name.
    begun, random: the state of torch's own generator, `(bytes,)`, before the first tasks were read
        and now: a DataLoader that shuffles draws from it.
    finished: whether the run had come to its end.
    watched: where a look at validation tasks stood (`Watch.state`), if there are any.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    begun: Tensor
    random: Tensor
    finished: bool
    watched: dict[str, Any] | None


class Keeper(Protocol):
    """Who writes checkpoints of a descent, or knows the one that it goes on from.

    found: that one.
    """

    found: Checkpoint | None

    def reporting(
        self,
        callback: Callback | None,
        live: Callable[[], dict[str, Any]] = ...,
        due: Callable[[int], bool] | None = ...,
    ) -> Callback | None:
        """The callback, after which a checkpoint is written where one is due.

        live: what the descent keeps to itself between its steps: `eta`, `optimizer_state` and
            `watched`; `state`, where the run's own is not that of all tasks.
        due: whether it is, of a step's number; None: as `is_due` says.
        """

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written behind that step."""

    def last(self) -> None:
        """Write where the run stands now that it takes no more steps."""
