"""Many small data sets: checked, stored, padded, scaled; no Pyro."""

from varmeta.tasks.batch import Batch, Data
from varmeta.tasks.taskset import Task, TaskSet

__all__ = ["Batch", "Data", "Task", "TaskSet"]
