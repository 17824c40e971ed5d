"""What a fit asks of a stream of tasks, which has no end and comes only once."""

from __future__ import annotations

from varmeta.models.check_more import check_more
from varmeta.strategies.check import check_query
from varmeta.strategies.problem import Problem
from varmeta.strategies.prototypes import Prototypes, check_classes
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import Batch, TaskSet
from varmeta.tasks.stream import Streamed


def check_stream(
    stream: Streamed, strategy: Strategy, problem: Problem, ensemble: int | None
) -> TaskSet:
    """Refuse what needs all tasks; have each step's tasks looked at as the first ones were.

    Returns what of the tasks a fit keeps.

    Raises ValueError for a strategy that stores phi, for an ensemble, and for a hyperprior beside a
    stream without an end.
    """
    if strategy.traits(problem).stored:
        raise ValueError(
            f"{type(strategy).__name__} keeps a posterior of every task from step to step, but a "
            "stream's tasks come once: use Implicit, Unrolled, FirstOrder or Reptile, or put the "
            "tasks into a TaskSet"
        )
    if ensemble is not None:
        raise ValueError(
            "ensemble= judges its members on all tasks, and a stream has no 'all': put the tasks "
            "into a TaskSet"
        )
    if stream.total is None and problem.model.has_hyperprior:
        raise ValueError(
            "a hyperprior counts once beside all tasks, and of a stream without an end nobody "
            "knows how many there are: leave it out, or give a Dataset with a length"
        )

    def check(tasks: TaskSet, batch: Batch) -> None:
        check_more(problem.model, tasks, batch)
        if not callable(strategy.outer) and strategy.outer != "elbo":
            check_query(strategy, tasks)
        if isinstance(strategy, Prototypes):
            check_classes(tasks)

    stream.check = check
    return stream.kept
