"""How a model was made, as plain values: what a file keeps of it, to tell it from another.

Nobody lists what is kept.  A class that takes part remembers the arguments of its constructor, whatever they are called, so an
argument that is added later is kept too.  What is code (a forward, a program, a distribution of the user's own) is known by its
name, and by what it computes: see `numbers_of`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from varmeta.bayes.model import TaskModel
    from varmeta.tasks import TaskSet

Plain = Any
P = ParamSpec("P")
T = TypeVar("T", bound="Remembers")
# Of the rows of the data, so many are enough to tell two models apart.
TASKS, ROWS = 3, 16


class Remembers:
    """A base of classes that are known again by the arguments of their constructors.

    constructor, constructed_with: what made the object, and the arguments that it got, by name, defaults too.
    """

    # slots: a class may show or compare its own attributes without these
    __slots__ = ("constructed_with", "constructor")

    constructor: Callable[..., Any]
    constructed_with: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        _remember(self, cls.__init__, self, args, kwargs)
        return self


def remembered(make: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """For another constructor (under `classmethod`): what it makes remembers its arguments instead."""

    @functools.wraps(make)
    def making(cls: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        made = make(cls, *args, **kwargs)
        _remember(made, make, cls, args, kwargs)
        return made

    return making


def _remember(made: T, constructor: Callable[..., Any], first: Any, args: Any, kwargs: Any) -> None:
    made.constructor = constructor
    made.constructed_with = {}
    try:
        bound = inspect.signature(constructor).bind(first, *args, **kwargs)
    except (
        TypeError
    ):  # the constructor itself says it better; and a copy is made without arguments, and gets the original's
        return
    bound.apply_defaults()
    made.constructed_with = dict(list(bound.arguments.items())[1:])


# -- a model ------------------------------------------------------------------------------------------------------------


def configuration(model: TaskModel) -> Plain:
    """Everything that the model was made with, but where its weights start and its constants (`bayes/constants.py`).

    A present attribute of an argument's name stands for the argument: prior=None has become a prior, patterns have become names.
    """
    # theta0 and the parameters of a program start anywhere: what was learned takes their place
    return {
        name: plain(getattr(model, name, value)) for name, value in model.constructed_with.items() if name != "params"
    }


def plain(value: Any) -> Plain:
    """Any argument as plain values, equal where the arguments mean the same."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Remembers):
        return {"kind": type(value).__name__} | {name: plain(one) for name, one in value.constructed_with.items()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)):
        return _numbers(torch.as_tensor(value))
    if isinstance(value, Mapping):
        return {"kind": "dict"} | {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(one) for one in value), key=repr)
    if isinstance(value, torch.distributions.Distribution):
        return _distribution(value)
    if isinstance(value, nn.Module):
        # of each module its class and what it says of itself: the place of an activation has no parameters
        parts = {name or "itself": f"{type(one).__name__}({one.extra_repr()})" for name, one in value.named_modules()}
        return {"kind": type(value).__name__} | parts
    return {"kind": "code", "name": getattr(value, "__qualname__", type(value).__qualname__)}


def _distribution(value: Any) -> Plain:
    """Its class and parameters, and the distributions and transforms that it is made of."""
    found: dict[str, Plain] = {"kind": type(value).__name__}
    for name in type(value).arg_constraints:
        found[name] = plain(getattr(value, name))
    for name, part in vars(value).items():
        parts = part if isinstance(part, (list, tuple)) else [part]
        if parts and all(isinstance(one, torch.distributions.Distribution) for one in parts):
            found[name] = plain(part)
        elif parts and all(isinstance(one, torch.distributions.transforms.Transform) for one in parts):
            found[name] = [[type(one).__name__, plain(_settings(one))] for one in parts]
    return found


def _settings(transform: Any) -> dict[str, Any]:
    return {name: v for name, v in vars(transform).items() if isinstance(v, (bool, int, float, str, Tensor))}


def _numbers(value: Tensor) -> Plain:
    """A few numbers as they are, many by their checksum: a sentence must be able to show what differs."""
    value = value.detach().cpu()
    if value.numel() <= 8:
        return value.tolist()
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": hashlib.sha256(raw).hexdigest()}


