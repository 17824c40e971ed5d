"""`Fit`, what `fit` returns: the learned prior, how it was found, and what one does with it."""

from __future__ import annotations

import warnings
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varmeta._checks import counted, name_of, one_of
from varmeta.display.drawn import Drawn
from varmeta.display.shown import Shown
from varmeta.files.write import write
from varmeta.fitting import chunks
from varmeta.fitting.adapt import adapt
from varmeta.fitting.compiled_step import COMPILE, Compile
from varmeta.fitting.joint_newton import newton_applies
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.profiled_newton import profiled
from varmeta.fitting.run import Run
from varmeta.guides.quadrature import Quadrature
from varmeta.hyper.integrated_draws import IntegratedDraws
from varmeta.models.check import check_model, ways_left_unsaid
from varmeta.models.ensemble import Ensemble
from varmeta.models.hyper_posterior import HyperPosterior
from varmeta.models.kinks import kinked
from varmeta.models.learned_prior import LearnedPrior
from varmeta.models.model import TaskModel
from varmeta.models.raw_units import raw_prior
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree
from varmeta.posteriors.arviz_groups import Record, groups
from varmeta.posteriors.diagnostics import NO_CLASSES
from varmeta.posteriors.draws import GuideDraws
from varmeta.posteriors.inputs import check_columns
from varmeta.posteriors.posterior import Posterior
from varmeta.results import leave_one_out, standard_errors, summary
from varmeta.results.evidence_gap import cost, is_tight
from varmeta.results.storage import parts_of
from varmeta.strategies.amortised import with_inner_steps
from varmeta.strategies.closed_form import is_evidence
from varmeta.strategies.expectation import Cubature
from varmeta.strategies.inner_rates import RATE, without_rates
from varmeta.strategies.objective import OuterName
from varmeta.strategies.problem import Problem
from varmeta.strategies.prototypes import Prototypes
from varmeta.strategies.strategy import Eta, Strategy
from varmeta.strategies.warnings import diverging
from varmeta.tasks import TaskSet
from varmeta.tasks.fingerprint import AbsentTasks
from varmeta.tasks.scaling import Scaling
from varmeta.tasks.taskset import no_tasks

if TYPE_CHECKING:
    import pandas as pd

# What `adapt` says of a task, where the solver's own words name what nobody can set there.
HOW_IT_ENDED = {
    Result.STEP_LIMIT: "the search for its posterior was still on its way at its last step: use "
    "float64 data, standardise them "
    "(tasks.standardized()), or take another guide",
    Result.STAGNATED: "no step brings its posterior nearer, although it is not reached: use "
    "float64 data, or standardise them "
    "(tasks.standardized())",
    Result.NON_FINITE: "a loss or gradient is not finite on the way, so that what is returned for "
    "it is not its posterior: its "
    "data may lie very far from what the prior expects; look at them, and at their units",
}


