"""A page of small panels, one for each of many things: how many columns, and how large."""

from __future__ import annotations

import math
from typing import NamedTuple

# Inches: a page that fits a screen and a sheet of paper, and panels no larger than they need be.
PAGE_WIDTH, PANEL_WIDTH, PANEL_HEIGHT = 10.0, 3.1, 2.4
NARROW = 5.0  # a legend of five entries takes that


class Page(NamedTuple):
    """rows, columns, and the panels' width and height in inches."""

    rows: int
    columns: int
    width: float
    height: float

    @property
    def size(self) -> tuple[float, float]:
        """Of the figure, with room for a legend."""
        return max(NARROW, self.width * self.columns), self.height * self.rows + 0.5


def page_of(number: int) -> Page:
    """As square as may be, with few empty places; panels shrink where there are many.

    >>> [(page.rows, page.columns) for page in map(page_of, (1, 3, 4, 7, 12, 40, 160))]
    [(1, 1), (1, 3), (2, 2), (2, 4), (3, 4), (5, 8), (12, 14)]
    """
    square = math.ceil(math.sqrt(number))
    columns = min((square, square + 1), key=lambda columns: -number % columns)
    width = min(PANEL_WIDTH, PAGE_WIDTH / columns)
    return Page(-(-number // columns), columns, width, PANEL_HEIGHT * width / PANEL_WIDTH)


def spread(names: tuple[str, ...], number: int) -> list[str]:
    """At most `number` of the names, from the first to the last in even steps.

    >>> spread(("a", "b", "c", "d", "e"), 3)
    ['a', 'c', 'e']
    """
    if len(names) <= number:
        return list(names)
    return [names[round(i * (len(names) - 1) / (number - 1))] for i in range(number)]
