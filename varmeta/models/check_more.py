"""What further tasks are looked at for, once a model has been tried on others of their kind."""

from __future__ import annotations

from varmeta.likelihoods.discrete import Categorical
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.check import check_observations, check_outcomes, look_at_tokens
from varmeta.models.check_rows import check_padding
from varmeta.models.check_ways import check_ways
from varmeta.models.model import TaskModel
from varmeta.tasks import Batch, TaskSet


def check_more(model: TaskModel, tasks: TaskSet, batch: Batch) -> None:
    """Look at what differs from tasks to tasks: their observations, their sizes and their tokens.

    batch: the tasks, padded.

    Raises ValueError for observations outside the likelihood's support (naming task and row), where
    tasks are padded and a task's rows depend on each other, and where an embedding is given what
    is none of its rows.
    """
    if model.likelihood is not None:
        check_ways(model.likelihood, tasks)
    for rows, data in ((tasks.support_rows, batch.support), (tasks.query_rows, batch.query)):
        if model.likelihood is not None:
            check_observations(model.likelihood, rows, tasks.names)
        if data is not None and data.width:
            check_padding(model, data)
            look_at_tokens(model, data)
            if _outputs_tell(model):
                check_outcomes(model, model.init(data.like), data, tasks.names)


def _outputs_tell(model: TaskModel) -> bool:
    """Whether it is the network that says how many classes there are."""
    judged = None if model.likelihood is None else unweighted(model.likelihood)
    return isinstance(judged, Categorical) and judged.num_classes is None
