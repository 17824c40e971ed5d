"""How often the most probable class is the right one, task by task, with an interval over tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import counted, whole_number
from varmeta.display.shown import Shown
from varmeta.posteriors.calibration import _classes, bins_of
from varmeta.posteriors.observer import Observer
from varmeta.tasks import Data

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Accuracy(Shown):
    """The share of rows whose most probable class is the right one, as `Posterior.accuracy` finds.

    value: the mean of the tasks' accuracies, each task counted alike; NaN where one task's is, as
        of a network that overflows there.
    low, high: ends of its interval of confidence `level` over other tasks, Student's t of the
        tasks' accuracies, within [0, 1]; NaN of a single task.  Where every task has the same
        accuracy, as all of them right, it has no width.
    by_task: the accuracy of each task, a Series by its name.
    confidence, correct: of every row the probability of its most probable class, and 1 where that
        is the right one, else 0, `(n,)`.

    >>> import pandas as pd
    >>> by_task = pd.Series([0.5, 1.0], ["a", "b"])
    >>> found = Accuracy(by_task, 0.95, torch.ones(2), torch.ones(2))
    >>> str(found), float(found)
    ('75.0 % (0.0 to 100.0 over 2 tasks)', 0.75)
    """

    by_task: pd.Series
    level: float
    confidence: Tensor
    correct: Tensor

    @property
    def value(self) -> float:
        return float(self._shares.mean())

    @property
    def _shares(self) -> np.ndarray:
        # not the Series, whose mean and sd leave NaN out
        shares: np.ndarray = self.by_task.to_numpy()
        return shares

    @property
    def low(self) -> float:
        return float(np.clip(self.value - self._half, 0.0, 1.0))

    @property
    def high(self) -> float:
        return float(np.clip(self.value + self._half, 0.0, 1.0))

    @property
    def _half(self) -> float:
        from scipy.stats import t  # ArviZ brings it

        count = len(self.by_task)
        if count < 2:
            return math.nan
        sd = float(self._shares.std(ddof=1))
        return float(t.ppf(0.5 + self.level / 2, count - 1)) * sd / math.sqrt(count)

    def calibration(self, num_bins: int = 15) -> pd.DataFrame:
        """Whether the probabilities hold: the reliability table of all rows, one line per bin.

        Columns: low and high, the ends of the bin of confidence; n, the rows in it; confidence,
        their mean; accuracy, the share of them that is right.  Plot accuracy against confidence,
        beside the diagonal.  Bins without rows are left out.  Their gaps, weighted by n, add up to
        the calibration_error of `score`'s row "all".  Raises as `whole_number`.
        """
        import pandas as pd

        number = whole_number("num_bins", num_bins)
        where = bins_of(self.confidence, number)
        n = torch.bincount(where, minlength=number)
        sums = {
            name: torch.zeros(number, dtype=torch.float64).index_add(0, where.cpu(), part)
            for name, part in {
                "confidence": self.confidence.double().cpu(),
                "accuracy": self.correct.double().cpu(),
            }.items()
        }
        edges = torch.linspace(0, 1, number + 1, dtype=torch.float64)
        columns = {"low": edges[:-1], "high": edges[1:], "n": n.cpu()}
        columns |= {name: total / n.cpu() for name, total in sums.items()}
        table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
        return table[table["n"] > 0].reset_index(drop=True)

    def frame(self) -> pd.DataFrame:
        """One row per task, and its accuracy."""
        return self.by_task.to_frame()

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        number = counted(len(self.by_task), "task")
        low, high = (f"{100 * end:.1f}" for end in (self.low, self.high))
        over = f"of {number}" if math.isnan(self._half) else f"{low} to {high} over {number}"
        return f"{100 * self.value:.1f} % ({over})"

    def __repr__(self) -> str:
        return f"<Accuracy: {self}>"


def accuracy(observer: Observer, data: Data, num_samples: int, seed: int, level: float) -> Accuracy:
    """The accuracy of every task's rows in `data`, of which there are some.

    Raises ValueError where the observations are no classes.
    """
    import pandas as pd

    likelihood = observer.model.likelihood
    if likelihood is not None and likelihood.predictive.kind not in KINDS:
        raise ValueError(NO_CLASSES.format(likelihood))
    found = observer.evaluate(data, num_samples, seed, sampled=None)
    if found.probs is None:
        raise ValueError(NO_CLASSES.format("the program"))
    probs, y = _classes(found.probs[data.mask], found.y[data.mask])
    confidence, best = probs.max(-1)
    # NaN probabilities are no class
    correct = torch.where(confidence.isnan(), math.nan, (best == y).to(confidence.dtype))
    task = data.mask.nonzero()[:, 0]
    counts = data.num_points
    right = torch.zeros(len(data), dtype=torch.float64, device=task.device)
    right = right.index_add(0, task, correct.double())
    judged = counts > 0
    names = [
        name for name, some in zip(observer.q.batch.names, judged.tolist(), strict=True) if some
    ]
    shares = (right / counts)[judged].tolist()
    by_task = pd.Series(shares, index=pd.Index(names, name="task"), name="accuracy")
    return Accuracy(by_task, level, confidence, correct)


KINDS = ("binary", "classification", "ordinal")
NO_CLASSES = (
    "accuracy is of classes, and what {} observes are none: use score(), whose columns suit it"
)
