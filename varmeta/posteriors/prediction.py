"""Draws of what will be observed, or of its mean: means, intervals, a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta._checks import counted, probability
from varmeta.posteriors import calibration

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Prediction:
    """Draws of new observations, or of their mean: `samples` `(draws, tasks, points, ...)`.

    mask: `(tasks, points)`, False in padding.  names: of the tasks.
    """

    samples: Tensor
    mask: Tensor
    names: tuple[str, ...]

    @property
    def mean(self) -> Tensor:
        """`(tasks, points, ...)`."""
        return self._floating.mean(0)

    @property
    def sd(self) -> Tensor:
        return self._floating.std(0, correction=min(1, len(self.samples) - 1))

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of probability `level`, `(tasks, points, ...)` each.

        The lower one first.
        """
        level = probability("level", level)
        # sorted here: torch.quantile refuses more than 16 million numbers
        ordered = self._floating.sort(0).values
        return calibration.quantile(ordered, (1 - level) / 2), calibration.quantile(
            ordered, (1 + level) / 2
        )

    @property
    def _floating(self) -> Tensor:
        return (
            self.samples
            if self.samples.is_floating_point()
            else self.samples.to(torch.get_default_dtype())
        )

    def task(self, name: str) -> Tensor:
        """The draws of one task without padding, `(draws, points, ...)`."""
        if name not in self.names:
            raise KeyError(
                f"no task is called {name!r}; the first names are {list(self.names[:5])}"
            )
        index = self.names.index(name)
        return self.samples[:, index, self.mask[index]]

    def frame(self, level: float = 0.9) -> pd.DataFrame:
        """One row per task and point (counted from 0): task, point, mean, sd, low, high.

        Without padding.

        low, high: the central interval of probability `level`.  Of an observation with several
        numbers (responses, classes) each gets a row, and a column `response` says which.

        >>> draws = torch.tensor([[[1.0]], [[3.0]]])
        >>> prediction = Prediction(draws, torch.tensor([[True]]), ("a",))
        >>> prediction.frame().round(2)
          task  point  mean    sd  low  high
        0    a      0   2.0  1.41  1.1   2.9
        """
        import pandas as pd

        low, high = self.interval(level)
        task, point = (index.tolist() for index in self.mask.nonzero(as_tuple=True))
        flat = {
            name: values[self.mask].reshape(len(task), -1)
            for name, values in {"mean": self.mean, "sd": self.sd, "low": low, "high": high}.items()
        }
        width = flat["mean"].shape[1]
        columns = {
            "task": [self.names[i] for i in task for _ in range(width)],
            "point": [i for i in point for _ in range(width)],
        }
        if self.samples.dim() > 3:
            columns["response"] = list(range(width)) * len(task)
        return pd.DataFrame(
            columns | {name: values.reshape(-1).tolist() for name, values in flat.items()}
        )

    def __repr__(self) -> str:
        draws, tasks, points = self.samples.shape[:3]
        counts = self.mask.sum(-1).tolist()
        smallest = min(counts, default=points)
        at = counted(points, "point") if smallest == points else f"{smallest} to {points} points"
        event = f" of shape {tuple(self.samples.shape[3:])}" if self.samples.dim() > 3 else ""
        return f"<Prediction: {counted(draws, 'draw')} for {counted(tasks, 'task')} at {at}{event}>"
