"""What `fit` returns: the learned prior, how it was found, and what one does with it."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta.bayes.model import TaskModel
from varmeta.numerics.solution import Result
from varmeta.posterior import Posterior
from varmeta.problem import Problem
from varmeta.run import Run
from varmeta.strategy import Eta, Strategy
from varmeta.tasks import TaskSet

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LearnedPrior:
    """N(theta0, Lambda^-1) as learned.

    loc, precision, sd: by parameter name, in the parameter's shape; precision is 1 / variance of each weight.
    covariance: `(D, D)` in the order of `labels`.
    shared: parameters that are the same for all tasks, by name.  scale: the noise scale, where it is learned.
    """

    loc: dict[str, Tensor]
    precision: dict[str, Tensor]
    sd: dict[str, Tensor]
    covariance: Tensor
    labels: tuple[str, ...]
    shared: dict[str, Tensor]
    scale: Tensor | None

    @property
    def correlation(self) -> Tensor:
        sd = self.covariance.diagonal().sqrt()
        return self.covariance / torch.outer(sd, sd)


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
            "elbo": "penalised loss (MAP; no bound)" if self.is_point else "negative ELBO",
            "query_elbo": "query loss - log prior (no bound)" if self.is_point else "KL + query loss",
            "query": "query loss",
            "query_predictive": "-log predictive of the query",
        }[self.strategy.outer]
        return name if self.model.prior.hyperprior is None else f"{name} - log hyperprior"

    @cached_property
    def is_point(self) -> bool:
        """Whether the tasks' posteriors are points (a delta guide, also one of the user's own)."""
        return self.problem.is_point(self.tasks[:1].batch(), self.eta)

    @cached_property
    def prior(self) -> LearnedPrior:
        weights = self.model.weights
        with torch.no_grad():
            distribution = self.model.prior_distribution(self.eta)
            spread = distribution.stddev
            dense = self.model.prior.dense
            covariance = distribution.covariance_matrix if dense else torch.diag(spread.square())
            scale = self.eta["log_scale"].exp() if "log_scale" in self.eta else None
            return LearnedPrior(
                weights.unflatten(distribution.mean),
                weights.unflatten(spread**-2),
                weights.unflatten(spread),
                covariance,
                weights.labels,
                {name: self.eta[name] for name in self.model.shared},
                scale,
            )

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
        return Posterior(self.problem, state.phi, self.eta, self.tasks)

    def adapt(self, tasks: TaskSet) -> Posterior:
        """The posteriors of new tasks: the same inner problem as in training, on their support data.

        A task without support data gets the prior, or what of the guide's family is nearest to it: a delta guide stays at
        theta0, and a mean-field guide cannot follow the correlations of a dense prior.

        Raises TypeError or ValueError for tasks that do not fit the model or have other columns than the training tasks.
        Warns where the inner problem of a task was not solved.
        """
        if not isinstance(tasks, TaskSet):
            raise TypeError(f"adapt takes a TaskSet, not {type(tasks).__name__}: vm.TaskSet([vm.Task(support=(x, y))])")
        example = self.tasks.batch().support
        tasks = tasks.to(dtype=example.x.dtype, device=example.x.device)
        batch = tasks.batch()
        # tasks without any data do not know their columns
        if bool(batch.support.mask.any()) and batch.support.x.shape[2:] != example.x.shape[2:]:
            raise ValueError(
                f"a row of these tasks' x has shape {tuple(batch.support.x.shape[2:])}, but {tuple(example.x.shape[2:])} in "
                "the training tasks: give the same columns; (n,) and (n, 1) differ, see reshape"
            )
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
        return Posterior(self.problem, solution.value, self.eta, tasks)

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

    # -- print ------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        points = int(self.tasks.batch().support.mask.sum())
        lines = [
            f"{self._describe()}, {len(self.tasks)} tasks, {points} support observations",
            f"{self.loss_name}: {self.loss:.4f} nats" if self.run.history else "not run",
            f"{'converged' if self.converged else 'not converged'}: {self.stop}",
            "",
        ]
        return "\n".join(lines + self._table())

    def _table(self, limit: int = 40) -> list[str]:
        prior = self.prior
        labels, loc = prior.labels, self.model.weights.flatten(prior.loc)
        sd = prior.covariance.diagonal().sqrt()
        width = max(len(label) for label in (*labels[:limit], *prior.shared, "noise scale"))
        rows = [f"{'weight':<{width}} {'theta0':>12} {'prior sd':>12}"]
        for label, mean, spread in list(zip(labels, loc.tolist(), sd.tolist(), strict=True))[:limit]:
            rows.append(f"{label:<{width}} {mean:>12.5g} {spread:>12.5g}")
        if len(labels) > limit:
            rows.append(f"... and {len(labels) - limit} weights more")
        for name, value in prior.shared.items():
            text = f"{float(value):>12.5g}" if value.numel() == 1 else f"{'tensor ' + str(tuple(value.shape)):>12}"
            rows.append(f"{name:<{width}} {text} {'shared':>12}")
        if prior.scale is not None:
            rows.append(f"{'noise scale':<{width}} {'':>12} {float(prior.scale):>12.5g}")
        if self.model.prior.dense and 1 < len(labels) <= 10:
            rows.append("correlations of the prior")
            for label, row in zip(labels, prior.correlation.tolist(), strict=True):
                rows.append(f"{label:<{width}} " + " ".join(f"{value:>6.3f}" for value in row))
        return rows

    def _describe(self) -> str:
        # a point has no evidence lower bound, whatever the option is called
        text = self.strategy.describe()
        return (
            text.replace("query_elbo", "query loss + prior").replace("elbo", "loss + prior") if self.is_point else text
        )

    def __repr__(self) -> str:
        return (
            f"<Fit: {self._describe()}, {len(self.tasks)} tasks, {'converged' if self.converged else 'not converged'}>"
        )


def _unlike(one: Strategy, other: Strategy) -> str:
    """`one, not other`, in as few words as tell them apart."""
    if type(one) is not type(other):
        return f"{type(one).__name__}, not {type(other).__name__}"
    names = [f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(other, f.name)]
    mine, its = (", ".join(f"{name}={getattr(s, name)!r}" for name in names) for s in (one, other))
    return f"{type(one).__name__}({mine}), not {type(other).__name__}({its})"
