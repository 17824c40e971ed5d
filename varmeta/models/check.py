"""A model tried on the data once, before any work.

What does not fit is said in the user's words.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from varmeta._checks import counted
from varmeta.graphs.process import ALONE
from varmeta.likelihoods.base import Likelihood, told
from varmeta.models.check_cut import check_cut
from varmeta.models.check_net import (
    check_batching,
    check_columns,
    layer_entered,
    warn_unless_twice_differentiable,
)
from varmeta.models.check_rows import ROWS, check_padding
from varmeta.models.check_ways import check_ways, unsaid_ways
from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import (
    DATA,
    SITE,
    TASKS,
    RefusePlates,
    observed_log_prob,
    without_shapes,
)
from varmeta.models.tokens import check_tokens
from varmeta.priors.covariates import check_features
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data, TaskSet
from varmeta.tasks.rows import Rows

# Up to so many numbers that a network computes on the way, all tasks are run at once; beyond, one
# of each size.
EVERYONE = 4_000_000
# A number beyond it, or below one part of it, has no square in float64.
LARGEST = 1e150
# Rows of one task that are enough to try a density that is known.
MANY_ROWS = 10_000
# something else is wrong with the program, and whoever runs it next says what
ELSEWHERE_WRONG = (RuntimeError, ValueError, IndexError, NotImplementedError)


def check_model(model: TaskModel, tasks: TaskSet, eta: Mapping[str, Tensor] | None = None) -> None:
    """Try the model on the data with every check of Pyro and PyTorch on; say what does not fit.

    Every observation is looked at, and run through a program or a likelihood.  A network is run on
    its largest and smallest task, and on all where that is cheap: its memory does not grow with the
    number of tasks.  eta: where it is tried; None: where it starts.

    Raises ValueError for observations outside the likelihood's support (naming task and row), where
    the program or network does not fit the data, and where tasks are padded and a task's rows
    depend on each other.
    """
    if tasks.dtype.itemsize < 4:
        raise ValueError(
            f"the tasks are in half precision ({str(tasks.dtype).removeprefix('torch.')}), in "
            "which sums of densities and linear solves lose every digit: use "
            "tasks.to(torch.float32)"
        )
    check_columns(model.net, tasks)
    check_features(model.coefficients, tasks.feature_names)
    if model.likelihood is not None and model.likelihood.features:
        check_ways(model.likelihood, tasks)
    if model.likelihood is not None:
        for rows in (tasks.support_rows, tasks.query_rows):
            check_observations(model.likelihood, rows, tasks.names)
    if model.all_linear and model.is_linear_gaussian:
        for rows in (tasks.support_rows, tasks.query_rows):
            _check_squares(rows, tasks.names)
        _try_largest(model, tasks, eta)
        return
    batch = tasks.batch()
    parts = [data for data in (batch.support, batch.query) if data is not None and data.width]
    eta = _start(model, tasks) if eta is None else eta
    for data in parts:
        if model.net is None:
            for _, group in batch.by_size():
                some = group.support if data is batch.support else group.query
                if some is not None and some.width:
                    _try(model, eta, some, group.names)
            continue
        look_at_tokens(model, data, eta)
        sizes = data.num_points
        largest = int(sizes.argmax())
        one = _alone(data, largest)
        with Counted() as counted_numbers:
            _try(model, eta, one, batch.names[largest : largest + 1])
        if counted_numbers.total * len(data) + len(data) * model.weights.size <= EVERYONE:
            _try(model, eta, data, batch.names)
        else:
            smallest = int(sizes.masked_fill(sizes == 0, sizes[largest] + 1).argmin())
            if smallest != largest:
                _try(model, eta, _alone(data, smallest), batch.names[smallest : smallest + 1])
            check_outcomes(model, eta, data, batch.names)
        some = one.take(torch.zeros(2, dtype=torch.int64, device=one.mask.device)).first_points(
            ROWS
        )

        def loss(theta: Tensor, some: Data = some) -> Tensor:
            these = {SITE: theta.reshape(1, -1, 1, model.weights.size)}
            data = some.take(slice(0, 1)).first_points(2) if theta.dim() == 1 else some
            with validation_enabled(False):
                return observed_log_prob(
                    poutine.trace(poutine.condition(model, these)).get_trace(eta, data)
                ).sum()

        theta = model.weights.flatten(eta)
        check_batching(model.weights, loss, theta)
        warn_unless_twice_differentiable(model.net, loss, theta, some.x[0, :2])
        check_cut(model, eta, data)
    for data in parts:
        check_padding(model, data)


def ways_left_unsaid(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where tasks look like episodes of fewer classes than the model has; else None."""
    likelihood = model.likelihood
    if likelihood is None or likelihood.kind != "classification":
        return None
    return unsaid_ways(model, tasks)


def _start(model: TaskModel, tasks: TaskSet) -> dict[str, Tensor]:
    return model.init(torch.zeros((), dtype=tasks.dtype, device=tasks.device))


