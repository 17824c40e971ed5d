"""Run a model's observations under draws of the weights: their densities, means and new values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import observed_log_prob, observed_site
from varmeta.posteriors import slices
from varmeta.posteriors.draws import Draws
from varmeta.posteriors.observation_noise import TaskNoise
from varmeta.posteriors.observations import (
    Evaluated,
    class_probabilities,
    known_mean,
    quiet_scope,
    samples_more,
)
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data


class Observer:
    """Observations of a batch of tasks under draws of their weights.

    Some draws and some tasks at a time.
    """

    def __init__(self, q: Draws) -> None:
        self.q = q
        self.model = q.model
        # by the shape of theta: counting what a network holds takes longer than to run it for a few
        # tasks
        self._sizes: dict[torch.Size, tuple[int, int]] = {}

    @contextlib.contextmanager
    def stream(self, seed: int, data: Data) -> Iterator[TaskNoise]:
        """Random numbers of the tasks' own, and no gradients.

        PyTorch's random state is put back afterwards.
        """
        with (
            quiet_scope(seed, data.like.device),
            TaskNoise(seed, self.q.batch.ids, data.mask) as stream,
        ):
            yield stream

    def traces(
        self, theta: Tensor, data: Data, y: Tensor | None, stream: TaskNoise
    ) -> Iterator[poutine.Trace]:
        """The program's traces under slices of the draws theta, sampling from `stream`."""
        x, first = data.filled[0], 0
        model = self.model.predictive
        if self.q.kind != "integrated":  # one eta for all draws
            model = slices.ahead(model, self.q.eta, theta, data)
        draws, tasks = slices.sizes(model, self.q.eta, theta, data)
        for eta, part in self.q.with_eta(theta, draws):
            stream.at(first, len(part))
            program = self._program(model, part, tasks)
            yield poutine.trace(program).get_trace(self.model.told(eta, self.q.batch.support), x, y)
            first += len(part)

    def new(self, data: Data, num_samples: int, seed: int) -> Tensor:
        """Draws of new observations at data's x, `(num_samples, tasks, points, ...)`."""
        theta, parts = self.q.theta(num_samples, seed), []
        with self.stream(seed, data) as stream:
            for trace in self.traces(theta[:1] if self.q.is_point else theta, data, None, stream):
                if self.q.is_point and samples_more(
                    trace
                ):  # what it draws besides y is drawn anew for each draw of y
                    parts = [
                        observed_site(t)["value"] for t in self.traces(theta, data, None, stream)
                    ]
                elif self.q.is_point:
                    parts = list(_sampled(observed_site(trace)["fn"], theta, data, stream))
                else:
                    parts.append(observed_site(trace)["value"])
        return torch.cat(parts)

    def read(
        self,
        data: Data,
        read: Callable[[dist.TorchDistribution], Tensor],
        num_samples: int,
        seed: int,
    ) -> Tensor:
        """What `read` takes from the distribution of new observations under each draw.

        A point is one draw.
        """
        theta = self.q.theta(1 if self.q.is_point else num_samples, seed)
        with self.stream(seed, data) as stream:
            return torch.cat(
                [
                    read(observed_site(trace)["fn"])
                    for trace in self.traces(theta, data, None, stream)
                ]
            )

    def evaluate(
        self, data: Data, num_samples: int, seed: int, sampled: bool | None = True
    ) -> Evaluated:
        """Log densities, means and draws of the observations in `data`; of classes probabilities.

        sampled: whether to draw observations; None: of numbers, not of classes.
        """
        log_probs, means, y = [], [], data.filled[1]
        probs: Tensor | None = None
        samples: list[Tensor] = []
        weighted = []
        theta = self.q.theta(num_samples, seed)
        own = theta[:1] if self.q.is_point else theta
        with self.stream(seed, data) as stream:
            for trace in self.traces(own, data, y, stream):
                # where, not a product: the density of padding may be anything
                log_probs.append(
                    torch.where(data.mask, observed_log_prob(trace, weighted=False), 0.0)
                )
                weighted.append(torch.where(data.mask, observed_log_prob(trace), 0.0).sum(-1))
                site = observed_site(trace)
                fn = site["fn"]
                classes = isinstance(fn, (dist.Bernoulli, dist.Categorical))
                means.append(known_mean(fn))
                if classes:  # of many draws by themselves they would not fit
                    part = class_probabilities(fn).sum(0) / len(own)
                    probs = part if probs is None else probs + part
                if sampled or (sampled is None and not classes):
                    samples += (
                        _sampled(fn, theta, data, stream) if self.q.is_point else [fn.sample()]
                    )
        known = [mean for mean in means if mean is not None]
        mean, drawn = (torch.cat(parts) if parts else None for parts in (known, samples))
        return Evaluated(
            data, site["value"], torch.cat(log_probs), torch.cat(weighted), mean, probs, drawn
        )

    def log_likelihood(self, theta: Tensor, eta: Mapping[str, Tensor]) -> Tensor:
        """log p(y_i | theta, eta) of the support data, `(draws, tasks)`.

        theta is `(draws, tasks, 1, D)`.

        Each observation counts as often as it does in the objective.
        """
        data = self.q.batch.support
        if not data.width:
            return theta.new_zeros(theta.shape[:2])
        parts = []
        with validation_enabled(False):
            model = slices.ahead(self.model, eta, theta, data)
            if theta.shape not in self._sizes:
                self._sizes[theta.shape] = slices.sizes(model, eta, theta, data)
            draws, tasks = self._sizes[theta.shape]
            for some in theta.split(draws):
                program = self._program(model, some, tasks)
                here = self.model.told(eta, self.q.batch.support)
                trace = poutine.trace(program).get_trace(here, *data.filled)
                # where, not a product: the density of padding may be anything
                parts.append(torch.where(data.mask, observed_log_prob(trace), 0.0).sum(-1))
        return torch.cat(parts)

    def _program(self, model: TaskModel, theta: Tensor, task_chunk_size: int) -> Any:
        def program(eta: Mapping[str, Tensor], x: Tensor, y: Tensor | None) -> Any:
            with (
                pyro.plate("draws", len(theta), dim=-3),
                pyro.plate("tasks", x.shape[0], dim=-2),
                pyro.plate("data", x.shape[1], dim=-1),
            ):
                return model.observe(theta, eta, x, y, task_chunk_size)

        return program


def _sampled(
    fn: dist.TorchDistribution, theta: Tensor, data: Data, stream: TaskNoise
) -> Iterator[Tensor]:
    """As many draws as theta has, of observations whose distribution `(1, tasks, points)` is one
    for all of them.
    """
    first = 0
    for part in theta.split(slices.draws_of_observations(data)):
        stream.at(first, len(part))
        yield fn.expand((len(part), *fn.batch_shape[1:])).sample()
        first += len(part)
