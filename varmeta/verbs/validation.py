"""What `fit(validate=...)` measures: the validation tasks, adapted and scored as after a fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from varmeta.fitting.ensemble import mixture
from varmeta.fitting.run import Run
from varmeta.fitting.validation import METRICS, Validation, Watch
from varmeta.graphs.process import kept_warnings
from varmeta.likelihoods.base import SCALE
from varmeta.posteriors.scoring import row_of
from varmeta.results.result import Fit, checked, posterior_of
from varmeta.strategies.members import Members
from varmeta.strategies.strategy import Eta, State
from varmeta.tasks import TaskSet
from varmeta.tasks.taskset import no_tasks


def validation_of(given: object) -> Validation:
    """What was passed as `validate`.  Raises TypeError or ValueError for anything else."""
    if isinstance(given, Validation):
        return given
    if isinstance(given, TaskSet):
        return Validation(given)
    raise TypeError(
        "validate takes a TaskSet of held-out tasks, or vm.Validation(tasks, ...), not "
        f"{no_tasks(given)}"
    )


@contextmanager
def watching(validation: Validation, fit: Fit, members: Members | None) -> Iterator[Watch]:
    """A watch on the steps of the fit; what its last look warns of is said at the end.

    members: what steps an ensemble, whose mixture is judged.
    """
    if validation.calibrate:
        _check_scale(fit)
    said: dict[str, None] = {}
    yield Watch(validation, _value(validation, fit, members, said), _calibrated(fit))
    for sentence in said:
        warnings.warn(f"of the validation tasks: {sentence}", RuntimeWarning, stacklevel=4)


def _calibrated(fit: Fit) -> str:
    """The entry of eta that says how sure predictions are."""
    likelihood = fit.model.likelihood
    return (*(likelihood.only_by_query if likelihood is not None else ()), SCALE)[0]


def _check_scale(fit: Fit) -> None:
    if _calibrated(fit) not in fit.eta:
        raise ValueError(
            f"calibrate=True moves a noise scale that is learned, and {fit.model.likelihood!r} has "
            "none: leave it out"
        )
    if fit.strategy.traits(fit.problem).stored:
        raise ValueError(
            "calibrate=True leaves the tasks' stored posteriors behind: use a strategy that finds "
            "them anew, Joint('multivariate_normal') of a last layer or Implicit"
        )


def _value(
    validation: Validation, fit: Fit, members: Members | None, said: dict[str, None]
) -> Callable[[Eta], float]:
    """The metric at an eta; what it warns of is left in `said`.

    Raises ValueError where the tasks do not belong to the model, or are scored by other metrics.
    """

    tasks = checked(fit, validation.tasks)

    def value(eta: Eta) -> float:
        run = Run(eta, State()) if members is None else mixture(eta)
        here = Fit(fit.model, fit.tasks, fit.strategy, fit.seed, run, fit.problem)
        with kept_warnings() as caught:
            posterior = posterior_of(here, tasks)
            query = posterior.q.batch.query
            assert query is not None  # `Validation` asks for it
            row = row_of(posterior.observer, query, validation.num_samples, fit.seed, 0.9)
            found = row(slice(None))
        said.clear()
        said.update((str(one.message), None) for one in caught)
        if validation.metric not in found:
            known = [name for name in METRICS if name in found]
            raise ValueError(
                f"metric={validation.metric!r} does not judge {fit.model.likelihood!r}: use one of "
                f"{known}"
            )
        return found[validation.metric]

    return value
