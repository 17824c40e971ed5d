"""The posteriors of a set of tasks: draw from them, predict with them, score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta import _slices
from varmeta._numbers import probability, whole_number
from varmeta._points import points, scored
from varmeta._words import counted
from varmeta.bayes.check_rows import check_padding
from varmeta.bayes.divergence import location, move, moved_by
from varmeta.bayes.program import observed_log_prob
from varmeta.bayes.validation import validation_enabled
from varmeta.diagnostics import diagnose, evidence
from varmeta.labels import parameter_labels
from varmeta.numerics import noise
from varmeta.numerics.tree import Tree, take
from varmeta.observation_noise import TaskNoise
from varmeta.observations import (
    Evaluated,
    class_probabilities,
    known_mean,
    mean_of,
    observed_site,
    quiet_scope,
    samples_more,
)
from varmeta.prediction import Prediction
from varmeta.problem import Problem
from varmeta.scoring import normal_predictive, row_of
from varmeta.tasks import Data, TaskSet

if TYPE_CHECKING:
    import pandas as pd

# Draws are a stream of their own, away from those of training (which counts its steps from 0).
DRAWS = 2**40


class Posterior:
    """q(theta; phi_i) for every task of `tasks`, as found by `Fit.posterior` or `Fit.adapt`; `trained` are the training tasks."""

    def __init__(
        self, problem: Problem, phi: Tree, eta: Mapping[str, Tensor], tasks: TaskSet, trained: TaskSet
    ) -> None:
        self.problem = problem
        self.model = problem.model
        self.phi = phi
        self.eta = dict(eta)
        self.tasks = tasks
        self.trained = trained
        self._batch = tasks.batch()

    @property
    def names(self) -> tuple[str, ...]:
        return self._batch.names

    @property
    def labels(self) -> tuple[str, ...]:
        """A readable name for each of the D weights, as in `Fit.prior.labels`."""
        named = parameter_labels(self.model, self.trained.x_names)
        return tuple(label for name in self.model.weights.names for label in named[name])

    def take(self, names: Sequence[str]) -> Posterior:
        """The same for some of the tasks.  Raises KeyError for a task that there is not."""
        at = self.positions(names)
        return Posterior(self.problem, take(self.phi, at), self.eta, self.tasks[at], self.trained)

    def positions(self, names: Sequence[str]) -> Tensor:
        """Where these tasks stand, int64 `(len(names),)`.  Raises KeyError for a task that there is not."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise KeyError(f"no task is called {unknown[0]!r}; the first names are {list(self.names[:5])}")
        return torch.tensor([self.names.index(name) for name in names], device=self._batch.rows.device)

    @property
    def support(self) -> Data:
        """The data that the tasks were adapted to, padded."""
        return self._batch.support

    @property
    def distribution(self) -> dist.TorchDistribution:
        """q of every task: batch shape `(tasks, 1)`, event shape `(D,)`, in the order of `labels`."""
        with torch.no_grad():
            q = self.problem.guide.distribution(self.phi, self.eta, self._batch.support)
            return moved_by(q, self.offset(self.eta))

    def offset(self, eta: Mapping[str, Tensor]) -> Tensor | None:
        """What the tasks' features add to their weights under eta, `(tasks, 1, D)`; None where they add nothing."""
        by = self.model.offset(eta, self._batch.support)
        return None if by is None else by.unsqueeze(-2)

    @property
    def prior(self) -> dist.TorchDistribution:
        """p(theta_i | eta): event shape `(D,)`; batch shape `(tasks, 1)` where the tasks' features move it, else `()`."""
        return moved_by(self.model.prior_distribution(self.eta), self.offset(self.eta))

    def centres(self, num_samples: int) -> Tensor:
        """The prior's location for each of as many draws, `(num_samples or 1, tasks or 1, D)`."""
        return location(self.prior).reshape(1, -1, self.model.weights.size)

    @property
    def is_point(self) -> bool:
        """Whether q is a point (a delta guide) instead of a distribution."""
        return isinstance(self.distribution, dist.Delta)

    @property
    def mean(self) -> dict[str, Tensor]:
        """Posterior mean by parameter name, `(tasks, *shape)`."""
        return self.model.weights.unflatten(location(self.distribution).squeeze(-2))

    @property
    def sd(self) -> dict[str, Tensor]:
        """Posterior standard deviation by parameter name, `(tasks, *shape)`; zero for a delta guide."""
        q = self.distribution
        spread = torch.zeros_like(q.mean) if isinstance(q, dist.Delta) else q.stddev
        return self.model.weights.unflatten(spread.squeeze(-2))

    def sample(self, num_samples: int = 1000, seed: int = 0) -> dict[str, Tensor]:
        """Draws of the weights by parameter name, `(num_samples, tasks, *shape)`; a task's draws do not depend on the others."""
        return self.model.weights.unflatten(self.draws(num_samples, seed))

    def draws(self, num_samples: int = 1000, seed: int = 0) -> Tensor:
        """The same draws as vectors, `(num_samples, tasks, D)`, in the order of `labels`."""
        return self._theta(num_samples, seed).squeeze(-2)

    def frame(self, deviations: bool = False) -> pd.DataFrame:
        """Posterior means and sds, a row per task: `frame()["mean"]` has a column per weight, as lme4's `coef`.

        deviations: means as deviations from theta0 (or from its mean) and what features add to it, as lme4's `ranef`.  The sds
            are those of the weights either way.
        Shared parameters are the same for all tasks and stand in `Fit.prior.shared`.
        """
        import pandas as pd

        weights = self.model.weights
        mean = weights.flatten(self.mean)
        if deviations:
            centre = location(self.prior)
            mean = mean - (centre if centre.dim() == 1 else centre.squeeze(-2))
        parts = {
            kind: pd.DataFrame(values.tolist(), index=pd.Index(self.names, name="task"), columns=list(self.labels))
            for kind, values in {"mean": mean, "sd": weights.flatten(self.sd)}.items()
        }
        return pd.concat(parts, axis=1)

    def predict(self, x: Any, num_samples: int = 1000, seed: int = 0) -> Prediction:
        """Draws of new observations at x.

        x: one array `(points, ...)` for all tasks (nested lists of numbers too, or a table with the training tasks' columns),
            or a list with one array per task (of any lengths).

        Raises ValueError where a list does not have one array per task, for NaN and infinity, for rows of another
        shape than those of the training tasks, and for arrays of different lengths where the model's rows depend on each
        other; TypeError for what is no array.
        """
        data, theta = self._new(x), self._theta(num_samples, seed)
        parts = []
        with quiet_scope(seed, data.x.device), TaskNoise(seed, self._batch.ids, data.mask) as stream:
            for trace in self.traces(theta[:1] if self.is_point else theta, data, None, stream):
                if self.is_point and samples_more(trace):  # what it draws besides y is drawn anew for each draw of y
                    parts = [observed_site(t)["value"] for t in self.traces(theta, data, None, stream)]
                elif self.is_point:
                    parts = list(_sampled(observed_site(trace)["fn"], theta, data, stream))
                else:
                    parts.append(observed_site(trace)["value"])
        return Prediction(torch.cat(parts), data.mask, self.names)

    def expected(self, x: Any, num_samples: int = 1000, seed: int = 0) -> Prediction:
        """Draws of the mean of an observation at x: of a probability, a rate, a curve, without the noise of single observations.

        x: as for `predict`.  For classes their probabilities, in a last axis; for `Binomial` without `total_count`, of one
        trial.  Its interval says where the mean is, that of `predict` where an observation will be.
        Of a point (a delta guide) the mean is known: one draw, whatever num_samples.

        Raises ValueError as `predict`, and where the observations' distribution has no mean.
        """
        return self.observed(x, mean_of, num_samples, seed)

    def observed(
        self, x: Any, read: Callable[[dist.TorchDistribution], Tensor], num_samples: int = 1000, seed: int = 0
    ) -> Prediction:
        """What `read` takes from the observations' distribution at x, under each draw of the weights; a point is one draw."""
        data = self._new(x)
        with quiet_scope(seed, data.x.device), TaskNoise(seed, self._batch.ids, data.mask) as stream:
            parts = [
                read(observed_site(trace)["fn"])
                for trace in self.traces(self._theta(1 if self.is_point else num_samples, seed), data, None, stream)
            ]
        return Prediction(torch.cat(parts), data.mask, self.names)

    def _new(self, x: Any) -> Data:
        data = points(x, self.names, self.trained, self._batch.support.x)
        check_padding(self.model, data, with_y=False)
        return data

    def log_prob(self, query: Any = None, num_samples: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """log p(y | x, theta) of every observation under every draw, `(draws, tasks, points)`, 0 in the padding; and the
        mask `(tasks, points)`.

        Densities, so that the weights of `Weighted`, or of `poutine.scale`, are not in them.
        """
        data = scored(query, self._batch, self.model, self.trained)
        evaluated = self.evaluate(data, num_samples, seed, sampled=False)
        log_prob = evaluated.log_prob
        # of a point every draw is the same
        return log_prob.expand(whole_number("num_samples", num_samples), *log_prob.shape[1:]), evaluated.data.mask

    def score(self, query: Any = None, num_samples: int = 1000, seed: int = 0, level: float = 0.9) -> pd.DataFrame:
        """How well the tasks' held-out observations are predicted: one row per task, and "all" over all observations.

        query: a TaskSet or list of Tasks in the order of this posterior's tasks, whose query data (or, where none of
            them has any, support data) are scored; or a list of (x, y), None for a task without; None takes the tasks'
            own query data.
        Columns: n; log_density (nats per observation, of the predictive distribution, whatever weight the observation has in
        the fit); for numbers rmse, coverage of the
            central `level` interval, calibration_error and crps; for classes error_rate and calibration_error.
        The rmse is of the predictive mean, without the noise of single observations.
        Exact, without draws, where the model is known to be linear and Gaussian (`nn.Linear`, `LinearPredictor` or a last layer
            under `likelihoods.Gaussian`, eta a point).  Otherwise by draws: `table.attrs["log_density_se"]` has the Monte-Carlo
            standard error of each row's log_density, 0 where it is exact or the guide is a point.
        A task without data to score gets no row.  A task's row does not depend on the other tasks.

        Raises ValueError for other tasks, another number or order of them, data that the model refuses, a level that is
        not between 0 and 1, and where there is nothing to score.
        """
        import pandas as pd

        level = probability("level", level)
        data = scored(query, self._batch, self.model, self.trained)
        if not bool(data.mask.any()):
            raise ValueError("there is nothing to score: none of the tasks has query data")
        row = row_of(self, data, num_samples, seed, level)
        index, rows = [], []
        for number, name in enumerate((*self.names, "all")):
            mask = data.mask.clone()
            if number < len(self.names):
                mask[:number], mask[number + 1 :] = False, False
            if bool(mask.any()):
                index.append(name)
                rows.append(row(mask))
        errors = {name: found.pop("log_density_se") for name, found in zip(index, rows, strict=True)}
        table = pd.DataFrame(rows, index=pd.Index(index, name="task"))
        table.attrs["log_density_se"] = errors
        return table

    def normal_predictive(self, data: Data) -> tuple[Tensor, Tensor] | None:
        """Mean and sd of every observation in `data`, `(tasks, points)`, where it is known to be normal; else None."""
        return normal_predictive(self, data)

    def evidence(self, num_samples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The log evidence log p(y_i | eta) of every task's support data by importance sampling, beside the bound; in nats.

        One row per task, and "all", their sum.  Columns: objective, what the guide's own objective says (-F_i; under Laplace's
        guide Laplace's evidence); elbo, the mean log weight of `num_samples` draws of the guide; evidence, the log of the mean
        weight, which is never below elbo; se, its Monte-Carlo error.
        The weights' mean has no finite error where the guide's tails are too light: believe se for tasks that `diagnose` reads
        as "good" or "usable".

        Raises ValueError for a delta guide, and for fewer than 100 draws.
        """
        return evidence(self, num_samples, seed)

    def diagnose(self, num_samples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """How near each task's guide is to its posterior: the columns of `evidence`, and gap, ess, k_hat, reading.

        gap: evidence - elbo, in nats, an estimate of KL[q_i || posterior].  ess: how many independent draws of the posterior the
        weighted draws are worth.  k_hat: shape of the weights' tail (Pareto smoothed importance sampling).
        reading: "good" (k_hat up to 0.5, or 95 % of the draws effective: the tail of weights that are alike has no shape);
        "usable" (up to min(1 - 1 / log10(draws), 0.7)): weights correct what is left; "unreliable" (up to 1): they do not, and
        the evidence is off by more than its se says; "misses the posterior" (above 1); "no mode": Laplace's Hessian was not
        positive definite.
        For a mean-field guide over a network's weights "misses the posterior" is the rule: its predictions may still be good,
        which `score` on held-out data tells, not this table.

        Raises ValueError as `evidence`.
        Source: Vehtari et al., JMLR 25 (2024); Yao et al., Yes, but did it work?, ICML 2018.
        """
        return diagnose(self, num_samples, seed)

    def log_likelihood(self, theta: Tensor, eta: Mapping[str, Tensor] | None = None) -> Tensor:
        """log p(y_i | theta, eta) of the tasks' support data, for theta `(draws, tasks, 1, D)`: `(draws, tasks)`;
        each observation as often as it counts in the objective.

        eta: by default the posterior's own.
        """
        eta = self.eta if eta is None else eta
        data = self.support
        if not data.mask.shape[1]:
            return theta.new_zeros(theta.shape[:2])
        parts = []
        with validation_enabled(False):
            draws, tasks = _slices.sizes(self.model, eta, theta, data)
            for some in theta.split(draws):
                trace = poutine.trace(self._program(some, tasks)).get_trace(eta, *data.filled)
                # where, not a product: the density of padding may be anything
                parts.append(torch.where(data.mask, observed_log_prob(trace), 0.0).sum(-1))
        return torch.cat(parts)

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """An ArviZ `InferenceData` (0.x) or `DataTree` (1.x): posterior, predictive, log likelihood and the data.

        Observations are flat with a `task_id` coordinate.  A delta guide gets no log likelihood: its LOO would be the
        in-sample density.  The log likelihood is of one observation each: of one that counts w times (`Weighted`) ArviZ's LOO
        leaves one copy out.
        """
        from varmeta.export import posterior_groups

        return posterior_groups(self, num_samples, seed)

    def __repr__(self) -> str:
        guide, count = self.problem.guide.name, self.model.weights.size
        return f"<Posterior: {counted(len(self.names), 'task')}, {counted(count, 'weight')} each, {guide} guide>"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _theta(self, num_samples: int, seed: int) -> Tensor:
        """Draws of the weights `(draws, tasks, 1, D)`."""
        num_samples = whole_number("num_samples", num_samples)
        q, zero = self.distribution, self._batch.support.x.new_zeros(())
        size = self.model.weights.size
        if isinstance(q, dist.Delta):
            standard = zero.expand(num_samples, 1, size)
        else:
            standard = noise.normal(seed, DRAWS, self._batch.ids, num_samples, size, zero.dtype).to(zero.device)
        with torch.no_grad():
            return move(q, standard.unsqueeze(-2))

    def _program(self, theta: Tensor, task_chunk_size: int) -> Any:
        def program(eta: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Any:
            with (
                pyro.plate("draws", len(theta), dim=-3),
                pyro.plate("tasks", x.shape[0], dim=-2),
                pyro.plate("data", x.shape[1], dim=-1),
            ):
                return self.model.observe(theta, eta, x, y, task_chunk_size)

        return program

    def traces(self, theta: Tensor, data: Data, y: Tensor | None, stream: TaskNoise) -> Iterator[poutine.Trace]:
        """The program's traces under slices of the draws theta, sampling from `stream`."""
        x, first = data.filled[0], 0
        draws, tasks = _slices.sizes(self.model, self.eta, theta, data)
        for eta, part in self._with_eta(theta, draws):
            stream.at(first, len(part))
            yield poutine.trace(self._program(part, tasks)).get_trace(eta, x, y)
            first += len(part)

    def _with_eta(self, theta: Tensor, size: int) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Draws with the eta that they belong to, at most `size` at a time."""
        yield from ((self.eta, part) for part in theta.split(size))

    def evaluate(self, data: Data, num_samples: int, seed: int, sampled: bool | None = True) -> Evaluated:
        """Log densities, means, probabilities (for classes) and draws of the observations in `data`.

        sampled: whether to draw observations; None: of numbers, not of classes.
        """
        log_probs, means, probs, y = [], [], [], data.filled[1]
        samples: list[Tensor] = []
        weighted = []
        theta = self._theta(num_samples, seed)
        own = theta[:1] if self.is_point else theta
        with quiet_scope(seed, data.x.device), TaskNoise(seed, self._batch.ids, data.mask) as stream:
            for trace in self.traces(own, data, y, stream):
                # where, not a product: the density of padding may be anything
                log_probs.append(torch.where(data.mask, observed_log_prob(trace, weighted=False), 0.0))
                weighted.append(torch.where(data.mask, observed_log_prob(trace), 0.0).sum(-1))
                site = observed_site(trace)
                fn = site["fn"]
                classes = isinstance(fn, (dist.Bernoulli, dist.Categorical))
                means.append(known_mean(fn))
                if classes:
                    probs.append(class_probabilities(fn))
                if sampled or (sampled is None and not classes):
                    samples += _sampled(fn, theta, data, stream) if self.is_point else [fn.sample()]
        known = [mean for mean in means if mean is not None]
        joined = (torch.cat(parts) if parts else None for parts in (known, probs, samples))
        return Evaluated(data, site["value"], torch.cat(log_probs), torch.cat(weighted), *joined)


def _sampled(fn: dist.TorchDistribution, theta: Tensor, data: Data, stream: TaskNoise) -> Iterator[Tensor]:
    """As many draws as theta has, of observations whose distribution `(1, tasks, points)` is one for all of them."""
    first = 0
    for part in theta.split(_slices.draws_of_observations(data)):
        stream.at(first, len(part))
        yield fn.expand((len(part), *fn.batch_shape[1:])).sample()
        first += len(part)
