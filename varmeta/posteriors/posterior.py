"""The posteriors of a set of tasks: draw from them, predict with them, score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta._checks import counted, no_task, probability, whole_number
from varmeta.display.drawn import Drawn
from varmeta.display.shown import COLUMNS, Shown
from varmeta.guides.kl import location
from varmeta.models.check import look_at_tokens
from varmeta.models.check_rows import check_padding
from varmeta.models.labels import parameter_labels
from varmeta.posteriors import arviz_groups
from varmeta.posteriors.accuracy import Accuracy, accuracy
from varmeta.posteriors.by_tensor import by_tensor
from varmeta.posteriors.diagnostics import diagnose, evidence
from varmeta.posteriors.draws import Draws
from varmeta.posteriors.inputs import points, scored
from varmeta.posteriors.normal_mixture import NormalMixture
from varmeta.posteriors.observations import mean_of
from varmeta.posteriors.observer import Observer
from varmeta.posteriors.prediction import Prediction
from varmeta.posteriors.scoring import table as score_table
from varmeta.tasks import Data, TaskSet

if TYPE_CHECKING:
    import pandas as pd


class Posterior(Drawn, Shown):
    """q(theta_i) for every task of `tasks`, as found by `Fit.posterior` or `Fit.adapt`.

    `trained` are the training tasks.

    q: where the weights are and how they are drawn.

    evaluations: gradient evaluations that each task's adaptation took, `(tasks,)`; None where they
        were not counted, and of tasks that were not adapted to.

    The weights are in y's units per unit of their column.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> posterior = vm.fit(model, tasks).posterior()
    >>> posterior
    <Posterior: 9 tasks, 2 weights each, multivariate_normal guide>
    >>> posterior.mean["x"].shape, posterior.predict([[0.0]]).mean.shape
    (torch.Size([9]), torch.Size([9, 1]))
    """

    def __init__(
        self, q: Draws, tasks: TaskSet, trained: TaskSet, evaluations: Tensor | None = None
    ) -> None:
        self.q = q
        self.observer = Observer(q)
        self.model = q.model
        self.tasks = tasks
        self.trained = trained
        self.evaluations = evaluations

    @property
    def names(self) -> tuple[str, ...]:
        return self.q.batch.names

    @property
    def labels(self) -> tuple[str, ...]:
        """A readable name for each of the D weights, as in `Fit.prior.labels`."""
        named = parameter_labels(self.model, self.trained.x_names)
        return tuple(label for name in self.model.weights.names for label in named[name])

    def take(self, names: Sequence[str]) -> Posterior:
        """The same for some of the tasks.  Raises KeyError for a task that there is not."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise no_task(unknown[0], self.names)
        at = torch.tensor(
            [self.names.index(name) for name in names], device=self.q.batch.rows.device
        )
        tasks = self.tasks[at]
        spent = None if self.evaluations is None else self.evaluations[at]
        return Posterior(self.q.take(at, tasks.batch()), tasks, self.trained, spent)

    @property
    def distribution(self) -> dist.TorchDistribution:
        """q of every task: batch shape `(tasks, 1)`, event shape `(D,)`, ordered as `labels`."""
        return self.q.distribution

    @property
    def is_point(self) -> bool:
        """Whether q is a point (a delta guide) instead of a distribution."""
        return self.q.is_point

    @property
    def mean(self) -> dict[str, Tensor]:
        """Posterior mean by parameter name, `(tasks, *shape)`."""
        return self.model.weights.unflatten(location(self.distribution).squeeze(-2))

    @property
    def sd(self) -> dict[str, Tensor]:
        """Posterior standard deviation by parameter name, `(tasks, *shape)`.

        Zero for a delta guide.
        """
        q = self.distribution
        spread = torch.zeros_like(q.mean) if isinstance(q, dist.Delta) else q.stddev
        return self.model.weights.unflatten(spread.squeeze(-2))

    def sample(self, num_samples: int = 1000, seed: int = 0) -> dict[str, Tensor]:
        """Draws of the weights by parameter name, `(num_samples, tasks, *shape)`.

        A task's draws do not depend on the others.
        """
        return self.model.weights.unflatten(self.draws(num_samples, seed))

    def draws(self, num_samples: int = 1000, seed: int = 0) -> Tensor:
        """The same draws as vectors, `(num_samples, tasks, D)`, in the order of `labels`."""
        return self.q.theta(num_samples, seed).squeeze(-2)

    def frame(self, deviations: bool = False) -> pd.DataFrame:
        """Posterior means and sds, a row per task.

        `frame()["mean"]` has a column per weight, as lme4's `coef`.

        deviations: means as deviations from theta0 (or from its mean) and what features add to it,
            as lme4's `ranef`.  The sds are those of the weights either way.
        Shared parameters are the same for all tasks and stand in `Fit.prior.shared`.
        """
        import pandas as pd

        weights = self.model.weights
        mean = weights.flatten(self.mean)
        if deviations:
            centre = location(self.q.prior)
            mean = mean - (centre if centre.dim() == 1 else centre.squeeze(-2))
        parts = {
            kind: pd.DataFrame(
                values.tolist(), index=pd.Index(self.names, name="task"), columns=list(self.labels)
            )
            for kind, values in {"mean": mean, "sd": weights.flatten(self.sd)}.items()
        }
        return pd.concat(parts, axis=1)

    def predict(self, x: Any, num_samples: int = 1000, seed: int = 0) -> Prediction:
        """New observations at x.

        x: one array `(points, ...)` for all tasks (nested lists of numbers too, or a table with the
            training tasks' columns), or a list with one array per task (of any lengths), or a
            `TaskSet` of these tasks: each at its own query rows (support rows where none has any).
        Its mean, sd, interval and frame are exact where the model is known to be linear and
            Gaussian, as in `score`: normal, or under a posterior of eta a mixture of normals over
            its draws.  Elsewhere they are those of `num_samples` draws.  `samples` are draws either
            way, taken where they are asked for.  Classes have samples only: see `expected`.
        For `Binomial` without `total_count` a draw is one trial, 0 or 1, since x does not say how
        many.

        Raises ValueError where a list does not have one array per task or a set has tasks of other
        names, for NaN and infinity, for rows of another shape than those of the training tasks, and
        for arrays of different lengths where the model's rows depend on each other; TypeError for
        what is no array.
        """
        data = self._new(x)
        num_samples = whole_number("num_samples", num_samples)
        return self._prediction(
            data, lambda: self.observer.new(data, num_samples, seed), num_samples, noisy=True
        )

    def expected(self, x: Any, num_samples: int = 1000, seed: int = 0) -> Prediction:
        """The mean of an observation at x, without the noise of single observations.

        Of a probability, a rate, a curve.

        x: as for `predict`, and exact where that is.  For classes their probabilities, in a last
        axis; for `Binomial` without `total_count`, of one trial.  Its interval says where the mean
        is, that of `predict` where an observation will be. Of a point (a delta guide) the mean is
        known: one draw, whatever num_samples.

        Raises ValueError as `predict`, and where the observations' distribution has no mean.
        """
        data, num_samples = self._new(x), whole_number("num_samples", num_samples)
        return self._prediction(
            data,
            lambda: self.observer.read(data, mean_of, num_samples, seed),
            1 if self.is_point else num_samples,
            noisy=False,
        )

    def observed(
        self,
        x: Any,
        read: Callable[[dist.TorchDistribution], Tensor],
        num_samples: int = 1000,
        seed: int = 0,
    ) -> Prediction:
        """What `read` takes from the observations' distribution at x, under each draw.

        A point is one draw.

        read: takes a distribution of batch shape `(draws, tasks, points)` to a tensor whose shape
            begins so.
        """
        data = self._new(x)
        return Prediction(self.observer.read(data, read, num_samples, seed), data.mask, self.names)

    def _prediction(
        self, data: Data, draw: Callable[[], Tensor], num_samples: int, noisy: bool
    ) -> Prediction:
        """By a formula where there is one; else the draws are taken now."""
        components = self.q.components()
        if components is None:
            likelihood = self.model.likelihood
            classes = likelihood is not None and likelihood.predictive.kind == "classification"
            return Prediction(draw(), data.mask, self.names, are_classes=noisy and classes)
        assert self.model.likelihood is not None
        some = self.q.batch.support.flat()[1][:1]
        event = tuple(self.model.likelihood.observed(some).shape[1:])
        # a single channel is dropped, as where observations are drawn
        event = () if event == (1,) else event
        known = NormalMixture(self.model, components, data, event, noisy)
        return Prediction(draw, data.mask, self.names, num_samples, known)

    def _new(self, x: Any) -> Data:
        data = points(x, self.names, self.trained, self.q.batch.support.like)
        check_padding(self.model, data, with_y=False)
        look_at_tokens(self.model, data)
        return data

    def log_prob(
        self, query: Any = None, num_samples: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """log p(y | x, theta) of every observation under every draw, and the mask.

        `(draws, tasks, points)`, 0 in the padding; the mask is `(tasks, points)`.

        Densities, so that the weights of `Weighted`, or of `poutine.scale`, are not in them.

        Raises ValueError as `score`.
        """
        data = scored(query, self.q.batch, self.model, self.trained)
        evaluated = self.observer.evaluate(data, num_samples, seed, sampled=False)
        log_prob = evaluated.log_prob
        # of a point every draw is the same
        return log_prob.expand(
            whole_number("num_samples", num_samples), *log_prob.shape[1:]
        ), evaluated.data.mask

    def score(
        self, query: Any = None, num_samples: int = 1000, seed: int = 0, level: float = 0.9
    ) -> pd.DataFrame:
        """How well held-out observations are predicted, one row per task.

        "all" is the row over all observations.

        query: a TaskSet or list of Tasks in the order of this posterior's tasks, whose query data
            (or, where none of them has any, support data) are scored; or a list of (x, y), None for
            a task without; None takes the tasks' own query data.
        Columns: n; log_density (nats per observation, of the predictive distribution, whatever
            weight the observation has in the fit); for numbers rmse, coverage of the central
            `level` interval, calibration_error and crps; for classes error_rate and
            calibration_error.
        The rmse is of the predictive mean, without the noise of single observations.
        Exact, without draws, where the model is known to be linear and Gaussian (`nn.Linear`,
            `LinearPredictor` or a last layer under `likelihoods.Gaussian`); under a posterior of
            eta it is that of the mixture of normals over all its draws.  Otherwise by draws:
            `table.attrs["log_density_se"]` has the Monte-Carlo standard error of each row's
            log_density (over the draws of eta), 0 where it is exact or the guide is a point.
        A task without data to score gets no row.  A task's row does not depend on the other tasks.

        Raises ValueError for other tasks, another number or order of them, data that the model
        refuses, a level that is not between 0 and 1, and where there is nothing to score.
        """
        import pandas as pd

        level = probability("level", level)
        data = self._scored(query)
        columns = score_table(self.observer, data, num_samples, seed, level)
        some = data.num_points.tolist()
        index = [name for name, count in zip(self.names, some, strict=True) if count] + ["all"]
        errors = columns.pop("log_density_se").tolist()
        table = pd.DataFrame(columns, index=pd.Index(index, name="task"))
        table.attrs["log_density_se"] = dict(zip(index, errors, strict=True))
        return table

    def accuracy(
        self, query: Any = None, level: float = 0.95, num_samples: int = 1000, seed: int = 0
    ) -> Accuracy:
        """How often the most probable class is the right one, with its interval over tasks.

        Of classes alone (0 and 1 too): "97.3 % (96.9 to 97.6 over 600 tasks)" when it is printed;
        `by_task` has each task's, `calibration()` a table of confidence and accuracy.

        query: as for `score`.  level: of the interval, Student's t of the tasks' accuracies, which
            is for other tasks like these under the same fit.
        num_samples: draws over which probabilities are averaged; a point is one.

        Raises as `score`, and ValueError for observations that are no classes.
        """
        probability("level", level)
        return accuracy(self.observer, self._scored(query), num_samples, seed, level)

    def _scored(self, query: Any) -> Data:
        data = scored(query, self.q.batch, self.model, self.trained)
        if not bool(data.num_points.any()):
            raise ValueError("there is nothing to score: none of the tasks has query data")
        return data

    def evidence(self, num_samples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The log evidence log p(y_i | eta) of every task's support data, in nats.

        Exact where the model is known to be linear and Gaussian, by importance sampling elsewhere;
        beside the bound.

        One row per task, and "all", their sum.  Columns: objective, what the guide's own objective
        says (-F_i; under Laplace's guide Laplace's evidence); elbo, the mean log weight of
        `num_samples` draws of the guide; evidence, exact, or the log of the mean weight, which is
        never below elbo; se, its Monte-Carlo error, 0 where it is exact. The weights' mean has no
        finite error where the guide's tails are too light: believe se for tasks that `diagnose`
        reads as "good" or "usable".

        Raises ValueError for a delta guide, and for fewer than 100 draws.
        """
        return evidence(self.observer, num_samples, seed)

    def diagnose(self, num_samples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """How near each task's guide is to its posterior.

        Columns: those of `evidence`, and gap, ess, k_hat, reading.

        gap: evidence - elbo, in nats, an estimate of KL[q_i || posterior].  ess: how many
        independent draws of the posterior the weighted draws are worth.  k_hat: shape of the
        weights' tail (Pareto smoothed importance sampling).
        reading: "good" (k_hat up to 0.5, or 95 % of the draws effective: the tail of weights that
        are alike has no shape); "usable" (up to min(1 - 1 / log10(draws), 0.7)): weights correct
        what is left; "unreliable" (up to 1): they do not, and the evidence is off by more than its
        se says; "misses the posterior" (above 1); "no mode": Laplace's Hessian was not positive
        definite. For a mean-field guide over a network's weights "misses the posterior" is the
        rule: its predictions may still be good, which `score` on held-out data tells, not this
        table.

        Raises ValueError as `evidence`.
        Source: Vehtari et al., JMLR 25 (2024); Yao et al., Yes, but did it work?, ICML 2018.
        """
        return diagnose(self.observer, num_samples, seed)

    def log_likelihood(self, theta: Tensor, eta: Mapping[str, Tensor] | None = None) -> Tensor:
        """log p(y_i | theta, eta) of the tasks' support data, `(draws, tasks)`.

        theta is `(draws, tasks, 1, D)`.  Each observation counts as often as in the objective.

        eta: by default the posterior's own.
        """
        return self.observer.log_likelihood(theta, self.q.eta if eta is None else eta)

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """An ArviZ `InferenceData` (0.x) or `DataTree` (1.x).

        With posterior, predictive, log likelihood and the data.

        The posterior begins with the prior's numbers: theta0 and prior_sd by weight, correlation by
        pair of weights, what the likelihood learned (noise_scale), shared, coefficients; the same
        in every draw where eta is a point (sd 0, no r_hat).  Then theta, the weights by task, and
        distance, |theta - theta0|.  A prior of more than 200 numbers stands in "constant_data".
        The draws are independent, in four chains where four divides num_samples.
        Observations are flat with a `task_id` coordinate.  A delta guide gets no log likelihood:
        its LOO would be the in-sample density.  The log likelihood is of one observation each: of
        one that counts w times (`Weighted`) ArviZ's LOO leaves one copy out.
        """
        names = {"task": list(self.names), "weight": list(self.labels)}
        return arviz_groups.groups(self.observer, names, num_samples, seed, self.trained.x_names)

    def _table(self) -> pd.DataFrame:
        return self.frame() if 2 * len(self.labels) <= COLUMNS else by_tensor(self.mean, self.sd)

    def __repr__(self) -> str:
        guide, count = self.q.guide_name, self.model.weights.size
        return (
            f"<Posterior: {counted(len(self.names), 'task')}, {counted(count, 'weight')} each, "
            f"{guide} guide>"
        )
