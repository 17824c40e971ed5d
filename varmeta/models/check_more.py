"""What further tasks are looked at for, once a model has been tried on others of their kind."""

from __future__ import annotations

from varmeta.models.check import check_observations, look_at_tokens
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
        if data is not None and data.mask.shape[1]:
            check_padding(model, data)
            look_at_tokens(model, model.init(data.x.new_zeros(())), data)
