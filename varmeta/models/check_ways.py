"""Tasks that have other numbers of classes: whether what they say of it holds of their rows."""

from __future__ import annotations

from varmeta.likelihoods.base import Likelihood
from varmeta.likelihoods.discrete import Categorical
from varmeta.likelihoods.weighted import unweighted
from varmeta.tasks import TaskSet


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
