"""What `fit` returns: the learned prior, how it was found, and what one does with it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

from varmeta import summary
from varmeta._points import check_columns
from varmeta.bayes.model import TaskModel
from varmeta.learned_prior import LearnedPrior
from varmeta.numerics.solution import Result
from varmeta.posterior import Posterior
from varmeta.problem import Problem
from varmeta.run import Run
from varmeta.strategy import Eta, Strategy
from varmeta.tasks import TaskSet, no_tasks

if TYPE_CHECKING:
    import pandas as pd


class Fit:
    """A learned prior, with the tasks' posteriors and the record of the run."""

    def __init__(self, model: TaskModel, tasks: TaskSet, strategy: Strategy, seed: int, run: Run) -> None:
        self.model = model
        self.tasks = tasks
        self.strategy = strategy
        self.seed = seed
        self.run = run

    # -- what was learned ----------------------------------------------------------------------------------------------

    @property
    def eta(self) -> Eta:
        """Everything shared, by name, on the scale on which it is learned."""
        return self.run.eta

    @property
    def converged(self) -> bool:
        return self.run.converged

    @property
    def stop(self) -> str:
        """Why the run ended, in a sentence."""
        return self.run.stop

    @property
    def history(self) -> pd.DataFrame:
        """One row per outer step: step, loss (nats), evaluations (gradients per task so far), seconds; with a torch
        optimiser gradient_norm too."""
        import pandas as pd

        return pd.DataFrame(
            self.run.history, columns=None if self.run.history else ["step", "loss", "evaluations", "seconds"]
        )

    @property
    def loss(self) -> float:
        """The outer objective over all training tasks, in nats, at what was learned; `loss_name` says what it is."""
        return self.run.loss

    @property
    def loss_name(self) -> str:
        """Only a Gaussian guide's elbo is a bound on the negative log evidence."""
        name = {
            "elbo": "penalised loss (MAP; no bound)"
            if self.is_point
            else "negative ELBO"
            if not self.problem.guide.at_mode
            else "negative log evidence by Laplace's approximation (no bound)",
            "query_elbo": "query loss - log prior (no bound)" if self.is_point else "KL + query loss",
            "query": "query loss (no bound)" if self.is_point else "query loss",
            "query_predictive": "-log predictive of the query" + " (no bound)" * self.is_point,
        }[self.strategy.outer]
        return name if self.model.prior.hyperprior is None else f"{name} - log hyperprior"

    @cached_property
    def is_point(self) -> bool:
        """Whether the tasks' posteriors are points (a delta guide, also one of the user's own)."""
        return self.problem.is_point(self.tasks[:1].batch(), self.eta)

    @cached_property
    def prior(self) -> LearnedPrior:
        return LearnedPrior.of(self.model, self.eta, self.tasks.x_names)

    @cached_property
    def problem(self) -> Problem:
        return self.strategy.problem(self.model, self.tasks, self.seed)

    # -- posteriors ------------------------------------------------------------------------------------------------------

    def posterior(self) -> Posterior:
        """The posteriors of the training tasks: those stored, or found anew where the strategy stores none (or, as `Reinit`
        within a period, was interrupted on the way to them)."""
        state = self.run.state
        if state.phi is None or self.strategy.adapts_afresh or not (self.converged or self.strategy.settled(state)):
            return self.adapt(self.tasks)
        self.problem.start(self.tasks.batch(), self.eta)  # a user's guide makes its module for this many tasks
        return Posterior(self.problem, state.phi, self.eta, self.tasks, self.tasks)

    def adapt(self, tasks: TaskSet) -> Posterior:
        """The posteriors of new tasks: the same inner problem as in training, on their support data.

        A task without support data gets the prior, or what of the guide's family is nearest to it: a delta guide stays at
        theta0, and a mean-field guide cannot follow the correlations of a dense prior.

        Raises TypeError or ValueError for tasks that do not fit the model, or whose columns have another number or other names
        than those of the training tasks.
        Warns where the inner problem of a task was not solved.
        """
        if not isinstance(tasks, TaskSet):
            raise TypeError(f"adapt takes a TaskSet, not {no_tasks(tasks)}")
        example = self.tasks.batch().support
        tasks = tasks.to(dtype=example.x.dtype, device=example.x.device)
        check_columns(tasks, self.tasks)
        batch = tasks.batch()
        self.model.check(tasks)
        solution = self.strategy.adapt(self.problem, batch, self.eta)
        # a fixed number of steps ends at that number, by choice; everybody else goes to tolerance
        fixed = getattr(self.strategy, "inner_steps", None) is not None or self.strategy.is_noisy(self.problem)
        if solution.worst > (Result.STEP_LIMIT if fixed else Result.CONVERGED):
            bad = [
                name for name, code in zip(batch.names, solution.result.tolist(), strict=True) if code == solution.worst
            ]
            warnings.warn(
                f"adaptation did not end well for {len(bad)} of {len(tasks)} tasks, {bad[0]!r} first: "
                f"{solution.worst.sentence}",
                RuntimeWarning,
                stacklevel=2,
            )
        doubt = self.problem.guide.doubt(solution.value, self.eta, batch.support, batch.names)
        if doubt is not None:
            warnings.warn(doubt, RuntimeWarning, stacklevel=2)
        return Posterior(self.problem, solution.value, self.eta, tasks, self.tasks)

    def leave_one_task_out(self, num_samples: int = 1000, num_particles: int = 1000, seed: int = 0) -> pd.DataFrame:
        """log p(y_i | the other tasks' data) of every training task, by importance weights instead of refits; in nats.

        One row per task, and "all", their sum, which compares priors and models on the same tasks (larger is better).
        Columns: log_evidence, log p(y_i | eta) at the fit, which has seen the task; left_out; k_hat and reading of the weights
        that leave it out, as in `Posterior.diagnose`: where the reading is "unreliable" or worse, refit without that task.
        num_samples: draws of the prior's numbers, from a t at the maximum of the evidence under a flat hyperprior (or the
            model's); num_particles: draws of each task's guide.

        Raises ValueError for a delta guide, fewer than three tasks, a prior of more than 100 numbers, and where the evidence has
        no maximum.
        """
        from varmeta.left_out import leave_one_task_out

        return leave_one_task_out(self, num_samples, num_particles, seed)

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """The training tasks' posteriors, the learned prior and the record of the run, for ArviZ 0.23 or 1.x."""
        from varmeta.export import fit_groups

        return fit_groups(self, num_samples, seed)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the fit as tensors and plain values (no pickled code); `varmeta.load(path, model)` reads it."""
        from varmeta.storage import save

        save(self, path)

    # -- going on --------------------------------------------------------------------------------------------------------

    def run_to_resume(self, model: TaskModel, tasks: TaskSet, strategy: Strategy, seed: int) -> Run:
        """A copy of the run to go on from.  Raises ValueError where model, tasks, strategy or seed differ."""
        if seed != self.seed:
            raise ValueError(
                f"resume was run with seed={self.seed}: give fit the same, or its noise and batches would change"
            )
        start = model.init(tasks.batch().support.x.new_zeros(()))
        if {name: value.shape for name, value in start.items()} != {n: v.shape for n, v in self.eta.items()}:
            raise ValueError(f"resume is a fit of another model: it has {sorted(self.eta)}, this model {sorted(start)}")
        other = self.tasks.first_difference(tasks)
        if other is not None:
            raise ValueError(f"resume is a fit of other tasks ({other}): give the same data in the same order")
        if strategy != self.strategy:
            raise ValueError(f"resume is a fit by {_unlike(self.strategy, strategy)}: give fit the same strategy")
        return copy.deepcopy(self.run)

    # -- print -----------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return summary.long(self)

    def __repr__(self) -> str:
        return summary.short(self)


def _unlike(one: Strategy, other: Strategy) -> str:
    """`one, not other`, in as few words as tell them apart."""
    if type(one) is not type(other):
        return f"{type(one).__name__}, not {type(other).__name__}"
    names = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)]
    mine, its = (", ".join(f"{name}={getattr(s, name)!r}" for name in names) for s in (one, other))
    return f"{type(one).__name__}({mine}), not {type(other).__name__}({its})"
