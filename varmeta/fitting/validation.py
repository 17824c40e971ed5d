"""Tasks held out of a fit: how well they are predicted while it runs, and the best state kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from varmeta._checks import one_of, whole_number
from varmeta.likelihoods.base import SCALE
from varmeta.strategies.strategy import Eta, State
from varmeta.tasks import TaskSet
from varmeta.tasks.taskset import no_tasks

Metric = Literal["log_density", "rmse", "error_rate"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Validation:
    """Judge a fit, while it runs, on tasks that it does not learn from; keep its best state.

    tasks: held-out tasks with query data.  Each is adapted to its support data and scored on its
        query data, as `Fit.adapt(tasks).score()` does.
    metric: what is judged, over all query observations: "log_density" (nats, higher is better),
        "rmse", or for classes "error_rate", 1 - accuracy (lower is better).
    every: outer steps from one look to the next; the start and the end are looked at too.  A look
        adapts the validation tasks as `Fit.adapt` does, to tolerance where the strategy says no
        number of inner steps: of a whole network under `Joint("normal")` that may cost as much as
        hundreds of outer steps, so look seldom there; of a head that is exact it costs a few.
    patience: how many looks without a better one end the run; None: none do.
    num_samples: draws where the score is not exact.
    calibrate: in the end, move the noise scale (or the temperature of `LeastSquaresClasses`) to
        where the validation tasks' log density is best.
        Steps of Adam move its logarithm by at most their rate each, so that after few of them
        intervals are as wide as the noise was where it started.

    Use `Validation` where `fit(validate=tasks)` is not enough.

    Raises TypeError for tasks that are no TaskSet, ValueError where none has query data, for
    another metric or number, and for calibrate=True of another metric than "log_density".

    >>> import torch, varmeta as vm
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior())
    >>> tasks = vm.datasets.lines(20, num_query=5)
    >>> held_out = vm.Validation(vm.datasets.lines(5, num_query=5, seed=1), every=10, patience=2)
    >>> fit = vm.fit(model, tasks, num_steps=50, validate=held_out)
    >>> "kept is step" in fit.stop
    True
    """

    tasks: TaskSet
    metric: Metric = "log_density"
    every: int = field(default=50, kw_only=True)
    patience: int | None = field(default=10, kw_only=True)
    num_samples: int = field(default=200, kw_only=True)
    calibrate: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.tasks, TaskSet):
            raise TypeError(f"validation tasks must be a TaskSet, not {no_tasks(self.tasks)}")
        if all(task.query is None for task in self.tasks):
            raise ValueError(
                "the validation tasks have no query data to be scored on: tasks.split(0.5) sets "
                "half of each task's rows apart"
            )
        metric: str = self.metric
        if metric == "accuracy":  # what people say, and `Posterior.accuracy` shows
            raise ValueError("accuracy is 1 - error_rate: use metric='error_rate'")
        one_of("metric", metric, METRICS)
        whole_number("every", self.every)
        if self.patience is not None:
            whole_number("patience", self.patience)
        whole_number("num_samples", self.num_samples)
        if self.calibrate and self.metric != "log_density":
            raise ValueError(
                "calibrate=True moves the noise scale (of classes, the temperature) by the log "
                "density, not by the "
                f"{self.what}: use metric='log_density'"
            )

    @property
    def what(self) -> str:
        """The metric in words."""
        return self.metric.replace("_", " ").replace("rmse", "RMSE")


class Kept(NamedTuple):
    """A state of a run that one may come back to."""

    step: int
    value: float
    eta: Eta
    state: State
    optimizer: dict[str, Any]


# How far the noise scale is searched, either way, and how fine: of its logarithm.
_RANGE, _FINE = math.log(100.0), 0.01


class Watch:
    """Looks at a run every so many steps, and keeps the best state that it saw.

    value: the metric at an eta.
    """

    def __init__(
        self, validation: Validation, value: Callable[[Eta], float], name: str = SCALE
    ) -> None:
        self.validation, self._value, self.name = validation, value, name
        self.best: Kept | None = None
        self.last, self.worse, self.moved = -1, 0, 1.0

    def is_due(self, step: int) -> bool:
        return step % self.validation.every == 0

    @property
    def has_seen_enough(self) -> bool:
        patience = self.validation.patience
        return patience is not None and self.worse >= patience

    def look(
        self, step: int, eta: Eta, state: State, optimizer: Callable[[], dict[str, Any]]
    ) -> float:
        """The metric after `step` steps; not finite counts as worse than any that is."""
        eta = {name: value.detach().clone() for name, value in eta.items()}
        value = self._value(eta)
        best, worse = self.best, self.worse + 1
        if best is None or self._is_better(value, best.value):
            best, worse = Kept(step, value, eta, state, copy.deepcopy(optimizer())), 0
        # all at once: an interruption finds the look taken or not
        self.best, self.worse, self.last = best, worse, step
        return value

    def state(self) -> dict[str, Any]:
        """Where it stands, as tensors and plain values: what `go_on` takes."""
        found: dict[str, Any] = {"last": self.last, "worse": self.worse, "best": None}
        if self.best is not None:
            kept, at = self.best, self.best.state
            found["best"] = {
                "step": kept.step,
                "value": kept.value,
                "eta": kept.eta,
                "phi": at.phi,
                "inner": at.inner,
                "counters": {"step": at.step, "lr_scale": at.lr_scale},
                "optimizer": kept.optimizer,
            }
        return found

    def go_on(self, state: dict[str, Any]) -> None:
        """From where another one stood."""
        best = state["best"]
        self.last, self.worse = state["last"], state["worse"]
        if best is not None:
            at = State(best["phi"], best["inner"], **best["counters"])
            self.best = Kept(best["step"], best["value"], best["eta"], at, best["optimizer"])

    def _is_better(self, value: float, than: float) -> bool:
        if not math.isfinite(value) or not math.isfinite(than):
            return math.isfinite(value)
        return value > than if self.validation.metric == "log_density" else value < than

    def calibrate(self) -> None:
        """Move the scale called `name` of the best state to where the metric is best."""
        from scipy.optimize import minimize_scalar  # ArviZ brings it

        assert self.best is not None
        kept = self.best

        def lost(by: float) -> float:
            value = self._value({**kept.eta, self.name: kept.eta[self.name] + by})
            return -value if math.isfinite(value) else math.inf

        found = minimize_scalar(
            lost, bounds=(-_RANGE, _RANGE), method="bounded", options={"xatol": _FINE}
        )
        value = -found.fun
        eta = {**kept.eta, self.name: kept.eta[self.name] + found.x}
        if self._is_better(value, kept.value):
            self.best, self.moved = kept._replace(value=value, eta=eta), math.exp(found.x)

    def in_words(self, steps: int) -> str:
        """What a run of `steps` steps kept."""
        assert self.best is not None
        what = "noise scale" if self.name == SCALE else self.name.removeprefix("log_")
        calibrated = "" if self.moved == 1.0 else f", with {self.moved:.3g} times the {what} found"
        return (
            f"kept is step {self.best.step} of {steps}, where the validation tasks' "
            f"{self.validation.what} was best, {self.best.value:.4g}{calibrated}"
        )
