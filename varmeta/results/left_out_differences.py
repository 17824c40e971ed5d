"""Fitted models by the tasks that are left out, with the standard errors of their differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from varmeta._checks import counted
from varmeta.graphs.process import kept_warnings
from varmeta.results.fitted import Fitted

if TYPE_CHECKING:
    import pandas as pd

REFITTED, INTEGRATED = "refitted", "left_out"


@dataclass(frozen=True)
class LeftOut:
    """total: log density of all tasks, each given the others, nats; NaN where it is not known.

    difference: from the best model.  std_error: of the difference, by tasks.
    """

    total: float = math.nan
    difference: float = math.nan
    std_error: float = math.nan


def left_out(fitted: list[Fitted], wanted: bool | None) -> tuple[list[LeftOut], list[str]]:
    """Of each fit, and what must be known to read it, in sentences.

    wanted: see `compare_models`.
    """
    if wanted is False:
        return [LeftOut()] * len(fitted), []
    notes, tables = [], {}
    for one in fitted:
        found = _table(one, wanted)
        if isinstance(found, str):
            notes.append(f"no left out tasks of {one.name}: {found}")
        else:
            tables[one.name] = found
    column = _column(list(tables.values()))
    values = {name: table[column].iloc[:-1] for name, table in tables.items()}
    for name in [name for name, some in values.items() if some.isna().any()]:
        notes.append(f"no left out tasks of {name}: its evidence has no maximum without some task")
        del values[name]
    if not values:
        return [LeftOut()] * len(fitted), notes
    if column == INTEGRATED:
        notes += _unreliable({name: tables[name] for name in values})
    how = {
        REFITTED: "by fits to the others",
        INTEGRATED: "with the uncertainty of eta integrated out",
    }[column]
    notes.append(f"left out: tasks, each {how}; std error: of the difference from the best")
    differences = _differences(values)
    return [differences.get(one.name, LeftOut()) for one in fitted], notes


def _table(one: Fitted, wanted: bool | None) -> pd.DataFrame | str:
    """`Fit.leave_one_task_out`, or why there is none."""
    if wanted is None and not one.fit.model.is_linear_gaussian:
        return "they are drawn, which may take minutes: leave_one_task_out=True"
    try:
        # of columns that are not used; what is used is looked at
        with kept_warnings(RuntimeWarning):
            return one.fit.leave_one_task_out()
    except ValueError as error:
        return str(error)


def _column(tables: list[pd.DataFrame]) -> str:
    whole = all(REFITTED in table and not table[REFITTED].isna().any() for table in tables)
    return REFITTED if whole else INTEGRATED


def _unreliable(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    notes = []
    for name, table in tables.items():
        bad = int((~table["reading"].iloc[:-1].isin(["good", "usable"])).sum())
        if bad:
            notes.append(
                f"left out: the reading of {counted(bad, 'task')} of {name} is unreliable or worse "
                "(fit.leave_one_task_out())"
            )
    return notes


def _differences(values: Mapping[str, pd.Series]) -> dict[str, LeftOut]:
    """By task, so that what makes a task hard for all models does not count."""
    best = max(values, key=lambda name: float(values[name].sum()))
    found = {}
    for name, own in values.items():
        # tasks may stand in another order
        less = own.to_numpy() - values[best].loc[own.index].to_numpy()
        error = math.sqrt(len(less)) * float(np.std(less, ddof=1))
        found[name] = LeftOut(float(own.sum()), float(less.sum()), error)
    return found
