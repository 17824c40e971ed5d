"""The posteriors of networks, summarised by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from varmeta.models.by_tensor import rms

if TYPE_CHECKING:
    import pandas as pd


def by_tensor(mean: Mapping[str, Tensor], sd: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row for every tensor of a task's weights, from `(tasks, *shape)` each.

    Columns: shape; rms, of the tasks' means; between, how far the tasks' means lie from their
    common mean, root mean square; sd, of the posteriors, root mean square.

    >>> import torch
    >>> mean, sd = {"weight": torch.tensor([[1.0], [3.0]])}, {"weight": torch.ones(2, 1)}
    >>> by_tensor(mean, sd).loc["weight", ["between", "sd"]].tolist()
    [1.0, 1.0]
    """
    import pandas as pd

    rows = {
        name: {
            "shape": str(tuple(value.shape[1:])),
            "rms": rms(value),
            "between": rms(value - value.mean(0)),
            "sd": rms(sd[name]),
        }
        for name, value in mean.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
