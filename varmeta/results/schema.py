"""What the content of a saved fit looks like, checked before anything is made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varmeta.models.hyper_posterior import HyperPosterior

Check = Callable[[Any], bool]


def is_a(*kinds: type) -> Check:
    # exactly: True is no number here
    return lambda value: type(value) in kinds


def list_of(check: Check) -> Check:
    return lambda value: type(value) is list and all(map(check, value))


def dict_of(check: Check) -> Check:
    return lambda value: (
        type(value) is dict and all(type(k) is str and check(v) for k, v in value.items())
    )


def pair_of(*checks: Check) -> Check:
    return lambda value: (
        type(value) in (tuple, list)
        and len(value) == len(checks)
        and all(check(one) for check, one in zip(checks, value, strict=True))
    )


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def fields_of(**checks: Check) -> Check:
    return lambda value: (
        type(value) is dict
        and set(value) == set(checks)
        and all(checks[k](value[k]) for k in value)
    )


def anything(value: Any) -> bool:
    return True


def is_optimizer(value: Any) -> bool:
    return type(value) is dict and {"state", "param_groups"} <= set(value)


def columns(value: Any) -> bool:
    """Whether it is a history by columns, of which every row has what `RECORD` names."""
    if not dict_of(pair_of(tensor, tensor))(value) or not (value == {} or set(value) >= RECORD):
        return False
    number = len(value["step"][0]) if value else 0
    return all(
        at.dtype == torch.int64
        and at.dim() == 1
        and at.shape == values.shape
        and values.dtype in (torch.int64, torch.float64)
        and (name not in RECORD or len(at) == number)
        and bool(((at >= 0) & (at < number)).all())
        for name, (at, values) in value.items()
    )


text, number, whole, truth, tensor = (
    is_a(str),
    is_a(int, float),
    is_a(int),
    is_a(bool),
    is_a(Tensor),
)
numbers = dict_of(lambda value: tensor(value) and value.is_floating_point())
data = optional(pair_of(tensor, tensor))
RECORD = {"step", "loss", "evaluations", "seconds"}
# as it was before it became columns
rows = list_of(lambda row: dict_of(number)(row) and set(row) >= RECORD)
counters = fields_of(step=whole, lr_scale=number)
best = fields_of(
    step=whole,
    value=number,
    eta=numbers,
    phi=optional(numbers),
    inner=optional(dict_of(tensor)),
    counters=counters,
    optimizer=is_optimizer,
)
HYPER: dict[str, Check] = {
    field.name: text
    if field.name == "hyperguide"
    else numbers
    if field.name == "points"
    else lambda v: tensor(v) or number(v)
    for field in dataclasses.fields(HyperPosterior)
}
# what both formats hold
FIELDS: dict[str, Check] = {
    "strategy": text,
    "weights": text,
    "covariance": tensor,
    "seed": whole,
    "eta": lambda value: numbers(value) and bool(value),
    "phi": optional(numbers),
    "inner": optional(dict_of(tensor)),
    "counters": counters,
    "history": lambda value: rows(value) or columns(value),
    "optimizer": optional(is_optimizer),
    "stop": text,
    "converged": truth,
    "loss": number,
    "schedule": optional(text),
    "tasks": list_of(pair_of(text, data, data)),
    "hyper": optional(
        lambda value: fields_of(**HYPER)(value) or fields_of(points=numbers, losses=tensor)(value)
    ),
    "features": list_of(dict_of(number)),
    "x_names": optional(lambda value: type(value) in (tuple, list) and all(map(text, value))),
}
CHECKPOINT: dict[str, Check] = {
    "settings": dict_of(anything),
    "versions": dict_of(text),
    "begun": tensor,
    "random": tensor,
    "finished": truth,
    "watched": optional(fields_of(last=whole, worse=whole, best=optional(best))),
}
SCALING: dict[str, Check] = {
    **dict.fromkeys(("x_loc", "x_scale", "y_loc", "y_scale"), tensor),
    "features": dict_of(pair_of(number, number)),
    "told": truth,
}
PRESENT: dict[str, Check] = {
    **FIELDS,
    "model": text,
    "design": optional(text),
    "constants": text,
    "numbers": optional(tensor),
    "version": text,
    "kept": optional(whole),
    "streamed": optional(whole),
    "left_out": optional(pair_of(whole, text)),
    "checkpoint": optional(fields_of(**CHECKPOINT)),
    "scaling": optional(fields_of(**SCALING)),
}
# what the first files of the present format do not have
LATER = {"design", "kept", "streamed", "left_out", "checkpoint", "scaling"}
BEFORE: dict[str, Check] = {**FIELDS, "likelihood": text}


def fault(content: Any, checks: dict[str, Check]) -> str | None:
    """The first thing that is not as a fit has it, in words; None where all is."""
    if type(content) is not dict:
        return "it holds no fit"
    missing = [name for name in checks if name not in content and name not in LATER]
    if missing:
        return f"it lacks {missing}"
    wrong = [name for name, check in checks.items() if not check(content.get(name))]
    if wrong:
        return f"its {wrong[0]!r} is not what a fit holds there"
    eta, tasks = content["eta"], content["tasks"]
    if len({value.dtype for value in eta.values()}) != 1:
        return "its 'eta' has several dtypes"
    if not tasks or len(content["features"]) != len(tasks):
        return f"it has {len(tasks)} tasks and the features of {len(content['features'])}"
    if content["counters"]["step"] < 0 or content["seed"] < 0:
        return "it counts below 0"
    absent = content.get("left_out")
    number = len(tasks) if absent is None else absent[0]
    for name in ("phi", "inner"):
        rows = {key: tuple(value.shape[:1]) for key, value in (content[name] or {}).items()}
        if any(size != (number,) for size in rows.values()):
            return f"its {name!r} has not one row for each of its {number} tasks"
    return None
