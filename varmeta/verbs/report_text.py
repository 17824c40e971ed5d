"""What `print` shows of a comparison: its table, and below it what a reader must know."""

from __future__ import annotations

import math
from textwrap import shorten
from typing import TYPE_CHECKING

from varmeta._checks import counted

if TYPE_CHECKING:
    import pandas as pd

COSTS = ["steps", "evaluations", "adapting", "seconds", "failed"]
# A run of fewer outer steps than these ends nearly where it starts.
FEW = 10


def shown(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """`Report.table` as text, a column per score and then what each method cost."""
    text = table[COSTS].copy()
    text["steps"] = _steps(runs)
    text["evaluations"] = [
        f"{spent:.0f}" + ("" if math.isnan(over) else f" ({over:.1f} x budget)")
        for spent, over in zip(table["evaluations"], table["overspent"], strict=True)
    ]
    text["adapting"] = table["adapting"].map("{:.0f}".format).replace("nan", "-")
    text["seconds"] = text["seconds"].map("{:.1f}".format)
    marks = ["" if table["settled"].all() else " " if good else "*" for good in table["settled"]]
    for metric in _metrics(table):
        ends = (table[f"{metric}_low"], table[f"{metric}_high"])
        text[metric] = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]{mark}"
            for mean, low, high, mark in zip(table[metric], *ends, marks, strict=True)
        ]
    # of the nearest neighbour nothing failed: it has no such score
    unfitted = table["solver"] == "none"
    for metric in set(text) - set(COSTS):
        text.loc[unfitted & table[metric].isna(), metric] = "-"
    return text[[column for column in text if column not in COSTS] + COSTS]


def _metrics(table: pd.DataFrame) -> list[str]:
    return [column[: -len("_low")] for column in table if column.endswith("_low")]


def _steps(runs: pd.DataFrame) -> pd.Series:
    """Outer steps by method, as text: one number, or the range over seeds."""
    import pandas as pd

    texts = {}
    for method, taken in runs.groupby("method", sort=False)["steps"]:
        known = sorted(set(taken.dropna().astype(int)))
        texts[method] = " to ".join(str(steps) for steps in dict.fromkeys(known[:1] + known[-1:]))
    return pd.Series(texts).replace("", "nan")


def meaning(table: pd.DataFrame, num_seeds: int, level: float) -> str:
    """What the numbers are, in a line."""
    of = (
        "means over tasks and seeds [95 % intervals for other tasks and seeds]"
        if num_seeds > 1
        else "means over tasks [95 % intervals for other tasks, with one seed]"
    )
    said, metrics = (
        f"{of} of each task's score, in the units of the tasks as given",
        _metrics(table),
    )
    if "rmse" in metrics:
        said += (
            '; rmse is averaged over tasks, where the row "all" of score() pools their observations'
        )
    if "coverage" in metrics:
        said += f"; coverage is of {100 * level:g} % intervals"
    return said + "; adapting: gradient evaluations for a test task, outside the budget"


def notes(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What a reader of the table must know, a line each."""
    return [
        *_on_settling(table, runs),
        *_on_solvers(table, runs),
        *_on_few_steps(table, runs),
        *_on_warnings(runs),
    ]


def _on_settling(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    unsettled = list(table.index[~table["settled"]])
    rest = list(table.index[table["settled"]])
    if not unsettled:
        return []
    named = ", ".join(unsettled)
    if len(unsettled) > len(rest):
        named = "every method" + (f" but {', '.join(rest)}" if rest else "")
    return [
        "* not settled: the interval is of where the budget left it; a larger one, or "
        f"standardised tasks, may change the order (report.runs): {named}",
        f"  {_on_moves(unsettled, runs)}",
    ]


def _on_moves(methods: list[str], runs: pd.DataFrame) -> str:
    """By how much the objectives of these methods still fell; of the seed where that is most."""
    moved, hidden = [], []
    for method in methods:
        by = runs.loc[runs["method"] == method, "moved"].dropna()
        if len(by):
            most = by[by.abs().idxmax()]
            moved.append(f"{method} {most:.2g}" + (" (it rose)" if most < 0 else ""))
        else:
            hidden.append(method)
    told = "over the last third of its steps its objective fell by, in nats per task: "
    unsaid = "too few steps, or too much noise, to say how far it still moves: "
    parts = [told + ", ".join(moved)] if moved else []
    return "; ".join([*parts, unsaid + ", ".join(hidden)] if hidden else parts)


def _on_solvers(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    found = []
    over = list(table.index[table["overspent"].notna()])
    if over:
        found.append(
            f"overspent, since one step took more than was left of the budget: {', '.join(over)}"
        )
    exact = list(table.index[table["solver"] == "exact"])
    if exact:
        found.append(
            f"solved exactly, outside the budget and alike for every seed: {', '.join(exact)}"
        )
    own = runs[runs["hyperguide"] != "delta"].groupby("method", sort=False)["hyperguide"].first()
    if len(own):
        found.append("with a posterior of eta, found by a solver of its own outside the budget")
        found += [f"  {method} ({hyperguide})" for method, hyperguide in own.items()]
    return found


def _on_few_steps(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """The methods whose theta0 has hardly been learned: adaptation may still score well."""
    fewest = runs.groupby("method", sort=False)["steps"].min()
    alike: dict[str, list[str]] = {}
    for method, taken in _steps(runs).items():
        row = table.loc[method]
        if fewest[method] < FEW and row["solver"] == "budget" and not row["settled"]:
            alike.setdefault(taken, []).append(str(method))
    return [
        f"{', '.join(methods)} took {taken} outer step{'' if taken == '1' else 's'}: what is "
        "judged is nearly where the model starts, and what adaptation makes of that"
        for taken, methods in alike.items()
    ]


def _on_warnings(runs: pd.DataFrame) -> list[str]:
    said = (
        runs[runs["warnings"] != ""]
        .groupby("method", sort=False)["warnings"]
        .agg(["size", "first"])
    )
    if not len(said):
        return []
    return ["warnings (in full: report.runs)"] + [
        f"  {method} ({counted(row['size'], 'run')}): {shorten(row['first'], 150)}"
        for method, row in said.iterrows()
    ]
