"""Weights by the names that users know."""

from __future__ import annotations

from varmeta._checks import nearest


def position(labels: tuple[str, ...], label: str) -> int:
    """Which of the labels it is.  Raises ValueError for one that there is not.

    >>> position(("intercept", "x"), "x")
    1
    """
    if label not in labels:
        raise ValueError(
            f"no weight is called {label!r}; the labels are {list(labels[:8])}"
            f"{nearest(label, labels)}"
        )
    return labels.index(label)
