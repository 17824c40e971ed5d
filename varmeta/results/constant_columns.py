"""Columns of x that are the same number in every row, of which a linear model can learn nothing."""

from __future__ import annotations

from varmeta.models.linear_predictor import LinearPredictor
from varmeta.results.result import Fit


def constant_columns(fit: Fit) -> dict[str, float]:
    """The columns that have a weight and hold one number only, each with it.

    Where there is no intercept one such column is one, and is left out unless it is 0.
    """
    x, model = fit.tasks.support_rows.x, fit.model
    if x.dim() != 2 or len(x) < 2 or not model.all_linear:
        return {}
    names = fit.tasks.x_names or tuple(f"column {i} of x" for i in range(x.shape[1]))
    predictor = model.net if isinstance(model.net, LinearPredictor) else None
    offset = () if predictor is None else predictor.offset
    same = (x == x[0]).all(0).tolist()
    found = {
        name: value
        for name, is_same, value in zip(names, same, x[0].tolist(), strict=True)
        if is_same and name not in offset
    }
    parameters = (*model.weights.names, *model.shared)
    has_intercept = any(name.endswith("bias") for name in parameters)
    if predictor is not None:
        has_intercept = bool(predictor.intercept_name)
    several = has_intercept or sum(value != 0 for value in found.values()) > 1
    return {name: value for name, value in found.items() if several or value == 0}


def in_words(found: dict[str, float]) -> str:
    """What to say of them."""
    named = ", ".join(f"{name} is {value + 0.0:g}" for name, value in found.items())
    one = len(found) == 1
    return (
        f"{named} in every row, so that the data say nothing of "
        f"{'its weight' if one else 'their weights'} beside an intercept: leave "
        f"{'it' if one else 'them'} out of x"
    )
