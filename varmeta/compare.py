"""`compare`: several strategies on the same tasks, seeds and budget, beside baselines that pool everything or nothing."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from varmeta.bayes.model import TaskModel
from varmeta.bayes.prior import GaussianPrior
from varmeta.fit import OptimizerFactory, fit
from varmeta.joint import Joint
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import detach
from varmeta.problem import Problem
from varmeta.result import Fit
from varmeta.strategy import Eta, State, Stats, Strategy, check_kinds
from varmeta.tasks import Batch, TaskSet

if TYPE_CHECKING:
    import pandas as pd

BASELINES = ("pooled", "no pooling")
# "No pooling" still needs a proper prior; one this wide says next to nothing about a task's weights.
WEAK_PRECISION = 1e-2


@dataclass(frozen=True)
class Report:
    """scores: one row per method, seed and test task.  fits: by (method, seed).

    runs: one row per method and seed: what it cost, whether it failed, why it stopped, and what it warned about.
    """

    scores: pd.DataFrame
    runs: pd.DataFrame
    fits: dict[tuple[str, int], Fit]
    level: float

    @property
    def table(self) -> pd.DataFrame:
        """Mean of each score over test tasks and seeds, with the ends of its interval, one row per method.

        The interval (95 %) is from a bootstrap that draws seeds and tasks anew, so that it holds over both.
        """
        import pandas as pd

        rows = {method: _summarise(part) for method, part in self.scores.groupby("method", sort=False)}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
        counts = self.runs.groupby("method", sort=False)[["evaluations", "seconds"]].mean()
        failures = self.runs.groupby("method", sort=False)["failed"].sum().rename("failed")
        return table.join(counts, how="outer").join(failures, how="outer").reindex(counts.index)

    def plot(self, metric: str = "log_density", ax: Any = None) -> Any:
        """Every method's mean and interval of one score; returns the matplotlib axes."""
        from varmeta.plot import plot_comparison

        return plot_comparison(self.table, metric, ax, self.level)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `scores.csv`, `runs.csv` and `table.csv` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.scores.to_csv(folder / "scores.csv", index=False)
        self.runs.to_csv(folder / "runs.csv", index=False)
        self.table.to_csv(folder / "table.csv")

    def __str__(self) -> str:
        table = self.table
        text = table[["evaluations", "seconds", "failed"]].copy()
        text["evaluations"] = text["evaluations"].map("{:.0f}".format)
        text["seconds"] = text["seconds"].map("{:.1f}".format)
        for metric in [column[: -len("_low")] for column in table if column.endswith("_low")]:
            text[metric] = [
                f"{mean:.2f} [{low:.2f}, {high:.2f}]"
                for mean, low, high in zip(table[metric], table[f"{metric}_low"], table[f"{metric}_high"], strict=True)
            ]
        text = text[
            [c for c in text if c not in ("evaluations", "seconds", "failed")] + ["evaluations", "seconds", "failed"]
        ]
        return text.to_string()


