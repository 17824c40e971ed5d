"""What a callback hears of every step, and how it ends a run."""

from __future__ import annotations

from collections.abc import Callable

from varmeta.strategies.strategy import Eta
from varmeta.tasks.stream import SourceError


class Row(dict[str, float]):
    """The numbers of a step, as in `Fit.history`, and what has been learned by then.

    >>> row = Row({"step": 1.0, "loss": 2.5}, lambda: {})
    >>> row["loss"], row.eta
    (2.5, {})
    """

    def __init__(self, numbers: dict[str, float], eta: Callable[[], Eta]) -> None:
        super().__init__(numbers)
        self._eta = eta

    @property
    def eta(self) -> Eta:
        """eta after the step, by name: copies, worked out where they are asked for.

        Of an ensemble with its members first.
        """
        return {name: value.detach().clone() for name, value in self._eta().items()}


Callback = Callable[[Row], object]


class StopFit(Exception):
    """Raise it in a callback to end the fit after this step; `fit` returns what was learned.

    >>> import torch, varmeta as vm
    >>> def enough(row):
    ...     if row["step"] == 3:
    ...         raise vm.StopFit
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    >>> adam = lambda parameters: torch.optim.Adam(parameters, 1e-2)
    >>> tasks = vm.datasets.lines(5)
    >>> vm.fit(model, tasks, vm.Joint("normal"), 100, adam, callback=enough).stop
    'ended by the callback after 3 steps: go on with fit(..., resume=this fit)'
    """


class CallbackError(Exception):
    """On its way out through a solver; the callback's own exception is its cause."""


class EndedElsewhere(Exception):
    """Another process of the group ended the run.

    stop: why, in its words; failure: what came out of it, if that is no end that a user wants.
    """

    def __init__(self, stop: str, failure: Exception | None) -> None:
        super().__init__(stop)
        self.stop, self.failure = stop, failure


# What ends a run early, with what it has learned.
ENDS = (KeyboardInterrupt, StopFit, CallbackError, SourceError, EndedElsewhere)


def told(callback: Callback, row: Row) -> None:
    """Call it; an exception of its own is one more reason for which a run ends."""
    try:
        callback(row)
    except StopFit:
        raise
    except Exception as error:
        raise CallbackError from error
