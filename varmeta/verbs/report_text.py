"""What `print` shows of a comparison: its table, and below it what a reader must know."""

from __future__ import annotations

import math
from textwrap import shorten
from typing import TYPE_CHECKING

from varmeta._checks import counted

if TYPE_CHECKING:
    import pandas as pd

COSTS = ["steps", "evaluations", "seconds", "failed"]
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
    text["seconds"] = text["seconds"].map("{:.1f}".format)
    for metric in [column[: -len("_low")] for column in table if column.endswith("_low")]:
        text[metric] = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]" if settled else f"{mean:.2f} (not settled)"
            for mean, low, high, settled in zip(
                table[metric],
                table[f"{metric}_low"],
                table[f"{metric}_high"],
                table["settled"],
                strict=True,
            )
        ]
    # of the nearest neighbour nothing failed: it has no such score
    unfitted = table["solver"] == "none"
    for metric in set(text) - set(COSTS):
        text.loc[unfitted & table[metric].isna(), metric] = "-"
    return text[[column for column in text if column not in COSTS] + COSTS]


def _steps(runs: pd.DataFrame) -> pd.Series:
    """Outer steps by method, as text: one number, or the range over seeds."""
    import pandas as pd

    texts = {}
    for method, taken in runs.groupby("method", sort=False)["steps"]:
        known = sorted(set(taken.dropna().astype(int)))
        texts[method] = " to ".join(str(steps) for steps in dict.fromkeys(known[:1] + known[-1:]))
    return pd.Series(texts).replace("", "nan")


def notes(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What a reader of the table must know, a line each."""
    return [
        *_on_settling(table),
        *_on_solvers(table, runs),
        *_on_few_steps(table, runs),
        *_on_warnings(runs),
    ]


def _on_settling(table: pd.DataFrame) -> list[str]:
    unsettled = list(table.index[~table["settled"]])
    rest = list(table.index[table["settled"]])
    if not unsettled:
        return []
    named = ", ".join(unsettled)
    if len(unsettled) > len(rest):
        named = "every method" + (f" but {', '.join(rest)}" if rest else "")
    return [
        "not settled, so without an interval: a larger budget, or standardised tasks, may "
        f"change the order (report.runs): {named}"
    ]


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
