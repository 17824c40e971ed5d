"""Tasks' rows of one predictor on a figure: where its x runs, its units, dots of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import nearest
from varmeta.plot.style import INK
from varmeta.tasks import Task, TaskSet
from varmeta.tasks.scaling import Scaling

JITTER = 0.03
GRID_POINTS = 101


def column_of(over: str | None, tasks: TaskSet, instead: str) -> int | None:
    """The column of x that a curve is drawn over; None where x is one.

    Raises ValueError where there are several and none, or another, is named.
    """
    shape = tasks.x_shape
    if over is not None:
        names = tasks.x_names or ()
        if len(shape) != 1 or over not in names:
            raise ValueError(
                f"no column of x is called {over!r}; the columns are {list(names)}"
                f"{nearest(over, names)}"
            )
        return names.index(over)
    if shape not in ((), (1,)):
        raise ValueError(
            f"a curve is drawn over one predictor, but a row of x has shape {tuple(shape)}: see "
            f"{instead}"
        )
    return None


def grid_over(x: Any, tasks: TaskSet, others: TaskSet, column: int | None = None) -> Tensor:
    """x as rows, `(points, *x_shape)`; None: even steps over the rows of the tasks.

    Where those have no rows, over the rows of the others.  Raises ValueError where nobody has.
    column: the one that is stepped over, `(points,)`; see `rows_at`.
    """
    shape = others.x_shape if column is None else ()
    if x is not None:
        return torch.as_tensor(x).reshape(-1, *shape)
    at = (lambda rows: rows) if column is None else (lambda rows: rows[:, column])
    rows = [at(part[0]).reshape(-1) for part in _parts(tasks)]
    rows = rows or [at(part[0]).reshape(-1) for part in _parts(others)]
    if not rows:
        raise ValueError("no task has rows that x could run over: give x")
    seen = torch.cat(rows)
    if seen.is_floating_point():
        steps = torch.linspace(0, 1, GRID_POINTS, dtype=seen.dtype, device=seen.device)
        grid = seen.min() + (seen.max() - seen.min()) * steps
    else:
        grid = seen.msort().unique_consecutive()
    return grid.reshape(-1, *shape)


def rows_at(grid: Tensor, column: int | None, task: Task, others: TaskSet) -> Tensor:
    """Rows of x whose column runs over the grid, the others at their mean in the task's rows."""
    if column is None:
        return grid
    own = [part[0] for part in _parts([task])] or [part[0] for part in _parts(others)]
    middle = torch.cat(own).to(grid).mean(0)
    rows = middle.expand(len(grid), -1).clone()
    rows[:, column] = grid
    return rows


def _parts(tasks: Iterable[Task]) -> Iterator[tuple[Tensor, Tensor]]:
    """Support and query of all tasks, those that have rows."""
    for task in tasks:
        for part in (task.support, task.query):
            if part is not None and len(part[0]):
                yield part


@dataclass(frozen=True)
class Units:
    """The units of the figure: the data's own, where standardised tasks come with their scaling.

    column: of x, the one that is drawn; None: x is one.
    """

    scaling: Scaling | None
    column: int | None = None

    def x(self, values: Tensor) -> np.ndarray:
        values = self._drawn(values.cpu())
        if self.scaling is not None:
            scale, loc = (
                self._drawn(part.to(values)) for part in (self.scaling.x_scale, self.scaling.x_loc)
            )
            values = values * scale + loc
        return np.asarray(values).reshape(-1)

    def _drawn(self, rows: Tensor) -> Tensor:
        return rows if self.column is None else rows[..., self.column]

    def y(self, values: Tensor) -> np.ndarray:
        values = values.cpu()
        values = values if self.scaling is None else self.scaling.y_inverse(values)
        return np.asarray(values).reshape(-1)


def draw_task(ax: Any, task: Task, units: Units, jitter: int | None, thin: float = 1.0) -> None:
    """A task's observations: full circles were adapted to, open ones held out.

    jitter: the seed by which 0 and 1 are drawn apart, None for numbers.  thin: the size of dots, as
        a share of the full one.
    """
    how = {"s": 16 * thin**2, "lw": thin, "ec": INK, "zorder": 3}
    for part, label, face in ((task.support, "adapted to", INK), (task.query, "held out", "white")):
        if part is not None:
            x, y = _dots(part, units, jitter)
            ax.scatter(x, y, fc=face, label=label, **how)


def dots_of(tasks: TaskSet, units: Units, apart: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every row of the tasks, `(rows,)` each.

    apart: whether 0 and 1 are drawn apart.
    """
    found = [_dots(part, units, seed if apart else None) for seed, part in enumerate(_parts(tasks))]
    x, y = zip(*found, strict=True) if found else ([np.zeros(0)], [np.zeros(0)])
    return np.concatenate(x), np.concatenate(y)


def are_binary(tasks: Iterable[Task]) -> bool:
    """Whether all observations are 0 or 1."""
    return all(bool(((y == 0) | (y == 1)).all()) for _, y in _parts(tasks))


def _dots(
    part: tuple[Tensor, Tensor], units: Units, jitter: int | None
) -> tuple[np.ndarray, np.ndarray]:
    y = units.y(_shares(part[1]))
    return units.x(part[0]), y if jitter is None else _jittered(y, jitter)


def _shares(y: Tensor) -> Tensor:
    """Successes out of trials as shares, `(points, 2)` to `(points,)`.

    Other observations as they are.
    """
    return y[:, 0] / y[:, 1] if y.dim() == 2 and y.shape[1] == 2 else y


def _jittered(y: np.ndarray, seed: int) -> np.ndarray:
    return y + np.random.default_rng(seed).uniform(-JITTER, JITTER, len(y))
