"""What a comparison found: scores by method, seed and task, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varmeta._checks import counted, nearest
from varmeta.display.shown import Shown
from varmeta.files.write import write
from varmeta.results.result import Fit
from varmeta.verbs.report_text import meaning, notes, shown

if TYPE_CHECKING:
    import pandas as pd

# A step is not cut in two, so a run may end a little above its budget; beyond this multiple it is
# said.
OVERSPENT = 1.1


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """scores: one row per method, seed and test task.  fits: by (method, seed).

    runs: one row per method and seed: what was found of eta (hyperguide), by which solver
        ("budget", "exact" or "posterior of eta", the last two outside the budget; "none" of the
        nearest neighbour, of which nothing is fitted), the outer steps that it took (of Newton's
        method or of whatever solved it), what they cost, what adaptation to a test task did
        (adapting, gradient evaluations; NaN where none are counted: of "pooled", which does not
        adapt, and of a posterior of eta), whether it failed, whether it had converged, by how much
        its mean objective fell over the last third of its steps (moved, nats per task; NaN where
        too few steps or too much noise hide it), why it stopped, and what it warned about.
    level: of the interval whose coverage was counted.  budget: gradient evaluations per task that
        each run was given.

    >>> import torch, varmeta as vm
    >>> train, test = vm.datasets.lines(8, 5), vm.datasets.lines(4, 3, 3, seed=1)
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian())
    >>> both = {"joint": vm.Joint("normal"), "MAML": vm.Unrolled("delta", "elbo", 1)}
    >>> vm.compare(both, model, train, test, 1, budget=20, baselines=False, compile=False)
    <Report: 2 methods, 1 seed, 4 test tasks, 20 evaluations each>
    """

    scores: pd.DataFrame
    runs: pd.DataFrame
    fits: dict[tuple[str, int], Fit]
    level: float
    budget: float

    @property
    def table(self) -> pd.DataFrame:
        """Mean of each score over test tasks and seeds, one row per method.

        With the ends of its 95 % interval.

        The interval is for other seeds and other tasks (with a single seed, for other tasks alone);
        see `interval`.  Of a method that has not settled in some run it holds for where the budget
        left it: where it goes on to is not a matter of seeds and tasks, so print marks it.
        steps: outer steps; as evaluations, adapting and seconds the mean over seeds.
        settled: whether every run that did not fail had.  solver: as in `runs`.  overspent:
        evaluations as a multiple of the budget, where a run spent more than a tenth above it; else
        NaN.
        """
        import pandas as pd

        rows = {method: _summarise(cells) for method, cells in self._cells().items()}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")
        by = self.runs.groupby("method", sort=False)
        rest = by[["steps", "evaluations", "adapting", "seconds"]].mean()
        share = rest["evaluations"] / self.budget
        rest = rest.assign(
            failed=by["failed"].sum(),
            settled=pd.Series(self._settled),
            solver=by["solver"].first(),
            overspent=share.where((share > OVERSPENT) & (by["solver"].first() == "budget")),
        )
        return table.join(rest, how="outer").reindex(rest.index)

    def frame(self) -> pd.DataFrame:
        """`table`, under the name that the table of everything has."""
        return self.table

    def _headline(self) -> str:
        return "\n".join([repr(self), *self._notes(self.table)])

    def __repr__(self) -> str:
        of = {"method": self.runs["method"], "seed": self.runs["seed"]}
        of["test task"] = self.scores["task"]
        sizes = ", ".join(counted(column.nunique(), what) for what, column in of.items())
        return f"<Report: {sizes}, {self.budget:.0f} evaluations each>"

    @property
    def _settled(self) -> dict[str, bool]:
        good = self.runs["converged"].astype(bool) | (self.runs["failed"] > 0)
        return {
            str(method): bool(value)
            for method, value in good.groupby(self.runs["method"]).all().items()
        }

    def differences(self, reference: str) -> pd.DataFrame:
        """Every method less `reference`, on the same tasks and seeds.

        Means with their 95 % intervals.

        Methods share tasks, so a difference is known better than either score.  settled: whether
        both had; else the interval is of where the budget left them.

        Raises ValueError for an unknown method.
        """
        import pandas as pd

        cells = self._cells()
        if reference not in cells:
            raise ValueError(
                f"reference must be one of the methods {list(cells)}, not {reference!r}"
                f"{nearest(reference, cells)}"
            )
        own, settled = cells[reference], self._settled
        rows = {
            method: _summarise({metric: part[metric].sub(own[metric]) for metric in part})
            | {"settled": settled[method] and settled[reference]}
            for method, part in cells.items()
            if method != reference
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")

    def _cells(self) -> dict[str, dict[str, pd.DataFrame]]:
        """By method and score: one row per seed, one column per task."""
        metrics = self.scores.columns.difference(["task", "method", "seed", "n"], sort=False)
        # not pivot_table, which drops a score that is NaN throughout
        return {
            method: {
                metric: part.pivot(index="seed", columns="task", values=metric)
                for metric in metrics
            }
            for method, part in self.scores.groupby("method", sort=False)
        }

    def plot(self, metric: str = "log_density", ax: Any = None) -> Any:
        """Every method's mean and interval of one score; returns the matplotlib axes."""
        from varmeta.plot import plot_comparison

        return plot_comparison(self.table, metric, ax, self.level)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write `scores.csv`, `runs.csv` and `table.csv` into a folder, which is made.

        Each whole or not at all.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table, index in (
            ("scores", self.scores, False), ("runs", self.runs, False), ("table", self.table, True)
        ):  # fmt: skip
            write(folder / f"{name}.csv", [table.to_csv(index=index).encode()])

    def __str__(self) -> str:
        table = self.table
        return "\n".join([shown(table, self.runs).to_string(), *self._notes(table)])

    def _notes(self, table: pd.DataFrame) -> list[str]:
        seeds = int(self.scores["seed"].nunique())
        return [meaning(table, seeds, self.level), *notes(table, self.runs)]


def interval(cells: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of `cells` `(seeds, tasks)` over other seeds and other tasks.

    A crossed design with random seeds and tasks: the half-widths for seeds alone and for tasks
    alone, each with Student's t on its own means, joined as the root of their squares.  A little
    wide where both matter, and honest where seeds are few. With one seed it holds for other tasks
    alone.  NaN where a cell is not a number: a method must not be judged on what went well.

    >>> low, high = interval(np.array([[1.0, 2.0, 3.0]]))
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    from scipy.stats import t  # ArviZ brings it

    if not np.isfinite(cells).all() or cells.shape[1] < 2:
        return math.nan, math.nan
    mean, square = float(cells.mean()), 0.0
    for means in (cells.mean(0), cells.mean(1)):
        count = len(means)
        if count > 1:
            square += t.ppf(0.5 + level / 2, count - 1) ** 2 * means.var(ddof=1) / count
    return mean - math.sqrt(square), mean + math.sqrt(square)


def _summarise(cells: Mapping[str, pd.DataFrame]) -> dict[str, float]:
    out: dict[str, float] = {}
    for metric, table in cells.items():
        low, high = interval(table.to_numpy())
        out |= {
            metric: float(table.to_numpy().mean()),
            f"{metric}_low": low,
            f"{metric}_high": high,
        }
    return out
