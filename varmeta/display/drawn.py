"""Objects that draw themselves: which figure, is said by the room that has the figures.

That room stands above those of the objects, so it registers a function for each kind of object;
a file that an object's class stands in needs to know none of it.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any


@singledispatch
def draw(shown: Any, axes: Any = None, **options: Any) -> Any:
    """The figure of an object; `varmeta.plot` registers one for each kind.

    Raises TypeError for a kind that has none.
    """
    raise TypeError(f"a {type(shown).__name__} has no figure of its own: see varmeta.plot")


class Drawn:
    """An object with a `plot()`."""

    def plot(self, axes: Any = None, **options: Any) -> Any:
        """Draw the one figure that says most of this kind of object.

        Returns the matplotlib axes, an array `(rows, columns)`.

        Of a fit: a model with more than six weights a task over one predictor, as a network, is
        drawn as curves from the prior (`plot.plot_prior_curves`), every other prior weight by
        weight (`plot.plot_prior`).  Of a posterior: the tasks' curves over one predictor, with
        their data (`plot.plot_curves`), else their weights (`plot.plot_weights`).
        axes: to draw on; by default of a new figure.
        options: what else that function takes, by name.

        Raises what that function raises.
        """
        return draw(self, axes, **options)
