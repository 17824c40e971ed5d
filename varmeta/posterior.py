"""The posteriors of a set of tasks: draw from them, predict with them, score them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta import metrics
from varmeta._arrays import as_tensor, refuse_non_finite
from varmeta.bayes.divergence import location, move
from varmeta.bayes.model import SITE, observed_log_prob
from varmeta.numerics import noise
from varmeta.numerics.tree import Tree
from varmeta.problem import Problem
from varmeta.tasks import Data, Task, TaskSet

if TYPE_CHECKING:
    import pandas as pd

# Draws are a stream of their own, away from those of training (which counts its steps from 0).
DRAWS = 2**40
# Numbers held at a time while predicting; larger jobs go through in slices of draws.
CHUNK = 8_000_000


@dataclass(frozen=True)
class Prediction:
    """Draws of new observations: `samples` `(draws, tasks, points, ...)`; `mask` `(tasks, points)` is False in padding."""

    samples: Tensor
    mask: Tensor
    names: tuple[str, ...]

    @property
    def mean(self) -> Tensor:
        """`(tasks, points, ...)`."""
        return self._floating.mean(0)

    @property
    def sd(self) -> Tensor:
        return self._floating.std(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of probability `level`, `(tasks, points, ...)` each."""
        if not 0 < level < 1:
            raise ValueError(f"level is {level}, expected a probability between 0 and 1, e.g. 0.9")
        # sorted here: torch.quantile refuses more than 16 million numbers
        ordered = self._floating.sort(0).values
        return metrics.quantile(ordered, (1 - level) / 2), metrics.quantile(ordered, (1 + level) / 2)

    @property
    def _floating(self) -> Tensor:
        return self.samples if self.samples.is_floating_point() else self.samples.to(torch.get_default_dtype())

    def task(self, name: str) -> Tensor:
        """The draws of one task without padding, `(draws, points, ...)`."""
        if name not in self.names:
            raise KeyError(f"no task is called {name!r}; the first names are {list(self.names[:5])}")
        index = self.names.index(name)
        return self.samples[:, index, self.mask[index]]


