"""What to say where y is not in its noise scale's units.

That is whole numbers left raw, and several responses of one scale.
"""

from __future__ import annotations

from varmeta.likelihoods.base import LocationScale
from varmeta.likelihoods.continuous import LogNormal
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.tasks import TaskSet

# Sds of responses that differ by more than this factor are unlikely to have one noise scale.
APART = 3.0


def one_scale_for_all(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where responses whose sds lie far apart share a noise scale that is learned.

    None where they do not.

    The scale is then that of the largest, and what is said of the others (standard errors,
    intervals) is as wide.
    """
    likelihood = model.likelihood
    inner = unweighted(likelihood)
    if (
        likelihood is None
        or likelihood.kind == "classification"
        or not (isinstance(inner, LocationScale) and inner.learn_scale)
        or not len(tasks.support_rows.y)
    ):
        return None
    y = likelihood.observed(tasks.support_rows.y).double()
    if y.dim() < 2 or y[0].numel() < 2:
        return None
    rows = y.reshape(len(y), -1)
    sd = (rows.log() if isinstance(inner, LogNormal) else rows).std(0, correction=0)
    sd = sd[sd > 0]
    if len(sd) < 2 or float(sd.max()) <= APART * float(sd.min()):
        return None
    # log y cannot be scaled by scaling y
    scale = (
        "bring them to one scale, tasks.standardized(model.likelihood), or "
        if likelihood.real_valued
        else ""
    )
    return (
        f"y has {rows.shape[1]} responses, of sds from {float(sd.min()):.3g} to "
        f"{float(sd.max()):.3g}, but {likelihood!r} learns one noise scale for all of them, that "
        f"of the largest: {scale}give each its own by a Pyro program with to_event(1), see "
        "docs/how-to.md"
    )


def left_raw(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where the model takes for numbers what looks like classes or counts.

    `standardized()` left these whole numbers in y raw.
    """
    likelihood = model.likelihood
    y = tasks.support_rows.y
    raw = tasks.scaling is not None and tasks.scaling.left_raw
    if not raw or likelihood is None or not likelihood.real_valued or not len(y):
        return None
    y = likelihood.observed(y).double()
    return (
        f"x is standardised but y, of whole numbers, is not (mean {float(y.mean()):.4g}, sd "
        f"{float(y.std(correction=0)):.4g}), since standardized() takes them for classes or "
        f"counts; {type(likelihood).__name__} takes them for numbers.  Write "
        "tasks.standardized(model.likelihood), or give y as float"
    )
