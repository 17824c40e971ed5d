"""Arguments as plain values, for a file, and the first thing in which two of them differ.

What is code (a forward, a program, a distribution of the user's own) is known by its name alone.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varmeta.files.remember import Remembers

Plain = Any


def plain(value: Any) -> Plain:
    """Any argument as plain values, equal where the arguments mean the same."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Remembers):
        return {"kind": type(value).__name__} | {
            name: plain(one) for name, one in value.constructed_with.items()
        }
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
        # of each module its class and what it says of itself: the place of an activation has no
        # parameters
        parts = {
            name or "itself": f"{type(one).__name__}({one.extra_repr()})"
            for name, one in value.named_modules()
        }
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
        elif parts and all(
            isinstance(one, torch.distributions.transforms.Transform) for one in parts
        ):
            found[name] = [[type(one).__name__, plain(_settings(one))] for one in parts]
    return found


def _settings(transform: Any) -> dict[str, Any]:
    return {
        name: v
        for name, v in vars(transform).items()
        if isinstance(v, (bool, int, float, str, Tensor))
    }


def _numbers(value: Tensor) -> Plain:
    """A few numbers as they are, many by their checksum: a sentence must be able to show what
    differs.
    """
    value = value.detach().cpu()
    if value.numel() <= 8:
        return value.tolist()
    raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def difference(saved: Plain, now: Plain, defaults: Any = None, where: str = "") -> str | None:
    """The first thing that differs, `what was ..., but is ...`; None where nothing does.

    defaults: the object that `now` describes.  An argument that the file does not know came later,
        and had its default then.
    """
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
            found = (difference(a, b, None, where) for a, b in zip(saved, now, strict=True))
            return next((sentence for sentence in found if sentence is not None), None)
        return (
            None
            if _equal(saved, now)
            else f"{where or 'it'} was {_short(saved)}, but is {_short(now)}"
        )
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
        found_here = difference(
            before, now[name], part if isinstance(part, Remembers) else None, place
        )
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
        text = (
            "{" + inside + "}"
            if value.get("kind", "dict") == "dict"
            else f"{value['kind']}({inside})"
        )
    return text if len(text) <= 200 else text[:197] + "..."
