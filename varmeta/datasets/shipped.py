"""Small real data sets that ship with the package."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, get_args, overload

from varmeta._checks import one_of
from varmeta.tasks import TaskSet

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

if TYPE_CHECKING:
    import pandas as pd


@overload
def radon(uranium: bool = ..., *, as_frame: Literal[False] = ...) -> TaskSet: ...
@overload
def radon(uranium: bool = ..., *, as_frame: Literal[True]) -> pd.DataFrame: ...
def radon(uranium: bool = False, *, as_frame: bool = False) -> TaskSet | pd.DataFrame:
    """Radon in 919 houses of 85 counties of Minnesota: the standard example of partial pooling.

    A task is a county (1 to 116 houses).  x `(points, 1)`: floor of the measurement, 0 basement, 1
    first floor; y `(points,)`: log(radon in pCi/L + 0.1).  float64.

    uranium: x `(points, 2)` has the log of the county's uranium reading (ppm) too.
    as_frame: the table itself, a row per house.

    Source: Gelman and Hill, Data Analysis Using Regression and Multilevel/Hierarchical Models,
        2006, by posteriordb.

    >>> radon()
    TaskSet(85 tasks, 919 support points (1 to 116 per task), no query, x (1,), float64)
    """
    frame = _read("radon")
    if as_frame:
        return frame
    x = ["floor", "log_uppm"] if uranium else ["floor"]
    return TaskSet.from_frame(frame.astype({"floor": float}), task="county", x=x, y="log_radon")


@overload
def rats(centre: bool = ..., *, as_frame: Literal[False] = ...) -> TaskSet: ...
@overload
def rats(centre: bool = ..., *, as_frame: Literal[True]) -> pd.DataFrame: ...
def rats(centre: bool = True, *, as_frame: bool = False) -> TaskSet | pd.DataFrame:
    """Growth of 30 rats, each weighed on five days.

    A task is a rat.  x `(5, 1)`: age in days, minus the middle day 22 unless `centre=False` (a
    mean-field guide needs the centring: without it intercept and slope are strongly correlated); y
    `(5,)`: weight in grams.  float64.

    as_frame: the table itself, with the days as they were.

    Source: Gelfand et al., Illustration of Bayesian inference in normal data models using Gibbs
    sampling, JASA 1990, by posteriordb.

    >>> tasks = rats()
    >>> tasks[0].support[0].flatten().tolist()
    [-14.0, -7.0, 0.0, 7.0, 14.0]
    """
    frame = _read("rats")
    if as_frame:
        return frame
    frame = frame.astype({"day": float, "weight": float})
    if centre:
        frame["day"] -= 22
    return TaskSet.from_frame(frame, task="rat", x=["day"], y="weight")


@overload
def eight_schools(*, as_frame: Literal[False] = ...) -> TaskSet: ...
@overload
def eight_schools(*, as_frame: Literal[True]) -> pd.DataFrame: ...
def eight_schools(*, as_frame: bool = False) -> TaskSet | pd.DataFrame:
    """Effects of coaching in eight schools, with known standard errors.

    A task is a school with one number: y `(1,)`: the effect in SAT points; x `(1,)`: its standard
        error.  So x is no
    predictor: use it as the scale in a program for `TaskModel.from_pyro`.  float64.

    Source: Rubin, Estimation in parallel randomized experiments, 1981, by posteriordb.

    >>> tasks = eight_schools()
    >>> tasks.names, tasks["A"].support
    (('A', 'B', 'C', 'D', 'E', 'F', 'G', 'H'),
     (tensor([15.], dtype=torch.float64), tensor([28.], dtype=torch.float64)))
    """
    frame = _read("eight_schools")
    if as_frame:
        return frame
    return TaskSet.from_frame(
        frame.astype({"effect": float, "std_err": float}), task="school", x="std_err", y="effect"
    )


@overload
def gapminder(
    split: Split | None = ..., *, gdp: bool = ..., as_frame: Literal[False] = ...
) -> TaskSet: ...
@overload
def gapminder(
    split: Split | None = ..., *, gdp: bool = ..., as_frame: Literal[True]
) -> pd.DataFrame: ...
def gapminder(
    split: Split | None = None, *, gdp: bool = False, as_frame: bool = False
) -> TaskSet | pd.DataFrame:
    """Life expectancy in 142 countries every five years: extrapolate 30 years from 30.

    The years are 1952 to 2007.

    A task is a country.  Support: the six years to 1977; query: the six from 1982.  x `(6, 1)`:
    (year - 1979.5) / 20; y `(6,)`: life expectancy at birth in years.  float64.

    split: only the countries of "train", "val" or "test" (drawn once, so that results can be
        compared); None: all.
    gdp: x `(6, 2)` has log10(GDP per head in inflation-adjusted dollars) - 3.5 too, known at the
        query years.
    as_frame: the table itself, a row per country and year.

    Raises ValueError for another split.
    Source: gapminder.org, by the gapminder packages of Jennifer Bryan (R) and Jeff Stafford
        (Python).

    >>> gapminder("test")
    TaskSet(28 tasks, 168 support points (6 to 6 per task),
            168 query points (6 to 6 per task), x (1,), float64)
    """
    one_of("split", split, (None, *SPLITS))
    frame = _read("gapminder")
    if split is not None:
        frame = frame[frame["task_split"] == split].reset_index(drop=True)
    if as_frame:
        return frame
    frame["decades"] = (frame["year"] - 1979.5) / 20
    frame["log_gdp"] = frame["gdp_per_cap"].map(math.log10) - 3.5
    frame["query"] = 1 - frame["support"]
    x = ["decades", "log_gdp"] if gdp else ["decades"]
    return TaskSet.from_frame(frame, task="country", x=x, y="life_exp", query="query")


def _read(name: str) -> pd.DataFrame:
    import pandas as pd

    with (files("varmeta.datasets") / "data" / f"{name}.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)
