"""Rows made up of a table's values, by which one reading of a formula is told from another.

Means, knots and contrasts belong to the table that a formula was read with; what they are shows in
the x that it makes of the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Of numbers with more values than these, their quartiles stand for them.
FEW = 5


def probe_of(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """Plain values for each column, as many for one as for another; levels stand in their order.

    >>> import pandas
    >>> probe_of(pandas.DataFrame({"arm": ["b", "a", "b"], "dose": [1.0, 2.0, 2.0]}))
    {'arm': ['a', 'b'], 'dose': [1.0, 2.0]}
    """
    found = {str(name): _values(frame[name]) for name in frame.columns}
    rows = max((len(values) for values in found.values()), default=0)
    return {name: [values[i % len(values)] for i in range(rows)] for name, values in found.items()}


def _values(column: pd.Series) -> list[Any]:
    if str(column.dtype) == "category":
        return [_plain(one) for one in column.cat.remove_unused_categories().cat.categories]
    values = column.to_numpy()
    if values.dtype.kind not in "iuf":
        return sorted({_plain(one) for one in values.tolist()}, key=lambda one: str(one))
    some = np.unique(values)
    if len(some) > FEW:
        some = np.quantile(values, [0.25, 0.5, 0.75], method="nearest")
    found: list[Any] = some.tolist()
    return found


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return value if isinstance(value, (bool, int, float, str)) else str(value)
