"""Tasks that have other numbers of classes: whether what they say of it holds of their rows."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.likelihoods.base import Likelihood
from varmeta.likelihoods.discrete import Categorical
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.tasks import TaskSet
from varmeta.tasks.rows import Rows

# Fewer rows may show as many of each class by chance.
FEW = 10


def check_ways(likelihood: Likelihood, tasks: TaskSet) -> None:
    """Raise ValueError where tasks lack a feature that the likelihood reads, or it is not true.

    It is not where a number of classes is none, or a row's class lies beyond it.
    """
    missing = [name for name in likelihood.features if name not in tasks.feature_names]
    if missing:
        have = f"have {list(tasks.feature_names)}" if tasks.feature_names else "have none"
        raise ValueError(
            f"{likelihood!r} needs the feature {missing[0]!r} of every task, but these tasks "
            f"{have}: give Task(features={{{missing[0]!r}: 5}}), new tasks too"
        )
    judged = unweighted(likelihood.predictive)
    if not isinstance(judged, Categorical) or judged.ways is None:
        return
    ways = tasks.features[judged.ways]
    most = judged.num_classes
    bad = (ways != ways.floor()) | (ways < 2)
    bad = bad if most is None else bad | (ways > most)
    if bool(bad.any()):
        task = int(bad.nonzero()[0])
        upto = "" if most is None else f" to {most}"
        raise ValueError(
            f"the feature {judged.ways!r} of task {tasks.names[task]!r} is "
            f"{float(ways[task]):g}, expected its number of classes, 2{upto} (standardized() "
            "scales features: leave these tasks as they are)"
        )
    for rows in (tasks.support_rows, tasks.query_rows):
        if not len(rows.y) or rows.y.dim() != 1:
            continue
        beyond = rows.y >= ways[rows.owner]
        if bool(beyond.any()):
            first = int(beyond.nonzero()[0])
            task, row = rows.place(first)
            raise ValueError(
                f"task {tasks.names[task]!r}, row {row}: y = "
                f"{rows.y[first].item()}, but the task has {int(ways[task])} classes: expected 0 "
                f"to {int(ways[task]) - 1} (rows are counted within the task, from 0)"
            )


def unsaid_ways(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where tasks look like episodes of fewer classes than the likelihood has.

    Episodes are balanced: each task's support and query show the classes 0, ..., k-1, as many rows
    of each.  Data in which a class is rare, or happens to be missing, are not.  Of tasks some of
    which have all the classes one is sure where a feature of theirs says each one's number.

    None where there is nothing to say.
    """
    likelihood = model.likelihood
    judged = None if likelihood is None else unweighted(likelihood.predictive)
    if not isinstance(judged, Categorical) or judged.ways is not None:
        return None
    most, rows = judged.num_classes, (tasks.support_rows, tasks.query_rows)
    known = [part for part in rows if len(part.y)]
    if most is None or any(part.y.dim() != 1 for part in known):
        return None
    if sum(len(part.y) for part in known) < FEW:
        return None
    ways = [_ways(part, len(tasks), most) for part in known]
    k = torch.stack(ways).amax(0)
    if bool((k < 2).any()) or any(bool(((own != 0) & (own != k)).any()) for own in ways):
        return None
    said = [name for name, value in tasks.features.items() if bool((value.cpu() == k.cpu()).all())]
    if not bool((k < most).all()) and not (said and bool((k < most).any())):
        return None
    few, many = int(k.min()), int(k.max())
    number = f"{few}" if few == many else f"{few} to {many}"
    fewer = f"Give the head {few} outputs, or say" if few == many else "Say"
    return (
        f"these tasks look like episodes of {number} classes, as many rows of each, but "
        f"{likelihood!r} has {most}: the classes that a task lacks keep a share of its "
        f"probabilities.  {fewer} each task's number in a feature, and the feature's name to the "
        f"likelihood, ways={(said or ['ways'])[0]!r}"
    )


def _ways(rows: Rows, number: int, most: int) -> Tensor:
    """How many classes each task shows, `(tasks,)`: 0 without rows, 1 where not all alike."""
    pairs, counts = torch.unique(rows.owner * most + rows.y.long(), return_counts=True)
    owner, one = pairs // most, rows.owner.new_zeros(number)
    ways = torch.bincount(owner, minlength=number)
    last = one.scatter_reduce(0, owner, pairs % most + 1, "amax")
    least = one.scatter_reduce(0, owner, counts, "amin", include_self=False)
    largest = one.scatter_reduce(0, owner, counts, "amax")
    return torch.where((ways == last) & (least == largest), ways, ways.clamp(max=1))
