"""One run of a comparison: a method with a seed, fitted, adapted to the test tasks and scored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from varmeta.fitting.baselines import NEAREST, Pooled, baseline
from varmeta.fitting.compiled_step import Compile
from varmeta.fitting.convergence import fell
from varmeta.fitting.descent import OptimizerFactory
from varmeta.fitting.joint_newton import newton_applies
from varmeta.fitting.nearest_neighbour import error_rates
from varmeta.fitting.pooled_start import is_regression
from varmeta.graphs.process import kept_warnings
from varmeta.models.initialised import initialised
from varmeta.models.kinks import kinked
from varmeta.models.model import TaskModel
from varmeta.results.result import Fit
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import TaskSet
from varmeta.verbs.fit import fit

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Outcome:
    """A row of the report's `runs`; the tasks' scores and the fit, where it came so far."""

    row: dict[str, Any]
    score: pd.DataFrame | None
    fit: Fit | None


@dataclass
class Plan:
    """What a comparison runs with; see `compare`.  solved: what a method's exact fit took."""

    strategies: Mapping[str, Strategy]
    models: Mapping[str, TaskModel]
    hyperguides: Mapping[str, str]
    train: TaskSet
    test: TaskSet
    budget: float
    optimizer: OptimizerFactory | None
    batch_size: int | None
    num_samples: int
    level: float
    compile: Compile
    solved: dict[str, tuple[Fit, float]] = field(default_factory=dict)

    def run(self, name: str, seed: int) -> Outcome:
        """Fit the method of this name, adapt to the test tasks and score them; errors are kept."""
        if name == NEAREST and name not in self.strategies:
            return _nearest(self.test, seed)
        started, said = initialised(self.models[name], seed), list[str]()
        failed, reason, solver, seconds = 0, "", "budget", float("nan")
        result = score = spent = None
        try:
            with _collected(said):
                own, strategy, rows = _parts(name, self.strategies, started, self.train)
                solver = self._solver(name, own, strategy, rows, seed)
                result, seconds = self._fit(solver, name, own, strategy, rows, seed)
                reason = result.stop
                adapted = result.adapt(self.test, compile=self.compile)
                spent = adapted.evaluations
                by_task = adapted.score(num_samples=self.num_samples, seed=seed, level=self.level)
            # without "all"
            score = by_task.iloc[:-1].reset_index().assign(method=name, seed=seed)
        except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
            failed, reason = 1, f"{type(error).__name__}: {error}"
        row = {
            "method": name,
            "seed": seed,
            "hyperguide": self.hyperguides.get(name, "delta"),
            "solver": solver,
            "steps": float("nan") if result is None else result.run.step,
            "evaluations": float("nan") if result is None else result.run.evaluations,
            "adapting": float("nan") if spent is None else float(spent.mean()),
            "seconds": seconds,
            "failed": failed,
            "converged": result is not None and result.converged,
            "moved": float("nan") if result is None else _moved(result),
            "stop": reason,
            "warnings": "; ".join(said),
        }
        return Outcome(row, score, result)

    def _solver(
        self, name: str, model: TaskModel, strategy: Strategy, rows: TaskSet, seed: int
    ) -> str:
        """What the report calls it: "posterior of eta", "exact" or "budget"."""
        if name in self.hyperguides and self.hyperguides[name] != "delta":
            return "posterior of eta"
        free = self.optimizer is None and self.batch_size is None
        if free and (name in self.solved or _is_solved(model, strategy, rows, seed)):
            return "exact"
        return "budget"

    def _fit(
        self, solver: str, name: str, model: TaskModel, strategy: Strategy, rows: TaskSet, seed: int
    ) -> tuple[Fit, float]:
        """The fit and its seconds.  Raises KeyboardInterrupt for half a run, which is no result."""
        if solver == "exact" and name in self.solved:
            return self.solved[name]
        options: dict[str, Any] = {"compile": self.compile}
        if solver == "posterior of eta":
            options = {"hyperguide": self.hyperguides[name]}
        elif solver == "budget":
            options |= {"optimizer": self.optimizer, "batch_size": self.batch_size}
            options |= {"budget": self.budget}
        begin = perf_counter()
        found = fit(model, rows, strategy, seed=seed, progress=False, **options)
        if found.stop.startswith("interrupted"):
            raise KeyboardInterrupt
        seconds = perf_counter() - begin
        if solver == "exact":
            self.solved[name] = found, seconds
        return found, seconds


def _nearest(test: TaskSet, seed: int) -> Outcome:
    """The nearest neighbour, which is neither fitted nor drawn: the same for every seed."""
    import pandas as pd

    begin, batch = perf_counter(), test.batch()
    wrong = error_rates(batch).tolist()
    none, number = float("nan"), batch.require_query().num_points.tolist()
    score = pd.DataFrame({"task": batch.names, "n": number}).assign(
        log_density=none, error_rate=wrong, calibration_error=none, method=NEAREST, seed=seed
    )
    row = {
        "method": NEAREST,
        "seed": seed,
        "hyperguide": "delta",
        "solver": "none",
        "steps": 0,
        "evaluations": 0.0,
        "adapting": none,
        "seconds": perf_counter() - begin,
        "failed": 0,
        "converged": True,
        "moved": none,
        "stop": "nothing is fitted",
        "warnings": "",
    }
    return Outcome(row, score, None)


def _moved(found: Fit) -> float:
    period = found.strategy.traits(found.problem).period or 1
    return fell(found.run, len(found.tasks), period)


def _parts(
    name: str, strategies: Mapping[str, Strategy], model: TaskModel, train: TaskSet
) -> tuple[TaskModel, Strategy, TaskSet]:
    """What is fitted to what under this name."""
    if name in strategies:
        strategy = strategies[name]
    else:
        model, strategy = baseline(name, model, train, strategies.values())
    return model, strategy, train.merged() if strategy.outer == "elbo" else train


def _is_solved(model: TaskModel, strategy: Strategy, rows: TaskSet, seed: int) -> bool:
    """Whether `fit` without a budget goes to the optimum from the pooled fit, so that no seed and
    no start matters.
    """
    batch = rows.batch()
    eta = model.init(batch.support.like)
    if not is_regression(model, rows, eta) or kinked(model, batch, eta) is not None:
        return False
    problem = strategy.problem(model, rows, seed)
    # the pooled fit is where "pooled" ends
    return isinstance(strategy, Pooled) or newton_applies(strategy, problem, batch, eta)


@contextlib.contextmanager
def _collected(said: list[str]) -> Iterator[None]:
    """Keep what RuntimeWarnings say, each once, instead of showing it between the runs of a
    comparison.
    """
    with kept_warnings(RuntimeWarning) as kept:
        try:
            yield
        finally:
            said.extend(dict.fromkeys(str(item.message) for item in kept))
