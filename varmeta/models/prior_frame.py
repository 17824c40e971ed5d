"""The learned prior as a table: a row for every number, or for every tensor of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from varmeta.models.by_tensor import rms

if TYPE_CHECKING:
    import pandas as pd

Rows = Mapping[str, list[tuple[str, float, float]]]


def frame_of(rows: Rows, errors: Mapping[str, float] | None) -> pd.DataFrame:
    """rows: by kind, the label, the number and the prior's sd (NaN where it has none).

    errors: standard errors by label.
    """
    import pandas as pd

    flat = [(kind, *row) for kind, some in rows.items() for row in some]
    columns: dict[str, list[object]] = {
        "kind": [kind for kind, *_ in flat],
        "value": [value for _, _, value, _ in flat],
    }
    if errors is not None:
        columns["std_error"] = [
            math.nan if kind == "observation" else errors[label] for kind, label, *_ in flat
        ]
    columns["sd"] = [sd for *_, sd in flat]
    return pd.DataFrame(columns, index=pd.Index([label for _, label, *_ in flat], name="name"))


def by_tensor(
    loc: Mapping[str, Tensor], sd: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]]
) -> pd.DataFrame:
    """A row for every tensor: how many numbers, their root mean square, the range of the sds."""
    import pandas as pd

    named = {"weight": loc, **others}
    rows = {
        name: {
            "kind": kind,
            "shape": str(tuple(value.shape)),
            "numbers": value.numel(),
            "rms": rms(value),
            "sd_low": float(sd[name].min()) if kind == "weight" else math.nan,
            "sd_high": float(sd[name].max()) if kind == "weight" else math.nan,
        }
        for kind, some in named.items()
        for name, value in some.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")