class Posterior:
    """q(theta; phi_i) for every task of `tasks`, as found by `Fit.posterior` or `Fit.adapt`."""

    def __init__(self, problem: Problem, phi: Tree, eta: Mapping[str, Tensor], tasks: TaskSet) -> None:
        self.problem = problem
        self.model = problem.model
        self.phi = phi
        self.eta = dict(eta)
        self.tasks = tasks
        self._batch = tasks.batch()

    @property
    def names(self) -> tuple[str, ...]:
        return self._batch.names

    @property
    def support(self) -> Data:
        """The data that the tasks were adapted to, padded."""
        return self._batch.support

    @property
    def distribution(self) -> dist.TorchDistribution:
        """q of every task: batch shape `(tasks, 1)`, event shape `(D,)`, in the order of `model.weights.labels`."""
        with torch.no_grad():
            return self.problem.guide.distribution(self.phi, self.eta, self._batch.support)

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
        """The same draws as vectors, `(num_samples, tasks, D)`, in the order of `model.weights.labels`."""
        return self._theta(num_samples, seed).squeeze(-2)

    def predict(self, x: Any, num_samples: int = 1000, seed: int = 0) -> Prediction:
        """Draws of new observations at x.

        x: one array `(points, ...)` for all tasks, or a list with one array per task (of any lengths).

        Raises ValueError where a list does not have one array per task, for NaN and infinity, and for rows of another
        shape than the tasks' own.
        """
        data = self._inputs(x)
        rows, _ = data.filled
        with _scope(seed, self._batch.support.x.device):
            parts = [
                _sampled(poutine.trace(self._program(theta)).get_trace(self.eta, rows, None))["value"]
                for theta in self._slices(self._theta(num_samples, seed), data)
            ]
        return Prediction(torch.cat(parts), data.mask, self.names)

    def log_prob(self, query: Any = None, num_samples: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """log p(y | x, theta) of every observation under every draw, `(draws, tasks, points)`, 0 in the padding; and the
        mask `(tasks, points)`."""
        evaluated = self.evaluate(self._query(query), num_samples, seed)
        return evaluated.log_prob, evaluated.data.mask

    def score(self, query: Any = None, num_samples: int = 1000, seed: int = 0, level: float = 0.9) -> pd.DataFrame:
        """How well the tasks' held-out observations are predicted: one row per task, and "all" over all observations.

        query: a TaskSet or list of Tasks in the order of this posterior's tasks, whose query data (or, where none of
            them has any, support data) are scored; or a list of (x, y), None for a task without; None takes the tasks'
            own query data.
        Columns: n; log_density (nats per observation, of the predictive distribution); for numbers rmse, coverage of the
            central `level` interval, calibration_error and crps; for classes error_rate and calibration_error.
        A task without data to score gets no row.

        Raises ValueError for other tasks, another number or order of them, data that the model refuses, and where there
        is nothing to score.
        """
        import pandas as pd

        data = self._query(query)
        if not bool(data.mask.any()):
            raise ValueError("there is nothing to score: none of the tasks has query data")
        evaluated = self.evaluate(data, num_samples, seed)
        table = metrics.numbers if evaluated.probs is None else metrics.classes
        predicted = evaluated.samples if evaluated.probs is None else evaluated.probs
        index, rows = [], []
        for number, name in enumerate((*self.names, "all")):
            mask = data.mask.clone()
            if number < len(self.names):
                mask[:number], mask[number + 1 :] = False, False
            if bool(mask.any()):
                index.append(name)
                rows.append(table(evaluated.log_prob[:, mask], predicted[:, mask], evaluated.y[mask], level))
        return pd.DataFrame(rows, index=pd.Index(index, name="task"))

    def to_arviz(self, num_samples: int = 1000, seed: int = 0) -> Any:
        """An ArviZ `InferenceData` (0.x) or `DataTree` (1.x): posterior, predictive, log likelihood and the data.

        Observations are flat with a `task_id` coordinate.  A delta guide gets no log likelihood: its LOO would be the
        in-sample density.
        """
        from varmeta.export import posterior_groups

        return posterior_groups(self, num_samples, seed)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _theta(self, num_samples: int, seed: int) -> Tensor:
        """Draws `(draws, tasks, 1, D)`."""
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        q, zero = self.distribution, self._batch.support.x.new_zeros(())
        size = self.model.weights.size
        if isinstance(q, dist.Delta):
            standard = zero.expand(num_samples, 1, size)
        else:
            standard = noise.normal(seed, DRAWS, self._batch.ids, num_samples, size, zero.dtype).to(zero.device)
        with torch.no_grad():
            return move(q, standard.unsqueeze(-2))

    def _program(self, theta: Tensor) -> Any:
        def program(eta: dict[str, Tensor], x: Tensor, y: Tensor | None) -> Any:
            with pyro.plate("tasks", x.shape[0], dim=-2), pyro.plate("data", x.shape[1], dim=-1):
                return self.model.observe(theta, eta, x, y)

        return program

    def _slices(self, theta: Tensor, data: Data) -> Iterator[Tensor]:
        tasks, points = data.mask.shape
        cost = tasks * (32 * points + theta.shape[-1])
        yield from theta.split(max(1, CHUNK // max(1, cost)))

    def evaluate(self, data: Data, num_samples: int, seed: int) -> Evaluated:
        """Log densities, draws and (for classes) probabilities of the observations in `data`."""
        log_probs, samples, probs = [], [], []
        x, y = data.filled
        with _scope(seed, self._batch.support.x.device):
            for theta in self._slices(self._theta(num_samples, seed), data):
                trace = poutine.trace(self._program(theta)).get_trace(self.eta, x, y)
                # where, not a product: the density of padding may be anything
                log_probs.append(torch.where(data.mask, observed_log_prob(trace), 0.0))
                site = _sampled(trace)
                samples.append(site["fn"].sample())
                if isinstance(site["fn"], (dist.Bernoulli, dist.Categorical)):
                    probs.append(_class_probabilities(site["fn"]))
        return Evaluated(
            data, site["value"], torch.cat(log_probs), torch.cat(samples), torch.cat(probs) if probs else None
        )

    def _inputs(self, x: Any) -> Data:
        support = self._batch.support
        if isinstance(x, (list, tuple)) and len(x) and not np.isscalar(x[0]) and not isinstance(x, Tensor):
            if len(x) != len(self.names):
                raise ValueError(
                    f"x lists {len(x)} arrays, but there are {len(self.names)} tasks: give one array for each, or one for all"
                )
            parts = [as_tensor(part, f"x of task {name!r}") for part, name in zip(x, self.names, strict=True)]
        else:
            parts = [as_tensor(x, "x")] * len(self.names)
        for part, name in zip(parts, self.names, strict=True):
            self._check_rows(part, f"x of task {name!r}")
        parts = [part.to(support.x) for part in parts]
        longest = max(len(part) for part in parts)
        padded = support.x.new_zeros(len(parts), longest, *parts[0].shape[1:])
        mask = torch.zeros(len(parts), longest, dtype=torch.bool, device=padded.device)
        for index, part in enumerate(parts):
            padded[index, : len(part)] = part
            mask[index, : len(part)] = True
        return Data(padded, padded.new_zeros(len(parts), longest), mask)

    def _check_rows(self, x: Tensor, what: str) -> None:
        """A program that reads columns of x would take points for columns, and say nothing."""
        if x.dim() == 0:
            raise ValueError(f"{what} is a single number, expected one row per point: give [{x.item()}]")
        refuse_non_finite(x, what)
        own = self._batch.support
        if bool(own.mask.any()) and x.shape[1:] != own.x.shape[2:]:
            raise ValueError(
                f"{what}: a row has shape {tuple(x.shape[1:])}, but {tuple(own.x.shape[2:])} in the tasks' support: "
                "(n,) and (n, 1) differ, see reshape"
            )

    def _query(self, query: Any) -> Data:
        if query is None:
            if self._batch.query is None:
                raise ValueError(
                    "these tasks have no query data: pass score(query) the held-out data, as a TaskSet or list of (x, y)"
                )
            return self._batch.query
        if not isinstance(query, Iterable):
            raise TypeError(f"query must be a TaskSet or a list of (x, y), not {type(query).__name__}")
        tasks = [item if isinstance(item, Task) else Task(support=item) for item in query]
        if len(tasks) != len(self.names):
            raise ValueError(
                f"query has {len(tasks)} tasks, but the posterior has {len(self.names)}: one for each, in the same order"
            )
        for task, name in zip(tasks, self.names, strict=True):
            if task.name is not None and task.name != name:
                raise ValueError(f"query lists task {task.name!r} where the posterior has {name!r}: use the same order")
        # all from the one or all from the other: a task without query data must not be scored on what it learned from
        asked = any(task.query is not None for task in tasks)
        parts = [task.query if asked else task.support for task in tasks]
        named = TaskSet([Task(support=part, name=name) for part, name in zip(parts, self.names, strict=True)])
        support = self._batch.support
        named = named.to(dtype=support.x.dtype, device=support.x.device)
        for task in named:
            if task.support is not None:
                self._check_rows(task.support[0], f"query x of task {task.name!r}")
        self.model.check(named)
        return named.batch().support


@dataclass(frozen=True)
class Evaluated:
    """Observations under draws: y `(tasks, points, ...)`, log_prob `(draws, tasks, points)`, samples `(draws, tasks, points,
    ...)`; for classes their probabilities, classes last."""

    data: Data
    y: Tensor
    log_prob: Tensor
    samples: Tensor
    probs: Tensor | None


@contextlib.contextmanager
def _scope(seed: int, device: torch.device) -> Iterator[None]:
    """No gradients, no validation, and a random state of one's own that is put back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), pyro.validation_enabled(False), torch.random.fork_rng(devices=devices):
        # not torch.manual_seed, which would seed the devices that are not forked too
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _sampled(trace: poutine.Trace) -> Any:
    """The site of the observations: the one called y, or the only one."""
    sites = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != SITE and not poutine.util.site_is_subsample(site)
    }
    if "y" in sites:
        return sites["y"]
    if len(sites) != 1:
        raise ValueError(f"the program samples {sorted(sites)}: call the observed site 'y', or sample just one")
    return next(iter(sites.values()))


def _class_probabilities(fn: dist.TorchDistribution) -> Tensor:
    """`(..., classes)`; for a Bernoulli, of 0 and of 1."""
    return torch.stack([1.0 - fn.probs, fn.probs], -1) if isinstance(fn, dist.Bernoulli) else fn.probs
