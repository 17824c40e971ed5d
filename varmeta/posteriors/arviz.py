"""Draws and data as labelled arrays for ArviZ: `InferenceData` in 0.x, `DataTree` in 1.x.

This file knows neither torch nor tasks: numpy arrays come in.  ArviZ and xarray are imported inside
the functions, because that takes seconds.  No ArviZ converter is called (0.x and 1.x share none
that fits): the `xarray.Dataset`s are built here.

Observations of all tasks stand in one flat dimension with a `task_id` coordinate.  Padding them
with NaN instead makes ArviZ's elpd NaN and its LOO-PIT plots silently wrong, under 0.23 and 1.3
alike.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["load", "loo_elpd", "pareto_k", "save", "to_arviz"]

# Groups whose arrays have no draws.
NO_DRAWS = frozenset({"observed_data", "constant_data", "predictions_constant_data", "fit"})
CHAINS = 4
# The tail are min(draws / 5, 3 sqrt(draws)) weights; five or fewer say nothing of its shape.
MIN_DRAWS = 30


def to_arviz(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    obs_task: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """The groups as an `arviz.InferenceData` (ArviZ 0.x) or an `xarray.DataTree` (ArviZ 1.x).

    groups: arrays by group and variable.  In "observed_data", "constant_data",
        "predictions_constant_data" and "fit" their shape is that of `dims`; in every other group
        the draws come first.  They are independent, so they are stored as four chains, one
        quarter after the other: `summary` has an r_hat then, which it has not of one chain.  A
        number of draws that four does not divide is one chain.  Groups without variables are left
        out.
    dims: names of a variable's dimensions after the draws, by "variable" or, where it differs
        between groups, by "group/variable"; none by default.  A dimension of observations is called
        "obs" or begins with "obs_".
    coords: labels by dimension; 0, 1, 2, ... by default.
    obs_task: by group, the name of the task that each observation belongs to: the coordinate
        `task_id`.
    attrs: facts about the whole; str, numbers, and lists of one of them; a mapping becomes a JSON
        string, since netCDF files hold neither it nor bool nor None.

    Raises ValueError where shapes, dims, coords or obs_task do not fit together; TypeError for
    attrs of another type.

    >>> draws = np.zeros((100, 3))  # 100 draws of 3 tasks' weights
    >>> groups, coords = {"posterior": {"slope": draws}}, {"task": ["a", "b", "c"]}
    >>> data = to_arviz(groups, {"slope": ["task"]}, coords)
    >>> dict(data["posterior"].sizes)
    {'chain': 4, 'draw': 25, 'task': 3}
    """
    dims, coords, obs_task, facts = (
        dims or {},
        coords or {},
        obs_task or {},
        _attributes(attrs or {}),
    )
    stray = sorted(set(obs_task) - set(groups))
    if stray:
        raise ValueError(
            f"obs_task names groups that are not given: {stray}; the groups are {sorted(groups)}"
        )
    datasets = {
        group: _dataset(group, variables, dims, coords, obs_task.get(group))
        for group, variables in groups.items()
        if variables
    }
    return _container(datasets, facts)


def save(data: Any, path: str | PathLike[str]) -> None:
    """Write what `to_arviz` returned as a netCDF file, which either version of ArviZ reads."""
    from varmeta.files.write import replacing  # here: this file alone runs without the package

    with replacing(path) as beside:
        data.to_netcdf(fspath(beside), engine="h5netcdf")


def load(path: str | PathLike[str]) -> Any:
    """Read a netCDF file written by `save` into memory, and close it.

    So it can be written again.

    Raises FileNotFoundError.
    """
    import xarray as xr

    # not ArviZ 0.23's own reader: after it, load() and close() leave the file open (seen with
    # xarray 2026.9)
    with xr.open_datatree(fspath(path), engine="h5netcdf") as tree:
        tree.load()
    return _container({name: node.to_dataset() for name, node in tree.children.items()}, tree.attrs)


def pareto_k(log_weights: Any) -> np.ndarray:
    """k-hat of each task's importance weights p/q: how far the guide q is from the posterior p.

    log_weights: `(task, draw)`, log p(theta, y) - log q(theta) at draws of q, up to a constant; at
    least 30 draws. Returns `(task,)`.  Below 0.5 good, above 0.7 the guide must not be corrected by
    importance sampling; for a mean-field guide over a network's weights that is the rule, a fact
    about the guide and no failure of the fit. Weights that are equal to rounding, so that q is p,
    give -inf.

    Raises ValueError for another shape, for fewer draws, and for NaN or +inf, naming the rows.
    Source: Vehtari, Simpson, Gelman, Yao and Gabry, Pareto smoothed importance sampling, JMLR 2024.

    >>> pareto_k(np.ones((2, 100)))
    array([-inf, -inf])
    """
    weights = np.asarray(log_weights, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] < MIN_DRAWS:
        raise ValueError(
            f"log_weights must be (task, draw) with at least {MIN_DRAWS} draws, not "
            f"{weights.shape}: draw more"
        )
    bad = np.flatnonzero(
        (np.isnan(weights) | (weights == np.inf)).any(1) | (weights == -np.inf).all(1)
    )
    if len(bad):
        raise ValueError(
            f"log_weights of rows {bad.tolist()} have NaN or +inf, or only -inf: look at these "
            "tasks' densities"
        )
    from varmeta.posteriors.psis import smooth  # here: numpy alone, as this file

    return smooth(weights)[1]


def loo_elpd(data: Any, var_name: str | None = None) -> xr.DataArray:
    """Expected log predictive density, each observation left out in turn: `(task_id,)`.

    Summed over each task's observations.

    The sum is ArviZ's `loo`.  It tells how well a model would predict further observations of the
    *same* tasks.  To compare objectives or guides use held-out data (`posterior.score`), since the
    estimate takes the guide's draws for draws of the exact posterior.

    data: what `to_arviz` returned, with a "log_likelihood" group.
    var_name: the variable, where that group has several.

    Raises ValueError where that group is missing or the posterior is a delta, whose leave-one-out
    density would be the density of the very data that it was fitted to.
    """
    if data.attrs.get("posterior_kind") == "delta":
        raise ValueError(
            "a delta posterior has no leave-one-out density: its draws are all equal; score "
            "held-out data instead"
        )
    if "log_likelihood" not in data:
        raise ValueError(
            "there is no 'log_likelihood' group: export it, or score held-out data instead"
        )
    import arviz as az

    result = az.loo(
        data, pointwise=True, var_name=var_name, reff=1.0
    )  # independent draws: no autocorrelation
    pointwise = result["elpd_i"] if _arviz_1() else result["loo_i"]
    if "task_id" not in pointwise.coords:
        raise ValueError(
            "the log likelihood has no 'task_id' coordinate: give obs_task for the group "
            "'log_likelihood'"
        )
    names = pointwise["task_id"].values
    order = names[np.sort(np.unique(names, return_index=True)[1])]
    by_task: xr.DataArray = pointwise.groupby("task_id").sum().sel(task_id=order)
    return by_task


# -- inside ----------------------------------------------------------------------------------------


def _arviz_1() -> bool:
    """By number: `hasattr(arviz, "InferenceData")` is True in both."""
    return int(version("arviz").split(".")[0]) >= 1


def _container(datasets: Mapping[str, Any], attrs: Mapping[Any, Any]) -> Any:
    if _arviz_1():
        import xarray as xr

        tree = xr.DataTree.from_dict(datasets)
        tree.attrs.update(attrs)
        return tree
    import arviz as az

    with warnings.catch_warnings():
        # ArviZ 0.x accepts groups of one's own (here "fit") but says that its schema does not have
        # them
        warnings.filterwarnings("ignore", message=".*group is not defined", category=UserWarning)
        return az.InferenceData(**datasets, attrs=dict(attrs))


def _dataset(
    group: str,
    variables: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    task: Any,
) -> xr.Dataset:
    import xarray as xr

    arrays = {}
    for name, values in variables.items():
        array = np.asarray(values)
        own = tuple(dims.get(f"{group}/{name}", dims.get(name, ())))
        draws = group not in NO_DRAWS
        if array.ndim != len(own) + draws:
            expected = (("draw",) if draws else ()) + own
            raise ValueError(
                f"{group}/{name} has shape {array.shape}, but dims says {expected}: give "
                f"dims={{'{group}/{name}': [...]}} with {max(0, array.ndim - draws)} names"
            )
        arrays[name] = (("chain", "draw", *own), _chains(array)) if draws else (own, array)
    try:
        dataset = xr.Dataset(arrays)
    except ValueError as error:
        raise ValueError(
            f"variables of group {group!r} disagree about the length of a dimension: {error}"
        ) from error
    labels = {
        dim: np.asarray(coords.get(str(dim), np.arange(size)))
        for dim, size in dataset.sizes.items()
    }
    for dim, values in labels.items():
        if values.shape != (dataset.sizes[dim],):
            raise ValueError(
                f"coords[{dim!r}] has {values.size} labels, but {group} has {dataset.sizes[dim]} "
                "of them"
            )
    dataset = dataset.assign_coords(labels)
    if task is None:
        return dataset
    observations = [
        str(dim) for dim in dataset.sizes if str(dim) == "obs" or str(dim).startswith("obs_")
    ]
    if len(observations) != 1:
        raise ValueError(
            f"obs_task is given for {group}, which has dims {tuple(dataset.sizes)}: call one 'obs' "
            "or 'obs_...'"
        )
    (dim,) = observations
    ids = np.asarray(task)
    if ids.shape != (dataset.sizes[dim],):
        raise ValueError(
            f"obs_task[{group!r}] has shape {ids.shape}, expected ({dataset.sizes[dim]},): a task "
            "per entry"
        )
    return dataset.assign_coords(task_id=(dim, ids))


def _chains(draws: np.ndarray) -> np.ndarray:
    """`(draws, ...)` as `(chains, draws of each, ...)`."""
    number = CHAINS if len(draws) and len(draws) % CHAINS == 0 else 1
    return draws.reshape(number, len(draws) // number, *draws.shape[1:])


def _attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Only what a netCDF file holds: bool, None and dict fail at writing, long after the
    mistake.
    """
    out: dict[str, Any] = {}
    for name, value in attrs.items():
        plain = value.item() if isinstance(value, np.generic) else value
        items = plain if isinstance(plain, list | tuple) and plain else [plain]
        kinds = {str} if isinstance(items[0], str) else {int, float}
        if isinstance(plain, Mapping):
            out[name] = json.dumps(plain, sort_keys=True)
        elif all(type(item) in kinds for item in items):
            out[name] = list(plain) if isinstance(plain, tuple) else plain
        else:
            raise TypeError(
                f"attrs[{name!r}] is {value!r}, which a netCDF file cannot hold: give a str, a "
                "number, a list of one of them, or put it into a dict (stored as JSON)"
            )
    return out