def difference(saved: Plain, now: Plain, defaults: Any = None, where: str = "") -> str | None:
    """The first thing that differs, `what was ..., but is ...`; None where nothing does.

    defaults: the object that `now` describes.  An argument that the file does not know came later, and had its default then.
    """
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
            found = (difference(a, b, None, where) for a, b in zip(saved, now, strict=True))
            return next((sentence for sentence in found if sentence is not None), None)
        return None if _equal(saved, now) else f"{where or 'it'} was {_short(saved)}, but is {_short(now)}"
    if saved.get("kind") != now.get("kind"):
        return f"{where or 'it'} was {_short(saved)}, but is {_short(now)}"
    known = _defaults(defaults)
    for name in [*saved, *(name for name in now if name not in saved)]:
        place = f"{where}.{name}" if where else name
        if name not in now:
            return f"{place} was {_short(saved[name])}, but is not there"
        if name not in saved and name not in known:
            return f"{place} was not there, but is {_short(now[name])}"
        part = getattr(defaults, name, known.get(name))
        before = saved[name] if name in saved else plain(known[name])
        found_here = difference(before, now[name], part if isinstance(part, Remembers) else None, place)
        if found_here is not None:
            return found_here
    return None


def _defaults(value: Any) -> dict[str, Any]:
    if not isinstance(value, Remembers):
        return {}
    own = inspect.signature(value.constructor).parameters.values()
    return {p.name: p.default for p in own if p.default is not inspect.Parameter.empty}


def _equal(one: Plain, other: Plain) -> bool:
    if isinstance(one, float) and isinstance(other, float) and one != one and other != other:
        return True
    return bool(one == other)


def _short(value: Plain) -> str:
    """Plain values as their maker would write them."""
    if not isinstance(value, dict):
        text = repr(value)
    elif value.get("kind") == "code":
        text = str(value["name"])
    else:
        inside = ", ".join(f"{name}={_short(one)}" for name, one in value.items() if name != "kind")
        text = "{" + inside + "}" if value.get("kind", "dict") == "dict" else f"{value['kind']}({inside})"
    return text if len(text) <= 200 else text[:197] + "..."


# -- what it computes ---------------------------------------------------------------------------------------------------


def numbers_of(model: TaskModel, tasks: TaskSet, eta: Mapping[str, Tensor]) -> Tensor:
    """What the model makes of eta and of a few rows of data, float64: log densities of the prior, of y, and of the hyperpriors.

    At theta0 and two prior sds around it, of at most three tasks and sixteen rows each.  Code is told apart by it, and what an
    argument means to another version.
    """
    from varmeta.bayes.model import negative_log_likelihood  # here: a model is known by its configuration

    some = tasks[: min(TASKS, len(tasks))].batch()
    with torch.no_grad():
        prior = model.prior_distribution(eta)
        sd = prior.stddev
        # of either sign and unequal, so that no two weights stand for each other
        step = torch.cos(torch.arange(1.0, len(sd) + 1.0, dtype=torch.float64)).to(sd) * sd
        points = torch.stack([prior.mean, prior.mean + step, prior.mean - 2.0 * step])
        found = [prior.log_prob(points), torch.as_tensor(model.penalty(eta)).to(sd).reshape(1)]
        theta = points[:, None, None].expand(-1, len(some), 1, -1)
        for data in (some.support, some.query):
            if data is not None and data.mask.shape[1]:
                few = data.first_points(min(ROWS, data.mask.shape[1]))
                found.append(negative_log_likelihood(model, theta, eta, few)[1].reshape(-1))
    return torch.cat([part.double().cpu().reshape(-1) for part in found])


def same_numbers(saved: Tensor, now: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to what another machine's order of sums makes of them; what is not finite must stay so."""
    if saved.shape != now.shape:
        return False
    slack = torch.finfo(dtype).eps ** 0.5
    return bool(torch.allclose(saved, now, rtol=slack, atol=slack, equal_nan=True))