def _try_largest(model: TaskModel, tasks: TaskSet, eta: Mapping[str, Tensor] | None) -> None:
    """Of layers and a density that are known one task tells for all: every row has its shape."""
    eta = _start(model, tasks) if eta is None else eta
    sizes = tasks.support_rows.counts, tasks.query_rows.counts
    for part, counts in enumerate(sizes):
        largest = int(counts.argmax())
        if not int(counts[largest]):
            continue
        one = tasks[[largest]].batch()
        data = one.query if part else one.support
        assert data is not None
        _try(model, eta, data.first_points(min(MANY_ROWS, data.width)), one.names)


def look_at_tokens(model: TaskModel, data: Data, eta: Mapping[str, Tensor] | None = None) -> None:
    """Raise ValueError where an embedding of the network is given no rows of it.

    The network is run, where it has one, on rows of all tasks as if they were one's.  eta: where;
    None: where it starts.
    """

    def run(x: Tensor) -> None:
        at = model.init(data.like) if eta is None else eta
        own = model.weights.unflatten(model.weights.flatten(at))
        with torch.no_grad():
            model.one_task(at, x)({n: v for n, v in own.items() if n not in model.task_weights}, x)

    check_tokens(model.net, data, run)


def _alone(data: Data, task: int) -> Data:
    return data.take(slice(task, task + 1), int(data.num_points[task]))


def _try(model: TaskModel, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]) -> None:
    """Run the program once on these tasks, at two points theta."""
    loc = model.weights.flatten(eta).expand(2, len(data), 1, model.weights.size)
    program = poutine.trace(poutine.condition(model, {SITE: loc}))
    own = replace(
        data
    )  # whose `filled` is a copy: a network may write into its input, and is found out below
    with _quiet(), validation_enabled(True), layer_entered(model.net) as place:
        try:
            with RefusePlates({TASKS, DATA}):
                trace = program.get_trace(eta, own)
            trace.compute_log_prob()
        except KeyError as error:
            if model.likelihood is not None:
                raise ValueError(
                    f"{type(model.likelihood).__name__} reads {error}, of which nothing is known: "
                    "what a likelihood learns, its init returns under that name"
                ) from error
            raise ValueError(
                f"the program raises KeyError: {error}; its params are {list(model.start)}: use "
                "one of these names, or name it in params"
            ) from error
        except TypeError as error:
            if model.net is None or "required positional argument" not in str(error):
                raise
            raise ValueError(
                f"the network's forward is given x alone: {error}.  Of several inputs make one x, "
                "see vm.Parts"
            ) from error
        except (RuntimeError, ValueError, IndexError) as error:
            with validation_enabled(False):
                _check_support(program, eta, data, names)
                if model.net is None:
                    _check_start(program, eta, data, names, model.start)
            one = len(names) == 1
            x, y = (tuple(values.shape[one:]) for values in (data.x, data.y))
            who, what = (
                (f"task {names[0]!r}", "points") if one else ("these tasks", "tasks and points")
            )
            why = without_shapes(error)
            if "randomness error mode" in why:
                why = (
                    "it draws random numbers, so that its value is not one: the guide and the "
                    "likelihood are what is random"
                )
            raise ValueError(
                f"the model does not run on {who} (x {x}, y {y}, {what} first){place()}: {why}"
            ) from error
        if own.filled[0]._version:
            named = model.net.named_modules() if model.net is not None else ()
            layers = [name for name, module in named if getattr(module, "inplace", False)]
            raise ValueError(
                "the network writes into its input, and so into the data (layers with "
                f"inplace=True: {layers}): use inplace=False, and operations without an underscore"
            )
    params = [name for name, site in trace.nodes.items() if site["type"] == "param"]
    if params:
        raise ValueError(
            f"the program calls pyro.param for {params}: name them in params, with shared={params}"
        )
    observed_log_prob(trace, (2, *data.mask.shape))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No gradients, and nothing left in Pyro's store."""
    with (
        ALONE,
        pyro.settings.context(module_local_params=True),
        pyro.get_param_store().scope(),
        torch.no_grad(),
    ):
        yield


class Counted(TorchFunctionMode):
    """Counts the numbers that operations within it put out, `total`, and those of the `largest`.

    What runs for many points or tasks counts as for one.
    """

    total: int = 0
    largest: int = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.total += out.numel()
            self.largest = max(self.largest, out.numel())
        return out