class Fit(Drawn, Shown):
    """A learned prior, with the tasks' posteriors and the record of the run.

    Numbers of the objective are nats; weights are in y's units per unit of their column.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks)
    >>> fit
    <Fit: Joint(multivariate_normal, outer=elbo), 9 tasks, converged>
    >>> fit.prior.frame().index.tolist()
    ['intercept', 'x', 'noise scale']
    """

    def __init__(
        self,
        model: TaskModel,
        tasks: TaskSet,
        strategy: Strategy,
        seed: int,
        run: Run,
        problem: Problem | None = None,
        exact: ProfiledEvidence | None = None,
        absent: AbsentTasks | None = None,
    ) -> None:
        self.model = model
        self.tasks = tasks
        self.strategy = strategy
        self.seed = seed
        self.run = run
        self.problem = strategy.problem(model, tasks, seed) if problem is None else problem
        self._exact = exact
        self._absent = absent

    @property
    def _has_tasks(self) -> bool:
        """Whether `tasks` are those that it learned from, and not one of them."""
        return self.run.streamed is None and self._absent is None

    # -- what was learned --------------------------------------------------------------------------

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
        """One row per outer step: step, loss (nats), evaluations, seconds.

        Evaluations are gradients per task so far.  With a torch optimiser there are gradient_norm
        and lr too, the rate of its first parameters with the schedule's factor on it, and with
        validation tasks validation, their metric at the steps at which it was looked at.
        """
        import pandas as pd

        return pd.DataFrame(
            self.run.history,
            columns=None if self.run.history else ["step", "loss", "evaluations", "seconds"],
        )

    @property
    def seconds_compiling(self) -> float:
        """What compiling took of this fit.

        Another of the same shapes pays nothing in this process, and little in the next.
        """
        return self.run.seconds_compiling

    @property
    def loss(self) -> float:
        """The outer objective over all training tasks, in nats, at what was learned.

        `loss_name` says what it is.  Of a stream it is that of the last step's tasks.
        """
        return self.run.loss

    @property
    def loss_name(self) -> str:
        """What the objective is, in words.

        Only a Gaussian guide's elbo is a bound on the negative log evidence, and by cubature only
        where that is exact: where log p(y | theta) is quadratic in theta.
        """
        if self.members is not None:
            return f"{self._objective_name}, mean of {len(self.members)} members"
        if self.hyper is not None:
            integrated = (
                "theta0 and shared parameters" if self.hyper.hyperguide == "reml" else "eta"
            )
            return f"negative ELBO, {integrated} integrated out"
        name = self._objective_name
        return f"{name} - log hyperprior" if self.model.has_hyperprior else name

    @property
    def _fits_targets(self) -> bool:
        """Whether what the weights are fitted to are targets, and what is judged classes."""
        return self.model.predictive is not self.model

    @property
    def _objective_name(self) -> str:
        outer = self.strategy.outer
        if callable(outer):
            return name_of(outer)
        fitted = "the regression of +-1 targets" if outer == "elbo" else "classes fitted as targets"
        return self._name_of(outer) + f", of {fitted}" * self._fits_targets

    def _name_of(self, outer: OuterName) -> str:
        return {
            "elbo": "penalised loss (MAP; no bound)"
            if self.is_point
            else "negative ELBO" + " by cubature" * self._is_cubature_rough
            if not self.problem.guide.at_mode
            else "negative log evidence by quadrature"
            if isinstance(self.problem.guide, Quadrature)
            else "negative log evidence by Laplace's approximation (no bound)",
            "query_elbo": "query loss - log prior (no bound)"
            if self.is_point
            else "KL + query loss",
            "query": "query loss (no bound)" if self.is_point else "query loss",
            "query_predictive": "-log predictive of the query" + " (no bound)" * self.is_point,
        }[outer]

    @cached_property
    def _is_cubature_rough(self) -> bool:
        """Whether E_q log p(y | theta) is taken at points that serve quadratics, and is not known
        to be one.
        """
        return isinstance(self.problem.expectation, Cubature) and not self.model.is_linear_gaussian

    @property
    def hyper(self) -> HyperPosterior | None:
        """The posterior of eta, where `fit` was given a hyperguide.

        `eta` is then its mean in nearly Gaussian coordinates.
        """
        return self.run.hyper if isinstance(self.run.hyper, HyperPosterior) else None

    @property
    def members(self) -> Ensemble | None:
        """The members of an ensemble, where `fit` was given one; `eta` is then the best one's."""
        return self.run.hyper if isinstance(self.run.hyper, Ensemble) else None

    def hyperparameters(self, level: float = 0.9) -> pd.DataFrame:
        """The posterior of theta0, of the prior's sds and correlations and of the noise scale.

        Columns: mean, sd, median and the ends of the central interval of probability `level`.
        Raises ValueError where eta is a point (`hyperguide="delta"`), and for a level that is not
        between 0 and 1.
        """
        if self.hyper is None:
            raise ValueError(
                "eta is a point here, or several: fit with hyperguide='multivariate_normal' for "
                "its posterior"
            )
        return self.hyper.frame(self.model, self.tasks.x_names, level)

    @cached_property
    def _profiled(self) -> ProfiledEvidence | None:
        if self._exact is None and self.run.hyper is None and self._has_tasks:
            return profiled(self.strategy, self.problem, self.tasks, self.eta)
        return self._exact

    @cached_property
    def standard_errors(self) -> dict[str, Tensor] | None:
        """Standard errors of theta0 and the shared parameters by name, as lme4's.

        Given the variances.  Under a posterior of eta its standard deviations.  None where there
        are none: points, networks, noisy or unfinished fits, streams.

        In the parameter's shape, `(*shape,)`, and its units.
        """
        names = [
            name for name in self.model.start if name in self.eta
        ]  # theta0 that is held fixed has none
        if self.members is not None or not self._has_tasks:
            return None
        if self.hyper is not None:
            return standard_errors.of_hyper(self.hyper, self.eta, names)
        if self.strategy.outer != "elbo" or not self.converged or self.is_point:
            return None
        if self._profiled is not None:
            return standard_errors.in_closed_form(self._profiled, self.eta)
        batch, phi = self.tasks.batch(), self.run.state.phi
        if isinstance(self.problem.guide, Quadrature):
            q = self.posterior().q
            assert isinstance(q, GuideDraws)
            return standard_errors.of_evidence(self.problem, batch, q.phi, self.eta, names)
        if not newton_applies(self.strategy, self.problem, batch, self.eta):
            return None
        if phi is None:  # in closed form, but not profiled; of a network they would say little
            if not self.model.all_linear or not is_evidence(self.problem, self.strategy.outer):
                return None
            return standard_errors.of_known_evidence(self.problem, batch, self.eta, names)
        return standard_errors.of_bound(self.problem, batch, phi, self.eta, names)

    @property
    def log_likelihood(self) -> float | None:
        """log p(y) at the estimates, the weights integrated out, where exact; else None.

        Under "reml" theta0 is integrated out too.  It is exact for a model that is linear by
        construction, with Gaussian noise, under a guide that can be the tasks' posteriors, in a fit
        that has converged to them.
        """
        if self._fits_targets or not self._has_tasks:
            return None
        kind = "delta" if self.run.hyper is None else self.run.hyper.hyperguide
        if not self.converged or self.model.has_hyperprior or kind not in ("delta", "reml"):
            return None
        return -self.loss if self._is_tight else None

    @cached_property
    def _guide_cost(self) -> str | None:
        """What is lost by a guide that cannot be the tasks' posteriors, in words.

        None where it is little or not known.
        """
        known = (
            self.converged
            and not self.is_point
            and self.run.hyper is None
            and self.strategy.outer == "elbo"
            and not self._fits_targets
            and self._has_tasks
        )
        if not known or self._can_be_exact:
            return None
        return cost(self.model, self.tasks.batch(), self.eta, self.loss)

    @property
    def _can_be_exact(self) -> bool:
        return self.problem.guide.is_any_gaussian(self.model.weights.size)

    @cached_property
    def _is_tight(self) -> bool:
        if not self._can_be_exact:
            return False
        if (
            self.run.hyper is not None
        ):  # under "reml" the objective has theta0 integrated out too, and is no function of eta
            return self.model.is_linear_gaussian
        if self.strategy.traits(self.problem).closed_form:  # it is the evidence that was taken
            return self.strategy.outer == "elbo"
        return self.strategy.outer == "elbo" and is_tight(
            self.model, self.tasks.batch(), self.eta, self.loss
        )

    @cached_property
    def is_point(self) -> bool:
        """Whether the tasks' posteriors are points (a delta guide, also one of the user's own)."""
        return self.problem.is_point(self.tasks, self.eta)

    @cached_property
    def prior(self) -> LearnedPrior:
        return LearnedPrior.of(self.model, self.eta, self.tasks.x_names)

    def raw_prior(self, scaling: Scaling) -> LearnedPrior:
        """The prior in the units that the tasks had before `scaling`: see `Scaling.raw_prior`."""
        return raw_prior(scaling, self.model, self.eta, self.prior)

    # -- posteriors --------------------------------------------------------------------------------

    def posterior(self) -> Posterior:
        """The posteriors of the training tasks.

        Those stored, or found anew where the strategy stores none (or, as `Reinit` within a period,
        was interrupted on the way to them).  Raises ValueError where the tasks are not kept: after
        a stream, and of a fit that was saved without data.
        """
        self._need_tasks()
        state = self.run.state
        if self.run.hyper is not None:
            return self._integrated
        traits = self.strategy.traits(self.problem)
        if state.phi is None or not traits.stored or not (self.converged or traits.settled(state)):
            return self._adapted(
                self.tasks, self.strategy, "auto", None
            )  # checked when they were fitted
        self.problem.start(
            self.tasks.batch(), self.eta
        )  # a user's guide makes its module for this many tasks
        return self._by_guide(state.phi, self.tasks)

    def adapt(
        self,
        tasks: TaskSet,
        *,
        inner_steps: int | None = None,
        compile: Compile = "auto",
        task_chunk_size: int | None = None,
    ) -> Posterior:
        """The posteriors of new tasks: training's inner problem, on their support data.

        inner_steps: how many inner steps are taken, of a strategy that takes a fixed number; None:
            as many as in training.  Learned rates of single steps stay what they are, and steps
            beyond those of the training take the last one's.
        compile: as in `varmeta.fit`; "auto" where there are so many tasks that one adaptation is
            worth it.
        task_chunk_size: how many tasks are worked on at a time; None: as many as fit into about a
            gigabyte.

        A task without support data gets the prior, or what of the guide's family is nearest to it:
        a delta guide stays at theta0, and a mean-field guide cannot follow the correlations of a
        dense prior.  Under a posterior of eta they are averages over its draws, which the new
        tasks' data do not change.

        Raises TypeError or ValueError for tasks that do not fit the model, or whose columns have
        another number or other names than those of the training tasks, ValueError for inner_steps
        of a strategy that adapts by none or to tolerance. Warns where the inner problem of a task
        was not solved.
        """
        strategy = self.strategy
        if inner_steps is not None:
            strategy = with_inner_steps(strategy, inner_steps)
        one_of("compile", compile, COMPILE)
        chunks.check(task_chunk_size, self.problem)
        tasks = self._checked(tasks)
        if self.run.hyper is not None:
            return self._integrate(tasks)
        return self._adapted(tasks, strategy, compile, task_chunk_size)

    def _need_tasks(self) -> None:
        if not self._has_tasks:
            why = (
                "this fit was saved without its tasks"
                if self._absent is not None
                else "the tasks that this fit learned from came as a stream and are not kept"
            )
            raise ValueError(f"{why}: give tasks to fit.adapt(...)")

    def _checked(self, tasks: TaskSet) -> TaskSet:
        """On the dtype and device of the training tasks; raises where they are of another kind."""
        if not isinstance(tasks, TaskSet):
            raise TypeError(f"adapt takes a TaskSet, not {no_tasks(tasks)}")
        tasks = tasks.to(dtype=self.tasks.dtype, device=self.tasks.device)
        check_columns(tasks, self.tasks)
        check_model(self.model, tasks)
        has_own = isinstance(self.strategy, Prototypes)  # classes without rows have probability 0
        sentence = None if has_own else ways_left_unsaid(self.model, tasks)
        if sentence is not None:
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)
        return tasks

    def _adapted(
        self, tasks: TaskSet, strategy: Strategy, compile: Compile, task_chunk_size: int | None
    ) -> Posterior:
        batch, traits = tasks.batch(), strategy.traits(self.problem)
        solution = adapt(strategy, self.problem, batch, self.eta, compile, task_chunk_size)
        # a fixed number of steps ends at that number, by choice; everybody else goes to tolerance
        fixed = getattr(strategy, "inner_steps", None) is not None or traits.noisy
        if not (fixed or traits.closed_form):
            fixed = kinked(self.model, batch, self.eta) is not None  # by Adam's steps
        if solution.worst > (Result.STEP_LIMIT if fixed else Result.CONVERGED):
            bad = [
                name
                for name, code in zip(batch.names, solution.result.tolist(), strict=True)
                if code == solution.worst
            ]
            why = HOW_IT_ENDED.get(solution.worst, solution.worst.sentence)
            if solution.worst == Result.DIVERGED and traits.minimizer is not None:
                why = f"the inner steps raise its loss: {diverging(batch, traits.minimizer)}"
            warnings.warn(
                f"adaptation did not end well for {len(bad)} of {len(tasks)} tasks, {bad[0]!r} "
                f"first: {why}",
                RuntimeWarning,
                stacklevel=3,
            )
        doubt = self.problem.guide.doubt(solution.value, self.eta, batch.support, batch.names)
        if doubt is not None:
            warnings.warn(doubt, RuntimeWarning, stacklevel=3)
        return self._by_guide(solution.value, tasks, solution.stats.get("evaluations"))

    def _by_guide(self, phi: Tree, tasks: TaskSet, evaluations: Tensor | None = None) -> Posterior:
        eta = self.eta
        if any(name.startswith(RATE) for name in eta):
            eta = without_rates(self.strategy, self.model, eta)
        q = GuideDraws(self.problem, phi, eta, tasks.batch())
        return Posterior(q, tasks, self.tasks, evaluations)

    def _integrate(self, tasks: TaskSet) -> Posterior:
        assert self.run.hyper is not None
        q = IntegratedDraws(
            self.model, self.problem.guide.name, self.run.hyper, self.eta, tasks.batch()
        )
        bad = [
            name for name, good in zip(tasks.names, q.converged.tolist(), strict=True) if not good
        ]
        if bad:
            warnings.warn(
                f"the mode of {len(bad)} of {len(tasks)} tasks was not found for every draw of "
                f"eta, {bad[0]!r} first: give the prior's sds a scale_hyperprior",
                RuntimeWarning,
                stacklevel=3,
            )
        return Posterior(q, tasks, self.tasks)

    @cached_property
    def _integrated(self) -> Posterior:
        return self._integrate(self.tasks)

    def leave_one_task_out(
        self, num_samples: int = 1000, num_particles: int = 1000, seed: int = 0
    ) -> pd.DataFrame:
        """log p(y_i | the other tasks' data) of every training task, in nats.

        By importance weights; of regressions by refits too.

        One row per task, and "all", their sum, which compares priors and models on the same tasks
        (larger is better).
        Columns: log_evidence, log p(y_i | eta) at the fit, which has seen the task; left_out, with
        the uncertainty of eta integrated out; refitted, log p(y_i | eta) at the eta that a fit to
        the other tasks finds; k_hat and reading of the weights that make left_out, as in
        `Posterior.diagnose`: where the reading is "unreliable" or worse, refit without that task.
        refitted is there for regressions (`nn.Linear`, `LinearPredictor` under
        `likelihoods.Gaussian`) whose fit maximises the evidence itself, as with
        Joint("multivariate_normal").  It is NaN, with a warning, of tasks without which the others
        have no maximum.  In a singular fit (an sd of 0, a correlation of 1) a flat hyperprior has
        no posterior: left_out is NaN, with a warning, and refitted is what it should be.
        num_samples: draws of the prior's numbers, from a t at the maximum of the evidence under a
            flat hyperprior (or the model's); num_particles: draws of each task's guide, where its
            evidence is not known in closed form.

        Raises ValueError for a delta guide, fewer than three tasks, a prior of more than 100
        numbers, a low-rank prior with more directions than are told apart, and where the evidence
        has no maximum and there are no refits.
        """
        self._need_tasks()
        if self.members is not None:
            raise ValueError("an ensemble has no one eta to leave a task out of: fit one member")
        if self._fits_targets:
            raise ValueError(NO_CLASSES)
        if self.hyper is not None:
            raise ValueError(
                f"this fit has integrated over eta (hyperguide={self.hyper.hyperguide!r}), which "
                "leaving a task out does by itself: give it a fit with hyperguide='delta'"
            )
        leave_one_out.check(self.eta, len(self.tasks), num_samples, num_particles)
        leave_one_out.check_factor(self.model)
        observer = self.posterior().observer
        return leave_one_out.leave_one_task_out(
            observer, num_samples, num_particles, seed, self._profiled
        )

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """The training tasks' posteriors, the learned prior and the run's record, for ArviZ.

        ArviZ 0.23 or 1.x.
        """
        table = self.history
        steps = table["step"].to_numpy(dtype=int)
        history = {
            str(name): table[name].to_numpy(dtype=float) for name in table.columns if name != "step"
        }
        facts = {
            "objective": self.loss_name,
            "loss": self.loss,
            "converged": str(self.converged),
            "stop": self.stop,
            "seed": self.seed,
            "config": {"strategy": repr(self.strategy), "model": repr(self.model)},
        }
        found = self.posterior()
        names = {"task": list(found.names), "weight": list(found.labels)}
        record = Record(steps, history, facts)
        return groups(found.observer, names, num_samples, seed, self.tasks.x_names, record)

    def save(self, path: str | PathLike[str], *, data: bool = True) -> None:
        """Write the fit as tensors and plain values (no pickled code).

        `varmeta.load(path, model)` reads it.

        data: whether the file holds the tasks and their stored posteriors.  Without them it is as
            small as what was learned: a fit that is read from it adapts to new tasks, and `fit(...,
            resume=it)` goes on with the same tasks unless the strategy stores posteriors; what is
            of the training tasks themselves, as `posterior()`, it refuses.

        Either file knows how the tasks were standardised, `fit.tasks.scaling`.

        It is written beside the old file and takes its place at the end, so that a save which
        fails, is interrupted or is killed leaves the old one.

        Raises TypeError for another `data`, and where the run holds what is neither a tensor nor a
        plain value (an optimizer of the user's own might); ValueError where there is no such
        folder; OSError with the path where the system refuses.
        """
        if not isinstance(data, bool):
            raise TypeError(f"data must be True or False, not {data!r}")
        absent = self._absent
        if not data and self._has_tasks:
            absent = AbsentTasks.of(self.tasks)
        what = self.model, self.tasks, self.strategy, self.seed, self.run, self.prior
        try:
            parts = parts_of(*what, absent, data)
        except TypeError as error:
            raise TypeError(f"{fspath(path)!r} was not written: {error}") from error
        write(path, parts)

    # -- print -------------------------------------------------------------------------------------

    def _headline(self) -> str:
        points = counted(len(self.tasks.support_rows.x), "support observation")
        return "\n".join(
            [
                self._method + (f", {points}" if self._has_tasks else ""),
                self._evidence_in_words,
                summary.ending(self.stop, self.converged, self.seconds_compiling),
            ]
        )

    def _table(self) -> pd.DataFrame:
        if self.hyper is not None and self.hyper.hyperguide != "reml":
            return self.hyperparameters()
        return self.prior._table(None if self.members is not None else self.standard_errors)

    def __str__(self) -> str:
        lines, hyper = [self._headline()], self.run.hyper
        if isinstance(hyper, Ensemble):
            lines += ["", f"the prior of the best of {len(hyper)} members:", self.prior.table(None)]
        elif hyper is None or hyper.hyperguide == "reml":
            # quadrature has standard errors once it has converged
            by_laplace = self.problem.guide.at_mode and not isinstance(
                self.problem.guide, Quadrature
            )
            lines += [
                "",
                self.prior.table(self.standard_errors),
                *([summary.NO_ERRORS] if by_laplace else []),
                *summary.inner_rates(self.strategy, self.model, self.eta),
            ]
        else:
            level = 0.9
            table = summary.hyperparameters(self.hyperparameters(level), level)
            lines += [summary.importance(hyper), "", table]
        return "\n".join(lines)

    @property
    def _evidence_in_words(self) -> str:
        """The objective, and what it is worth as a log likelihood."""
        if not self.run.history:
            return "not run"
        # what a function of the user's own measures is not known
        unit = "" if callable(self.strategy.outer) else " nats"
        line = f"{self.loss_name}: {self.loss:.4f}{unit}"
        if self.hyper is not None and self.hyper.hyperguide != "reml":
            of = " of the targets" * self._fits_targets
            evidence = f"log evidence{of} by importance weights"
            return f"{line}; {evidence}: {self.hyper.log_evidence:.4f}"
        if self.log_likelihood is None:
            return "\n".join(filter(None, (line, self._guide_cost)))
        return (
            f"{line}, so the {'REML ' if self.run.hyper else ''}log likelihood is "
            f"{self.log_likelihood:.4f}"
        )

    def __repr__(self) -> str:
        end = "converged" if self.converged else "not converged"
        return f"<Fit: {self._method}, {end}>"

    @property
    def _method(self) -> str:
        seen, absent = self.run.streamed, self._absent
        number = len(self.tasks) if absent is None else absent.number
        tasks = counted(number, "task") if seen is None else f"{seen:,} tasks of a stream"
        return f"{summary.method(self.strategy, self.is_point)}, {tasks}"


def absent_tasks_of(fit: Fit) -> AbsentTasks | None:
    """What is known of a set of tasks that the file of this fit did not hold."""
    return fit._absent


def training_tasks(fit: Fit) -> TaskSet:
    """The tasks that it learned from.  Raises ValueError where they are not kept."""
    fit._need_tasks()
    return fit.tasks


def checked(fit: Fit, tasks: TaskSet) -> TaskSet:
    """The tasks as `posterior_of` takes them.  Raises as `Fit.adapt`."""
    return fit._checked(tasks)


def posterior_of(fit: Fit, tasks: TaskSet) -> Posterior:
    """`Fit.adapt` of tasks that are `checked`, for who adapts to the same ones again and again."""
    if fit.run.hyper is not None:
        return fit._integrate(tasks)
    return fit._adapted(tasks, fit.strategy, "auto", None)


def profiled_of(fit: Fit) -> ProfiledEvidence | None:
    """The evidence of the fit's regression in closed form; None elsewhere."""
    return fit._profiled
