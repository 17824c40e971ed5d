"""Whether a row's output depends on the task's other rows: then padding is no padding.

Batch statistics, a mean over the support and attention between points do that.  A short task would
see the rows that fill it up, and what is computed would be of other data.  Where no task is padded
nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import observed_log_prob
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data

# Rows that are looked at, and what two results of the same numbers may differ by, relative to the
# largest: rounding in the double precision of the test, and in a network that computes in single
# precision whatever it is given.
ROWS, TOLERANCE = 16, 1e-5
# The same where the network does not run in double precision: on some devices single precision
# keeps ten bits.
COARSE = 1e-2
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)

Read = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def check_padding(model: TaskModel, data: Data, with_y: bool = True) -> None:
    """Raise ValueError where a task of `data` is padded and the model's rows depend on each other.

    with_y: whether `data` has observations; of a program without them they are drawn.
    """
    sizes = data.num_points[data.num_points > 0]
    if not len(sizes) or bool((sizes == data.width).all()):
        return
    where = rows_meet(model, data, with_y)
    if where is not None:
        raise ValueError(
            f"{where}: a row's result depends on the task's other rows (batch statistics, a mean "
            f"over the rows, attention between them?), and these tasks have {int(sizes.min())} to "
            f"{int(sizes.max())} rows, so that short ones are padded and would meet their padding: "
            "give all the same number of rows (supports alike, queries alike), or use what looks "
            "at one row at a time"
        )


def rows_meet(
    model: TaskModel, data: Data, with_y: bool = True, reorder: bool = False
) -> str | None:
    """Where rows of one task meet: a layer, "the network" or "the program".

    None where a row stands for itself.

    A task is run alone and followed by other rows, at the start and at a point away from it, where
    a layer that starts at 0 shows too.  No other sizes than of these two runs are tried, and
    differences below 1e-5 pass.
    reorder: also in another order, which padding leaves alone, and a minibatch of rows does not.
    """
    rows, observed = data.flat()
    if len(rows) < 2:
        return None
    at = torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)), device=rows.device).long()
    x, y = rows[at], observed[at] if with_y else None
    for dtype, tolerance in ((torch.float64, TOLERANCE), (x.dtype, COARSE)):
        try:
            return _where(model, x.to(dtype), y, tolerance, reorder)
        except _ERRORS:  # not every network runs in double precision
            continue
    # with the numbers of rows that the tasks have it runs, with others not
    return "the program" if model.net is None else "the network"


def _where(
    model: TaskModel, x: Tensor, y: Tensor | None, tolerance: float, reorder: bool
) -> str | None:
    few = (len(x) + 1) // 2
    eta = model.init(x.new_zeros(()))
    # a theta0 that is held has no entry in eta, but its weights differ between tasks like the
    # others
    eta |= model.weights.unflatten(model.weights.flatten(eta))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(few), *([torch.arange(len(x)).flip(0)] if reorder else [])]
    with torch.no_grad(), validation_enabled(False), torch.random.fork_rng(devices=[]):
        if y is not None and y.is_floating_point():
            y = y.to(x.dtype)
        elif y is None and model.net is None:
            torch.default_generator.manual_seed(0)
            y = _drawn(model, eta, x)
        for away in (0.0, 1.0):
            here = moved_by(away, eta, generator)
            read = _reader(model, here)
            try:
                whole = read(x, y)
            except _ERRORS:
                if away:  # a program need not have a density everywhere
                    return None
                raise
            for order in (order.to(x.device) for order in orders):
                part = read(x[order], None if y is None else y[order])
                if _differ(part, whole[order], tolerance):
                    return (
                        "the program"
                        if model.net is None
                        else _layer(model.net, read, x, x[order], order, tolerance)
                    )
    return None


def _reader(model: TaskModel, eta: dict[str, Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """What is compared, rows first: a network's output, a program's log density."""
    own = {name: eta[name] for name in model.weights.names}
    if model.net is not None:
        run = model.one_task(eta, next(iter(eta.values())))
        weights = {name: value for name, value in own.items() if name not in model.task_weights}
        return lambda x, y: run(weights, x)
    theta = model.weights.flatten(own).reshape(1, 1, -1)

    def log_density(x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        program = poutine.trace(lambda: model.observe(theta, eta, x.unsqueeze(0), y.unsqueeze(0)))
        with pyro.get_param_store().scope():
            return observed_log_prob(program.get_trace(), (1, len(x)))[0]

    return log_density


def _drawn(model: TaskModel, eta: dict[str, Tensor], x: Tensor) -> Tensor:
    theta = model.weights.flatten(eta).reshape(1, 1, -1)
    trace = poutine.trace(lambda: model.observe(theta, eta, x.unsqueeze(0), None)).get_trace()
    site: Any
    (site,) = (
        s
        for s in trace.nodes.values()
        if s["type"] == "sample" and not poutine.util.site_is_subsample(s)
    )
    drawn: Tensor = site["value"][0]
    return drawn


def moved_by(
    away: float, eta: dict[str, Tensor], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """eta and `away` times what a network's start varies by, drawn."""
    generator = generator or torch.Generator().manual_seed(0)
    return {
        name: value + away * _size(value) * _normal(value, generator) for name, value in eta.items()
    }


def _size(value: Tensor) -> float:
    """As large as PyTorch's own starts: 1 over the root of the fan-in."""
    return max(1, value.numel() // max(1, value.shape[0])) ** -0.5 if value.dim() else 0.1


def _normal(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    size = (
        other[other.isfinite()].abs().max() if bool(other.isfinite().any()) else other.new_ones(())
    )
    return not torch.allclose(one, other, rtol=0.0, atol=tolerance * float(size), equal_nan=True)


def _layer(
    net: nn.Module,
    read: Callable[[Tensor, None], Tensor],
    whole: Tensor,
    part: Tensor,
    order: Tensor,
    tolerance: float,
) -> str:
    """The first layer whose output differs though its input does not; else where among the
    network's layers it happens.
    """
    found: list[tuple[str, tuple[Any, ...], Any]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, out, name=name: found.append(
                (f"layer {name!r} ({type(module).__name__})", args, out)
            )
        )
        for name, module in net.named_modules()
        if name
    ]
    try:
        read(whole, None)
        long, found = found, []
        read(part, None)
    finally:
        for hook in hooks:
            hook.remove()

    def moved(one: Any, other: Any) -> bool:
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        rows = one.shape[:1] == part.shape[:1] and other.shape[:1] == whole.shape[:1]
        return rows and _differ(one, other[order], tolerance)

    for (name, args, out), (_, others, other) in zip(found, long, strict=False):
        if any(moved(*pair) for pair in zip(args, others, strict=False)):
            return f"the network, before {name}"
        if moved(out, other):
            return name
    return "the network"