def check_outcomes(
    model: TaskModel, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]
) -> None:
    """Refuse what no output could explain: every observation is put under that of one row.

    Raises ValueError that names task and row.
    """
    assert model.likelihood is not None
    theta = model.weights.flatten(eta).reshape(1, 1, -1)
    with _quiet():
        x, y = data.flat()
        out = model.output(theta, eta, x[:1].unsqueeze(0))
        own = {
            **eta,
            **{name: eta[name].expand(1, 1, *eta[name].shape) for name in model.task_weights},
            # rows of all tasks stand as one; what each task says of itself has been looked at
            **{told(name): out.new_full((1,), math.inf) for name in model.likelihood.features},
        }

        def program() -> None:
            model.observe_output(out.expand(1, len(y), *out.shape[2:]), own, y.unsqueeze(0), 2)

        site: Any = poutine.trace(program).get_trace().nodes["y"]
        bad = ~site["fn"].support.check(site["value"]).expand(1, len(y))[0]
        for place in bad.nonzero()[:1].flatten().tolist():
            ends = data.num_points.cumsum(0)
            task = int(torch.searchsorted(ends, place, right=True))
            row = place - int(ends[task] - data.num_points[task])
            _refuse(y[place], names[task], row, site["fn"])


def _check_squares(rows: Rows, names: tuple[str, ...]) -> None:
    """Refuse numbers whose squares float64 does not hold, which would be lost on the way."""
    for what, values in (("x", rows.x), ("y", rows.y)):
        if not (values.is_floating_point() and values.numel()):
            continue
        size = values.abs().reshape(len(values), -1).amax(1)
        largest, first = (part.item() for part in size.max(0))
        # columns of tiny numbers are whitened
        if (what == "y" and 0.0 < largest < 1.0 / LARGEST) or largest > LARGEST:
            task, _ = rows.place(int(first))
            raise ValueError(
                f"the largest number of {what}, in task {names[task]!r}, is {largest:g}: float64 "
                "does not hold its square, so give it in other units"
            )


def check_observations(likelihood: Likelihood, rows: Rows, names: tuple[str, ...]) -> None:
    if not len(rows.x):
        return
    bad, support = likelihood.invalid(rows.y)
    bad = bad.reshape(len(bad), -1).any(-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        task, row = rows.place(first)
        raise ValueError(
            f"task {names[task]!r}, row {row}: y = {rows.y[first].tolist()} is outside the "
            f"support of {type(likelihood).__name__}: expected {support} (rows are counted within "
            "the task, from 0)"
        )


def _refuse(y: Tensor, name: str, row: int, fn: Any) -> NoReturn:
    raise ValueError(
        f"task {name!r}, row {row}: y = {y.tolist()} is outside the support "
        f"of {type(fn).__name__}: expected {_support_of(fn)} (rows are counted within the task, "
        "from 0)"
    )


def _check_support(
    program: Any, eta: Mapping[str, Tensor], data: Data, names: tuple[str, ...]
) -> None:
    """Raise a ValueError that names the task and row of an observation outside its distribution's
    support.
    """
    try:
        trace = program.get_trace(eta, data)
        sites = [
            site for name, site in trace.nodes.items() if site["type"] == "sample" and name != SITE
        ]
        found = [
            (site, ~site["fn"].support.check(site["value"]).expand(2, *data.mask.shape)[0])
            for site in sites
            if site["is_observed"]
        ]
    except ELSEWHERE_WRONG:
        return
    for site, bad in found:
        for task, row in (bad & data.mask).nonzero()[:1].tolist():
            _refuse(data.y[task, row], names[task], row, site["fn"])


def _check_start(
    program: Any,
    eta: Mapping[str, Tensor],
    data: Data,
    names: tuple[str, ...],
    params: Iterable[str],
) -> None:
    """Raise a ValueError that names the task and row where a parameter of an observation's
    distribution is not one.

    A nonlinear program left to start at zeros often divides by zero there.
    """
    try:
        sites = program.get_trace(eta, data).nodes
    except ELSEWHERE_WRONG:
        return
    shape = (2, *data.mask.shape)
    start = ", ".join(
        f"{name} = {eta[name].item():g}"
        for name in params
        if name in eta and eta[name].numel() == 1
    )
    for name, site in sites.items():
        fn = (
            site["fn"]
            if site["type"] == "sample" and site["is_observed"] and name != SITE
            else None
        )
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
                    f"task {names[task]!r}, row {row}: {what} of {type(fn).__name__} is "
                    f"{_entry(value, task, row)} where the fit would start "
                    f"({start or 'at zeros, or at the tensors in params'}): start elsewhere, by "
                    "tensors in params, such as {'name': torch.tensor(1.0)}, or by "
                    "GaussianPrior(loc={'name': 1.0})"
                )


def _entry(value: Tensor, task: int, row: int) -> str:
    if value.dim() >= 3:
        value = value[0, min(task, value.shape[1] - 1), min(row, value.shape[2] - 1)]
    return ", ".join(f"{number:g}" for number in value.reshape(-1)[:3].tolist())


def _support_of(fn: Any) -> str:
    if not isinstance(fn, dist.Categorical):
        return str(fn.support)
    classes = fn.probs.shape[-1]
    return (
        f"a class 0, ..., {classes - 1}, since the network puts out {counted(classes, 'number')}: "
        "one for each class is needed"
    )
