"""What to say of the units of the data, where a model starts in others.

That is whole numbers left raw, several responses of one noise scale, and numbers that are far from
those a network starts with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from varmeta.likelihoods.base import LocationScale
from varmeta.likelihoods.continuous import LogNormal
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.tasks import TaskSet

# Sds of responses that differ by more than this factor are unlikely to have one noise scale.
APART = 3.0
# A network's layers start for numbers around 0 of sd 1; this many times more or less are not that.
FAR = 30.0


def said_of_units(model: TaskModel, tasks: TaskSet) -> list[str]:
    """What there is to say before a fit, in sentences."""
    known = (what(model, tasks) for what in (left_raw, one_scale_for_all, far_from_start))
    return [sentence for sentence in known if sentence is not None]


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


def far_from_start(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where a network reads or is to give numbers far from those it starts with.

    None where x goes through another layer than `nn.Linear` first, and where the data were scaled.
    """
    net, likelihood, rows = model.net, model.likelihood, tasks.support_rows
    reads_x = isinstance(net, nn.Sequential) and not model.all_linear
    while isinstance(net, nn.Sequential) and len(net):
        net = net[0]
    if (
        tasks.scaling is not None
        or not (reads_x and isinstance(net, nn.Linear))
        or not (len(rows.x) and rows.x.is_floating_point())
    ):
        return None
    names = tasks.x_names if len(tasks.x_shape) == 1 else None
    found = _far(rows.x, "x", names)
    if found is None and likelihood is not None and likelihood.real_valued:
        found = _far(likelihood.observed(rows.y), "y", None)
    if found is None:
        return None
    return (
        f"{found}, but a network starts with numbers around 0 of sd 1 and may learn nothing from "
        "others: standardise the tasks, tasks, scaling = tasks.standardized(model.likelihood), and "
        "new ones by scaling.apply(new)"
    )


def _far(values: Tensor, what: str, names: Sequence[str] | None) -> str | None:
    """The first column with a mean or an sd far from 0 and 1, in words."""
    columns = values.double().reshape(len(values), -1)
    mean, sd = columns.mean(0), columns.std(0, correction=0)
    # a rare 0 or 1 has a small sd too, but is no small number
    largest = (columns - mean).abs().amax(0)
    far = (mean.abs() > FAR) | (sd > FAR) | ((largest < 10 / FAR) & (sd < 1 / FAR) & (largest > 0))
    if not far.any():
        return None
    at = int(far.nonzero()[0])
    which = f"column {at} of {what}" if columns.shape[1] > 1 else what
    which = which if names is None else f"{what}'s column {names[at]!r}"
    return f"{which} has mean {float(mean[at]):.4g} and sd {float(sd[at]):.4g}"
