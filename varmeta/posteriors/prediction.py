"""What will be observed, or its mean: means, intervals, a table; from draws, or by a formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta._checks import counted, no_task, probability
from varmeta.display.shown import Shown
from varmeta.posteriors import calibration
from varmeta.posteriors.normal_mixture import NormalMixture

if TYPE_CHECKING:
    import pandas as pd


class Prediction(Shown):
    """Of new observations, or of their mean.

    samples: draws `(draws, tasks, points, ...)`, or how to take so many of them, `num_samples`,
        where somebody asks for them.
    mask: `(tasks, points)`, False in padding.  names: of the tasks.
    known: the distribution itself, which mean, sd, interval and frame are then of; None: of the
        draws.
    are_classes: whether what is drawn are classes, whose numbers have no mean and no order.
    """

    def __init__(
        self,
        samples: Tensor | Callable[[], Tensor],
        mask: Tensor,
        names: tuple[str, ...],
        num_samples: int | None = None,
        known: NormalMixture | None = None,
        are_classes: bool = False,
    ) -> None:
        self._draw = samples
        self.mask, self.names, self.known = mask, names, known
        self.are_classes = are_classes
        self.num_samples = len(self.samples) if num_samples is None else num_samples

    @cached_property
    def samples(self) -> Tensor:
        return self._draw if isinstance(self._draw, Tensor) else self._draw()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_draw": self.samples}  # how they are drawn is not for a file

    @property
    def is_exact(self) -> bool:
        """Whether mean, sd, interval and frame are of the distribution itself, not of draws."""
        return self.known is not None

    @property
    def mean(self) -> Tensor:
        """`(tasks, points, ...)`."""
        return self._numbers.mean(0) if self.known is None else self._moments[0]

    @property
    def sd(self) -> Tensor:
        if self.known is not None:
            return self._moments[1]
        return self._numbers.std(0, correction=min(1, len(self.samples) - 1))

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        assert self.known is not None
        return self.known.moments()

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Ends of the central interval of probability `level`, `(tasks, points, ...)` each.

        The lower one first.

        Raises ValueError for a level that is not between 0 and 1, and of classes.
        """
        level = probability("level", level)
        ends = (1 - level) / 2, (1 + level) / 2
        if self.known is not None:
            low, high = self.known.quantiles(ends)
            return low, high
        # sorted here: torch.quantile refuses more than 16 million numbers
        ordered = self._numbers.sort(0).values
        low, high = (calibration.quantile(ordered, end) for end in ends)
        return low, high

    @property
    def _numbers(self) -> Tensor:
        if self.are_classes:
            raise ValueError(
                "new observations are classes here, whose numbers have no mean, sd or interval: "
                "expected(x) has the probability of each class, and samples are draws of them"
            )
        return (
            self.samples
            if self.samples.is_floating_point()
            else self.samples.to(torch.get_default_dtype())
        )

    def task(self, name: str) -> Tensor:
        """The draws of one task without padding, `(draws, points, ...)`.

        Raises KeyError for a task that there is not.
        """
        if name not in self.names:
            raise no_task(name, self.names)
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
        if len(self._shape) > 2:
            columns["response"] = list(range(width)) * len(task)
        return pd.DataFrame(
            columns | {name: values.reshape(-1).tolist() for name, values in flat.items()}
        )

    def _table(self) -> pd.DataFrame | None:
        return None if self.are_classes else self.frame()

    def __repr__(self) -> str:
        tasks, points, *event = self._shape
        counts = self.mask.sum(-1).tolist()
        smallest = min(counts, default=points)
        at = counted(points, "point") if smallest == points else f"{smallest} to {points} points"
        drawn = counted(self.num_samples, "draw") if self.known is None else "known by formula"
        of = f" of shape {tuple(event)}" if event else ""
        return f"<Prediction: {drawn} for {counted(tasks, 'task')} at {at}{of}>"

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of one draw."""
        return tuple(self.samples.shape[1:]) if self.known is None else self.known.shape
