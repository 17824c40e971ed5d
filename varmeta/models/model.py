"""The model of tasks as one Pyro program: theta_i ~ prior, y_in ~ p(y | x_in, theta_i).

    with plate("tasks"):
        theta ~ N(theta0, Lambda^-1), and Gamma z_i is added where the prior has covariates
        with plate("data"), mask(padding):
            y ~ likelihood(net(x; theta))

The program is called with eta (everything shared) and padded data; nothing is stored between calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from varmeta._checks import kind_of, name_of
from varmeta.files.remember import Remembers, remembered
from varmeta.likelihoods.base import Likelihood, told
from varmeta.likelihoods.weighted import is_gaussian
from varmeta.models import network
from varmeta.models.check_net import BatchNorm, check_net, use_batch_statistics
from varmeta.models.constants import constants, frozen, hold_padding_rows
from varmeta.models.fan_in import fan_ins
from varmeta.models.linearity import is_linear_in, looks_straight
from varmeta.models.observe import observe_output
from varmeta.models.pyro_program import DATA, SITE, TASKS, observed_log_prob, starts
from varmeta.models.recurrent import unroll_recurrent_layers
from varmeta.models.shared_layers import Ahead, Features, Split, split
from varmeta.models.start import check_names, held_by, matches, placed_by
from varmeta.models.tokens import give_whole_numbers
from varmeta.priors.covariates import coefficients_of, offset
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.priors.weights import Weights
from varmeta.tasks import Data, TaskSet

Program = Callable[[dict[str, Tensor], Tensor, Tensor | None], Any]


class TaskModel(Remembers):
    """A network (or any Pyro program) whose weights vary from task to task around a learned prior.

    net: any `nn.Module`; its parameters are the weights, its present values the start of theta0.
        It is copied, and run in evaluation mode: dropout is off.  Its input is one task's x
        `(points, features)`.  Parameters with `requires_grad=False`, and the row
        `padding_idx` of an `nn.Embedding`, are constants: the same in every task, and never
        learned.  A row's output may depend on the task's other rows only where no task is padded,
        that is where all have the same number of rows.
    likelihood: one of `varmeta.likelihoods`.
    prior: `GaussianPrior`; by default one fixed precision of 1.
    shared: patterns (`"body.*"`) of parameters that are the same for every task: fixed effects, or
        a feature extractor that is not adapted.  They live in eta beside theta0.  What is a
        constant stays one.
    batch_norm: "refuse"; "frozen" to use the running statistics that the network came with; or
        "batch", to use the mean and variance of the rows that stand together, as MAML's code does:
        of a task's support while it adapts, of its query (or the x of `predict`) while it is
        judged. A row's output then depends on the rows beside it, and p(y | x, theta) is no product
        over rows: all tasks must have as many, and leaving out a row leaves the others changed.

    Raises ValueError for batch norm unless it is told how, for a pattern that matches nothing or
    nothing but constants, for a network without a parameter to learn or with a layer that cannot be
    run for many tasks, and for a name that varmeta uses itself.

    >>> from varmeta import likelihoods
    >>> model = TaskModel(nn.Linear(1, 1), likelihoods.Gaussian(), GaussianPrior(precision=0.1))
    >>> model.weights.labels
    ('weight', 'bias')
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        prior: GaussianPrior | None = None,
        shared: Iterable[str] = (),
        batch_norm: BatchNorm = "refuse",
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(
                "net must be an nn.Module (for a Pyro program: TaskModel.from_pyro), not "
                f"{kind_of(net)}"
            )
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                "likelihood must be one of varmeta.likelihoods, such as Gaussian(), not "
                f"{kind_of(likelihood)}"
            )
        check_net(net, batch_norm)
        self.net: nn.Module | None = copy.deepcopy(net).eval()
        self.likelihood: Likelihood | None = likelihood
        self._program: Program | None = None
        self.constants = frozen(net)
        unroll_recurrent_layers(self.net)
        if batch_norm == "batch":
            use_batch_statistics(self.net)
        hold_padding_rows(self.net)
        give_whole_numbers(self.net)
        start = {
            n: p.detach().clone() for n, p in net.named_parameters() if n not in self.constants
        }
        for name, value in likelihood.task_weights().items():
            if name in start:
                raise ValueError(
                    f"the parameter name {name!r} is one that varmeta uses itself: rename it"
                )
            start[name] = value.to(next(iter(start.values())))
        self._setup(start, prior, shared)

    @classmethod
    @remembered
    def from_pyro(
        cls,
        program: Program,
        params: Mapping[str, tuple[int, ...] | Tensor],
        prior: GaussianPrior | None = None,
        shared: Iterable[str] = (),
    ) -> TaskModel:
        """A task's likelihood as a Pyro program `program(params, x, y)`.

        program: observes y (`pyro.sample("y", ..., obs=y)`) given the params; with `y=None` it
            samples y.  It runs once for all tasks: `params[name]` has shape `(..., tasks, 1,
            *shape)` and x `(tasks, points, ...)`, so that params broadcast against the points; the
            observed site's batch shape must come out as `(..., tasks, points)`.
        params: shape of each weight (theta0 starts at zero), or a tensor to start theta0 from.
        prior, shared: as for a network; a shared parameter reaches the program with its own shape.

        Raises TypeError for a program that is not callable, ValueError for names as `TaskModel`.

        >>> def program(params, x, y):
        ...     mean = params["intercept"] + params["slope"] * x
        ...     return pyro.sample("y", dist.Normal(mean, params["log_sd"].exp()), obs=y)
        >>> shapes = {"intercept": (), "slope": (), "log_sd": ()}
        >>> TaskModel.from_pyro(program, shapes, shared=["log_sd"]).weights.labels
        ('intercept', 'slope')
        """
        if not callable(program):
            raise TypeError(
                f"program must be callable as program(params, x, y), not {type(program).__name__}"
            )
        model = cls.__new__(cls)
        model.net, model.likelihood, model._program = None, None, program
        model.constants = ()
        model._setup(starts(params), prior, shared)
        return model

    def _setup(
        self, start: dict[str, Tensor], prior: GaussianPrior | None, shared: Iterable[str]
    ) -> None:
        if isinstance(shared, str):
            raise TypeError(f"shared must be a list of patterns, not the string {shared!r}")
        if prior is not None and not isinstance(prior, GaussianPrior):
            raise TypeError(
                "prior must be a GaussianPrior, such as GaussianPrior(precision=1.0), not "
                f"{kind_of(prior)}"
            )
        self.prior = GaussianPrior() if prior is None else prior
        # what has been captured of this model so far; copies that differ in their start only share
        # it
        self.graphs: dict[Any, Any] = {}
        self._ahead: Ahead | None = None
        # whether layers before all that varies may be run apart: `check_cut` finds out
        self.cut = True
        shared = tuple(shared)
        own = () if self.likelihood is None else self.likelihood.init(torch.zeros(()))
        check_names(start, shared, self.constants, own)
        self.shared = tuple(n for n in start if any(matches(n, pattern) for pattern in shared))
        varying = [name for name in start if name not in self.shared]
        # how the tasks' features move the weights: by their names in eta, where they stand beside
        # theta0
        self.coefficients = coefficients_of(self.prior.covariates, varying, self.shared)
        start |= {
            key: torch.zeros_like(start[name]) for key, (name, _) in self.coefficients.items()
        }
        self.start = start | placed_by(self.prior, start)
        if not varying:
            raise ValueError(
                "every parameter is shared, so nothing is left to differ between tasks: share fewer"
            )
        held = {name: self.start[name] for name in held_by(self.prior, varying)}
        known = {} if self.net is None else fan_ins(self.net)
        self.weights = Weights(
            {name: start[name].shape for name in varying},
            held,
            {n: known[n] for n in varying if n in known},
        )
        if self.prior.lkj != 1.0 and self.weights.size == 1:
            raise ValueError(
                f"lkj={self.prior.lkj:g} is a density of correlations, and one weight per task has "
                "none: leave it out"
            )
        if not self.init(torch.zeros(())):
            raise ValueError(
                "learn_loc=False leaves nothing to learn: theta0, the precision and the noise are "
                "all given"
            )
        # its names are checked here, before any work
        self.prior.init(self.weights, torch.zeros(()))

    # -- eta ---------------------------------------------------------------------------------------

    def init(self, like: Tensor) -> dict[str, Tensor]:
        """Where eta starts, on the dtype and device of `like`.

        theta0 and shared parameters by name, then the rest.

        What is not learned has no entry: theta0 that `learn_loc` holds, and precisions and noise
            scales that are given.
        """
        eta = {
            name: value.to(like)
            for name, value in self.start.items()
            if name not in self.weights.fixed
        }
        eta |= self.prior.init(self.weights, like)
        if self.likelihood is not None:
            eta |= self.likelihood.init(like)
        return {name: value.detach().clone() for name, value in eta.items()}

    def prior_distribution(self, eta: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """N(theta0, Lambda^-1), event shape `(D,)`.

        That is p(theta | eta) of a task whose features move nothing.
        """
        return self.prior.distribution(self.weights, eta)

    def offset(self, eta: Mapping[str, Tensor], data: Data) -> Tensor | None:
        """Gamma z_i, by how much the tasks' features move their weights, `(tasks, D)`.

        None where the prior has no covariates.
        """
        return offset(self.coefficients, self.weights, eta, data.features)

    def moved(self, theta: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """The tasks' weights: theta with what the tasks' features add.

        theta `(..., tasks, 1, D)` is as it is sampled, around theta0.
        """
        by = self.offset(eta, data)
        return theta if by is None else theta + by.unsqueeze(-2)

    def penalty(self, eta: Mapping[str, Tensor]) -> Tensor | float:
        """-log of the hyperpriors' density at eta, up to a constant; 0 where there are none."""
        total = self.prior.penalty(self.weights, eta)
        return total if self.likelihood is None else total + self.likelihood.penalty(eta)

    @property
    def has_hyperprior(self) -> bool:
        return self.prior.has_hyperprior or (
            self.likelihood is not None and self.likelihood.has_hyperprior
        )

    # -- the Pyro program --------------------------------------------------------------------------

    def __call__(self, eta: Mapping[str, Tensor], data: Data) -> Tensor:
        """The generative program for padded data; samples `theta` `(tasks, 1, D)` and observes y.

        With covariates the site is a task's weights less what its features add to them, see
        `covariates.py`.
        """
        with pyro.plate(TASKS, len(data), dim=-2):
            theta = pyro.sample(SITE, self.prior_distribution(eta))
            if data.width:  # tasks without any data: the prior alone
                with (
                    pyro.plate(DATA, data.width, dim=-1),
                    poutine.mask(mask=cast("torch.BoolTensor", data.mask)),
                ):
                    self.observe(self.moved(theta, eta, data), self.told(eta, data), *data.filled)
        return theta

    def told(self, eta: Mapping[str, Tensor], data: Data) -> Mapping[str, Tensor]:
        """eta with the tasks' features that the likelihood depends on."""
        names = () if self.likelihood is None else self.likelihood.features
        return {**eta, **{told(name): data.features[name] for name in names}} if names else eta

    def observe(
        self,
        theta: Tensor,
        eta: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor | None,
        task_chunk_size: int | None = None,
    ) -> Any:
        """Sample, or with y observe, the data given theta `(..., tasks, 1, D)`.

        x `(tasks, points, ...)`.

        task_chunk_size: how many tasks a network runs on at a time, which bounds memory where no
            gradient is taken.
        """
        if self._program is not None:
            return self._program(
                self.weights.unflatten(theta) | {name: eta[name] for name in self.shared}, x, y
            )
        out = self.output(theta, eta, x, task_chunk_size)
        return self.observe_output(out, self._with_task_weights(theta, eta), y, theta.dim() - 1)

    @property
    def task_weights(self) -> tuple[str, ...]:
        """The likelihood's own weights among those that differ between tasks.

        A noise scale of each task is one.
        """
        own = () if self.likelihood is None else self.likelihood.task_weights()
        return tuple(name for name in own if name not in self.shared)

    def _with_task_weights(self, theta: Tensor, eta: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """eta with the likelihood's own weights at theta, `(..., tasks, 1, *shape)`, in the place
        of theta0.
        """
        names = self.task_weights
        if not names:
            return eta
        own = self.weights.unflatten(theta)
        return {**eta, **{name: own[name] for name in names}}

    def output(
        self,
        theta: Tensor,
        eta: Mapping[str, Tensor],
        x: Tensor,
        task_chunk_size: int | None = None,
    ) -> Tensor:
        """What the network puts out for theta `(..., tasks, 1, D)`.

        Of shape `(..., tasks, points, channels)`.
        """
        return self._network(theta.squeeze(-2), eta, x, task_chunk_size)

    def observe_output(
        self, out: Tensor, eta: Mapping[str, Tensor], y: Tensor | None, batch: int
    ) -> Any:
        """Sample, or with y observe, the data given the network's output.

        The output's first `batch` axes are `(..., tasks, points)`.
        """
        assert self.likelihood is not None  # a network has one
        return observe_output(self.likelihood, out, eta, y, batch)

    def _network(
        self,
        theta: Tensor,
        eta: Mapping[str, Tensor],
        x: Tensor,
        task_chunk_size: int | None = None,
    ) -> Tensor:
        """The network's output `(..., tasks, points, channels)` for theta `(..., tasks, D)`."""
        assert self.likelihood is not None
        lead = theta.shape[:-2]
        if lead and math.prod(lead) == 1:  # a single point: nothing to batch over but the tasks
            out = self._network(theta.reshape(theta.shape[-2:]), eta, x, task_chunk_size)
            return out.reshape(*lead, *out.shape)
        aside = self.task_weights
        weights = {
            name: value
            for name, value in self.weights.unflatten(theta).items()
            if name not in aside
        }
        # none where only the likelihood's own weights vary
        known = self.features(eta, x)
        if known is None:
            return network.all_tasks(self.one_task(eta, x), weights, x, lead, task_chunk_size)
        assert self._split is not None
        rest = network.rest_of_one_task(self._split, self._fixed(eta, x))
        return network.all_tasks(rest, weights, (x, *known), lead, task_chunk_size)

    def one_task(self, eta: Mapping[str, Tensor], like: Tensor) -> network.Network:
        """The network at eta's shared parameters, in the precision of `like`.

        Weights of the likelihood are no business of it.
        """
        assert self.net is not None
        return network.one_task(self.net, self._fixed(eta, like))

    def _shared_by_net(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.likelihood is not None
        aside = self.likelihood.task_weights()
        return {name: eta[name] for name in self.shared if name not in aside}

    def _fixed(self, eta: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """What of the network does not vary, by name."""
        assert self.net is not None
        return self._shared_by_net(eta) | constants(self.net, self.constants, like)

    def ahead(
        self,
        eta: Mapping[str, Tensor],
        rows: Sequence[Tensor],
        task_chunk_size: int | None = None,
        known: Features | None = None,
    ) -> TaskModel:
        """The same model, which runs what comes before the weights that vary once.

        Its numbers and their derivatives are this one's.  Where it is asked for the same `rows` at
        the same eta again it runs the rest of the network alone.

        rows: x `(tasks, points, ...)`, the very tensors that it will be asked for.
        known: what is put out for `rows[0]` at eta, so that it need not be run for it.
        Itself where nothing comes before, and where the parts are not the network (`check_cut`).
        """
        parts = self._split
        if parts is None or not self.cut:
            return self
        new = copy.copy(self)
        new._ahead = None
        if rows:
            run = partial(_features, copy.copy(new), parts, dict(eta), task_chunk_size)
            new._ahead = Ahead(run, self._shared_by_net(eta), rows, known)
        return new

    def features(self, eta: Mapping[str, Tensor] | None, x: Tensor) -> Features | None:
        """What comes before the weights that vary puts out for x, where `ahead` was told of it.

        eta: None: the one that `ahead` was told.
        """
        if self._ahead is None:
            return None
        return self._ahead.of(self._ahead.shared if eta is None else eta, x)

    @cached_property
    def _split(self) -> Split | None:
        """The network in two where layers come before all weights that vary; else None."""
        if self.net is None or not (self.shared or self.constants):
            return None
        return split(self.net, self.weights.names)

    @cached_property
    def is_linear(self) -> bool:
        """Whether the output is known to be linear in the weights that vary, by how it is built.

        Of a Pyro program, and of a network with a `forward` of its own, nothing is known: False.
        """
        return self.net is not None and is_linear_in(self.net, self.weights.names)

    @cached_property
    def all_linear(self) -> bool:
        """Whether the output is linear in the weights and the shared parameters together."""
        return self.net is not None and is_linear_in(self.net, (*self.weights.names, *self.shared))

    @cached_property
    def is_linear_gaussian(self) -> bool:
        """Whether every p(theta_i | y_i, eta) is known to be Gaussian.

        By how the model is built.
        """
        return is_gaussian(self.likelihood) and not self.task_weights and self.is_linear

    @property
    def predictive(self) -> TaskModel:
        """The model of new observations, and of the query rows that a fit is judged by.

        Itself, unless the likelihood fits a task's weights by another density.
        """
        if self.likelihood is None or self.likelihood.predictive is self.likelihood:
            return self
        found = copy.copy(self)
        found.likelihood = self.likelihood.predictive
        found.__dict__.pop("is_linear_gaussian", None)
        return found

    def looks_linear(self, tasks: TaskSet) -> bool:
        """Whether the output looks linear in the weights that vary, by second differences.

        Of a program, True.

        Good for choosing where a fit starts and at which points it looks.  It proves nothing, and
        no number may be called exact because of it: see `is_linear`.
        """
        if self.net is None or self.is_linear or not len(tasks.support_rows.x):
            return self.net is None or self.is_linear
        data = tasks.batch().support
        data = data.take(data.num_points.argmax().reshape(1))
        eta = self.init(data.like)
        x = data.filled[0]
        return looks_straight(
            lambda points: self._network(points, eta, x), self.weights.flatten(eta)
        )

    def __repr__(self) -> str:
        program = self._program
        what = type(self.net).__name__ if program is None else name_of(program)
        noise = "" if self.likelihood is None else f", {self.likelihood!r}"
        return f"TaskModel({what}{noise}, {self.weights.size} weights per task)"


def _features(
    model: TaskModel,
    parts: Split,
    eta: Mapping[str, Tensor],
    task_chunk_size: int | None,
    x: Tensor,
) -> Features:
    return network.features(parts, model._fixed(eta, x), x, task_chunk_size)


def negative_log_likelihood(
    model: TaskModel, theta: Tensor, eta: Mapping[str, Tensor], data: Data
) -> tuple[dist.TorchDistribution, Tensor]:
    """The prior of theta, and -log p(data_i | theta), `(points, tasks)`.

    theta is `(points, tasks, 1, D)`.
    """
    trace = poutine.trace(poutine.condition(model, {SITE: theta})).get_trace(eta, data)
    prior = cast("dist.TorchDistribution", trace.nodes[SITE]["fn"])
    if not data.width:
        return prior, theta.new_zeros(theta.shape[:2])
    return prior, -observed_log_prob(trace).sum(-1)