def compare(
    strategies: Mapping[str, Strategy],
    model: TaskModel,
    train: TaskSet,
    test: TaskSet,
    seeds: int | list[int] = 5,
    *,
    models: Mapping[str, TaskModel] | None = None,
    budget: float = 2000,
    optimizer: OptimizerFactory | None = None,
    batch_size: int | None = None,
    baselines: bool = True,
    num_samples: int = 500,
    level: float = 0.9,
    progress: bool | None = None,
) -> Report:
    """Fit every strategy on `train`, adapt to each task of `test` from its support data, score on its query data.

    Every strategy sees every row of the training tasks: with `outer="elbo"` (and in the baselines) the query data join the
    support; the other objectives keep the two apart.

    strategies: by the name that the table shows.
    model: the same start for all; for a network, each seed starts theta0 and shared parameters from a new initialisation of
        its layers, the same for every strategy, except where the prior's `loc` says where to start.
    models: another model for some of the strategies, by name: one that learns the precision, say.
    seeds: how many, or which.
    budget: gradient evaluations per training task for every strategy and the pooled baseline (a Hessian product counts as
        two); adaptation at test time is not counted.
    optimizer, batch_size: as in `fit`, and the same for every strategy; Adam at 1e-2 by default.
    baselines: add "pooled" (one set of weights for all tasks) and "no pooling" (a mean-field posterior of each task on its
        own, under a prior so wide that tasks share next to nothing but the noise scale).

    A strategy that fails is kept in the report with its reason; it does not stop the others.  What the fits warn about
    stands in the report's `runs`.

    Raises ValueError where the test tasks have no query data, or a strategy does not fit the tasks; TypeError for arguments
    of the wrong kind; RuntimeError where every run failed.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    seed_list = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    chosen = {name: (models or {}).get(name, model) for name in (*strategies, *BASELINES)}
    _check(strategies, chosen, train, test, seed_list, level)
    for what, number in (("budget", budget), ("batch_size", batch_size), ("num_samples", num_samples)):
        if number is not None and not number >= 1:
            raise ValueError(f"{what} must be at least 1, not {number}")
    stray = set(models or {}) - set(strategies)
    if stray:
        raise ValueError(f"models names {sorted(stray)}, but the strategies are {sorted(strategies)}")
    methods: dict[str, Strategy | None] = dict(strategies)
    if baselines:
        methods |= dict.fromkeys(BASELINES)
    scores, runs, fits = [], [], {}
    jobs = [(seed, name) for seed in seed_list for name in methods]
    for seed, name in tqdm(jobs, disable=None if progress is None else not progress, leave=False):
        started = _initialised(chosen[name], seed)
        begin = perf_counter()
        failed, reason, seconds, said = 0, "", float("nan"), list[str]()
        try:
            with _collected(said):
                result = _run(name, methods[name], started, train, seed, budget, optimizer, batch_size)
                fits[name, seed] = result
                seconds, reason = perf_counter() - begin, result.stop
                score = result.adapt(test).score(num_samples=num_samples, seed=seed, level=level)
            rows = score.iloc[:-1].reset_index()  # without "all"
            scores.append(rows.assign(method=name, seed=seed))
        except (ArithmeticError, RuntimeError, ValueError) as error:
            failed, reason = 1, f"{type(error).__name__}: {error}"
        spent = fits[name, seed].run.evaluations if (name, seed) in fits else float("nan")
        runs.append(
            {
                "method": name, "seed": seed, "evaluations": spent, "seconds": seconds, "failed": failed,
                "stop": reason, "warnings": "; ".join(said),
            }
        )  # fmt: skip
    if not scores:
        raise RuntimeError(f"every strategy failed; the first: {runs[0]['stop']}")
    return Report(pd.concat(scores, ignore_index=True), pd.DataFrame(runs), fits, level)


def _check(
    strategies: object, models: Mapping[str, TaskModel], train: TaskSet, test: TaskSet, seeds: list[int], level: float
) -> None:
    if not isinstance(strategies, Mapping) or not strategies:
        raise ValueError("strategies must be a dict of at least one, such as {'joint': vm.Joint()}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a number of at least 1, or different seeds, not {seeds}")
    if not isinstance(level, float) or not 0 < level < 1:
        raise ValueError(f"level must be a probability between 0 and 1, such as 0.9, not {level!r}")
    clash = set(strategies) & set(BASELINES)
    if clash:
        raise ValueError(f"{sorted(clash)} are the names of the baselines: call your strategies otherwise")
    for name, strategy in strategies.items():
        for tasks in (train, test):
            check_kinds(models[name], tasks, strategy)
    bare = [task.name for task in test if task.query is None or not len(task.query[1])]
    if bare:
        raise ValueError(f"the test tasks are scored on query data, but {bare[0]!r} has none: use test.split(...)")
    for name, strategy in strategies.items():
        models[name].check(train)
        models[name].check(test)
        strategy.check(models[name], train)


def _initialised(model: TaskModel, seed: int) -> TaskModel:
    """The model with its network's layers initialised anew by `seed` (as PyTorch initialises them)."""
    if model.net is None:
        return model
    fresh = copy.copy(model)
    net = copy.deepcopy(model.net).cpu()  # one generator, whatever the device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            reset = getattr(module, "reset_parameters", None)
            # frozen statistics are data, not a start
            if callable(reset) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                reset()
    # a start that the user gave to the prior stays
    given = model.prior.start_loc
    new = {name: value.detach().clone() for name, value in net.named_parameters() if name not in given}
    fresh.start = model.start | new
    return fresh


def _run(
    name: str, strategy: Strategy | None, model: TaskModel, train: TaskSet, seed: int, budget: float,
    optimizer: OptimizerFactory | None, batch_size: int | None,
) -> Fit:  # fmt: skip
    if strategy is None:
        model = copy.copy(model)
        model.prior = GaussianPrior(WEAK_PRECISION)
        strategy = Pooled() if name == "pooled" else Joint("normal")
    rows = train.merged() if strategy.outer == "elbo" else train
    return fit(
        model, rows, strategy, optimizer=optimizer, batch_size=batch_size, seed=seed, budget=budget, progress=False
    )


@contextlib.contextmanager
def _collected(said: list[str]) -> Iterator[None]:
    """Keep what RuntimeWarnings say, each once, instead of showing it between the runs of a comparison."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            kept = [item for item in caught if issubclass(item.category, RuntimeWarning)]
            said.extend(dict.fromkeys(str(item.message) for item in kept))
    for item in caught:
        if item not in kept:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)


@dataclass(frozen=True)
class Pooled(Strategy):
    """Baseline: every task has the weights theta0, fitted to all support data at once; nothing is adapted."""

    def loss(self, problem: Problem, batch: Batch, eta: Eta, state: State) -> tuple[Tensor, State, Stats]:
        losses = problem.losses("elbo", batch, state.step)(problem.start(batch, eta), eta)
        return self._total(problem, batch, eta, losses), state, {"losses": losses.detach(), "evaluations": 1.0}

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        phi = detach(problem.start(batch, eta))
        return Solution(phi, torch.zeros(len(batch), dtype=torch.int64), {})


def _summarise(scores: pd.DataFrame, draws: int = 2000) -> dict[str, float]:
    """Mean over seeds and tasks, and a bootstrap interval over both."""
    rng = np.random.default_rng(0)
    out: dict[str, float] = {}
    for metric in scores.columns.difference(["task", "method", "seed", "n"], sort=False):
        # every (seed, task) stands once, so nothing is averaged; not pivot_table, which drops a score that is NaN throughout
        cells = scores.pivot(index="seed", columns="task", values=metric).to_numpy()
        seeds = rng.integers(len(cells), size=(draws, len(cells), 1))
        tasks = rng.integers(cells.shape[1], size=(draws, 1, cells.shape[1]))
        # a NaN stays: a method whose score is not a number must not be judged on the tasks that went well
        means = cells[seeds, tasks].mean((1, 2))
        low, high = np.quantile(means, [0.025, 0.975]) if np.isfinite(cells).all() else (np.nan, np.nan)
        out |= {metric: float(cells.mean()), f"{metric}_low": float(low), f"{metric}_high": float(high)}
    return out
