"""A model tried on the data once, before any work: what does not fit is said in the user's words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from varmeta._words import counted
from varmeta.bayes.check_net import check_columns, layer_entered, warn_unless_twice_differentiable
from varmeta.bayes.covariates import check_features
from varmeta.bayes.likelihood import Likelihood
from varmeta.bayes.program import DATA, SITE, TASKS, RefusePlates, observed_log_prob, without_shapes
from varmeta.tasks import Data, TaskSet

if TYPE_CHECKING:
    from varmeta.bayes.model import TaskModel


def check_model(model: TaskModel, tasks: TaskSet) -> None:
    """Run the program once with every check of Pyro and PyTorch on; say what does not fit.

    Raises ValueError for observations outside the likelihood's support (naming task and row), and where the program
    or network does not fit the data.
    """
    check_columns(model.net, tasks)
    check_features(model.coefficients, tasks.feature_names)
    if model.likelihood is not None:
        _check_observations(model.likelihood, tasks)
    batch = tasks.batch()
    eta = model.init(torch.zeros((), dtype=tasks.dtype, device=batch.support.mask.device))
    for data in (batch.support, batch.query):
        if data is None or not data.mask.shape[1]:
            continue
        loc = model.weights.flatten(eta).expand(2, len(data), 1, model.weights.size)
        program = poutine.trace(poutine.condition(model, {SITE: loc}))
        with (
            pyro.settings.context(module_local_params=True),
            pyro.get_param_store().scope(),
            torch.no_grad(),
            pyro.validation_enabled(True),
            layer_entered(model.net) as place,
        ):
            try:
                with RefusePlates({TASKS, DATA}):
                    trace = program.get_trace(eta, data)
                trace.compute_log_prob()
            except KeyError as error:
                raise ValueError(
                    f"the program raises KeyError: {error}; its params are {list(model.start)}: use one of these names, "
                    "or name it in params"
                ) from error
            except (RuntimeError, ValueError, IndexError) as error:
                with pyro.validation_enabled(False):
                    _check_support(program, eta, data, batch.names)
                    if model.net is None:
                        _check_start(program, eta, data, batch.names, model.start)
                raise ValueError(
                    f"the model does not run on these tasks (x {tuple(data.x.shape)}, y {tuple(data.y.shape)}, "
                    f"tasks and points first){place()}: {without_shapes(error)}"
                ) from error
        params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
        if params:
            raise ValueError(f"the program calls pyro.param for {params}: name them in params, with shared={params}")
        observed_log_prob(trace, (2, *data.mask.shape))
        if model.net is not None:
            some = data.take(data.num_points.argmax().reshape(1))
            few = some.first_points(2)

            def loss(theta: Tensor, few: Data = few) -> Tensor:
                one = {SITE: theta.reshape(1, 1, -1)}
                with pyro.validation_enabled(False):
                    return observed_log_prob(poutine.trace(poutine.condition(model, one)).get_trace(eta, few)).sum()

            warn_unless_twice_differentiable(model.net, loss, model.weights.flatten(eta), few.x[0])


def _check_observations(likelihood: Likelihood, tasks: TaskSet) -> None:
    for task in tasks:
        for part in (task.support, task.query):
            if part is None or not len(part[1]):
                continue
            bad, support = likelihood.invalid(part[1])
            if bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"task {task.name!r}, row {row}: y = {part[1][row].tolist()} is outside the support of "
                    f"{type(likelihood).__name__}: expected {support} (rows are counted within the task, from 0)"
                )


def _check_support(program: Any, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]) -> None:
    """Raise a ValueError that names the task and row of an observation outside its distribution's support."""
    try:
        trace = program.get_trace(eta, data)
        sites = [site for name, site in trace.nodes.items() if site["type"] == "sample" and name != SITE]
        found = [
            (site, ~site["fn"].support.check(site["value"]).expand(2, *data.mask.shape)[0])
            for site in sites
            if site["is_observed"]
        ]
    except (RuntimeError, ValueError, IndexError, NotImplementedError):  # something else is wrong: the caller says what
        return
    for site, bad in found:
        for task, row in (bad & data.mask).nonzero()[:1].tolist():
            raise ValueError(
                f"task {names[task]!r}, row {row}: y = {data.y[task, row].tolist()} is outside the support of "
                f"{type(site['fn']).__name__}: expected {_support_of(site['fn'])} (rows are counted within the task, from 0)"
            )


def _check_start(
    program: Any, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...], params: Iterable[str]
) -> None:
    """Raise a ValueError that names the task and row where a parameter of an observation's distribution is not one.

    A nonlinear program left to start at zeros often divides by zero there.
    """
    try:
        sites = program.get_trace(eta, data).nodes
    except (RuntimeError, ValueError, IndexError, NotImplementedError):  # something else is wrong: the caller says what
        return
    shape = (2, *data.mask.shape)
    start = ", ".join(f"{name} = {eta[name].item():g}" for name in params if name in eta and eta[name].numel() == 1)
    for name, site in sites.items():
        fn = site["fn"] if site["type"] == "sample" and site["is_observed"] and name != SITE else None
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        for what, constraint in getattr(fn, "arg_constraints", {}).items():
            value = getattr(fn, what, None)
            if not isinstance(value, Tensor):
                continue
            bad = ~constraint.check(value)
            try:  # one number for all rows, or several for each
                bad = bad.expand(shape) if bad.dim() <= 3 else bad.flatten(3).any(-1).expand(shape)
            except RuntimeError:  # an event of several numbers, which belongs to no row
                continue
            for task, row in (bad[0] & data.mask).nonzero()[:1].tolist():
                raise ValueError(
                    f"task {names[task]!r}, row {row}: {what} of {type(fn).__name__} is {_entry(value, task, row)} where the fit "
                    f"would start ({start or 'at zeros, or at the tensors in params'}): start elsewhere, by tensors in params, "
                    "such as {'name': torch.tensor(1.0)}, or by GaussianPrior(loc={'name': 1.0})"
                )


def _entry(value: Tensor, task: int, row: int) -> str:
    if value.dim() >= 3:
        value = value[0, min(task, value.shape[1] - 1), min(row, value.shape[2] - 1)]
    return ", ".join(f"{number:g}" for number in value.reshape(-1)[:3].tolist())


def _support_of(fn: Any) -> str:
    if not isinstance(fn, dist.Categorical):
        return str(fn.support)
    classes = fn.probs.shape[-1]
    return f"a class 0, ..., {classes - 1}, since the network puts out {counted(classes, 'number')}: one for each class is needed"
