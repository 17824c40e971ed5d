"""Plain values and tensors as bytes under a checksum, and back; nothing in them can be run.

    varmeta fit 4\\n  sha256 of all that follows, 64 digits \\n  length of the words, 16 digits \\n
    words (JSON)  numbers

The words hold every plain value, and of a tensor its dtype and shape; the tensors' numbers follow
in their order, little endian.  So a file holds as many numbers as it has bytes for, and no reader
need trust it for more.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor

MAGIC = b"varmeta fit 4\n"
DIGEST, LENGTH = 64, 16
HEADER = len(MAGIC) + DIGEST + 1 + LENGTH + 1
DTYPES: dict[str, torch.dtype] = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class DamagedError(ValueError):
    """Bytes that were not written by `packed`, or not all of them."""


def packed(content: Any) -> list[bytes]:
    """The bytes of nested dicts, lists and tuples of plain values and tensors, in parts.

    Raises TypeError, with the place, for what is neither.
    """
    tensors: list[Tensor] = []
    words = json.dumps(_coded(content, "", tensors)).encode()
    numbers = [_bytes(value) for value in tensors]
    length = b"%016d\n" % len(words)
    digest = hashlib.sha256(length)
    for part in (words, *numbers):
        digest.update(part)
    return [MAGIC, digest.hexdigest().encode(), b"\n", length, words, *numbers]


def unpacked(data: bytes) -> Any:
    """What was packed.

    Raises DamagedError where the bytes differ in anything, or ask for more numbers than there are.
    """
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise DamagedError("it does not begin as one")
    digest, rest = (
        bytes(view[len(MAGIC) : len(MAGIC) + DIGEST + 1]),
        view[len(MAGIC) + DIGEST + 1 :],
    )
    if digest != hashlib.sha256(rest).hexdigest().encode() + b"\n":
        raise DamagedError(
            "its checksum does not fit: it was changed or cut short after it was written"
        )
    try:
        length = int(bytes(rest[:LENGTH]))
        words = json.loads(bytes(view[HEADER : HEADER + length]))
        found, left = _decoded(words, view[HEADER + length :])
    # a checksum keeps out accidents, not what somebody wrote on purpose
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RecursionError,
        OverflowError,
        RuntimeError,
    ) as error:
        raise DamagedError(
            f"its content is not what a fit holds ({type(error).__name__})"
        ) from error
    if len(left):
        raise DamagedError(f"{len(left)} bytes stand after its end")
    return found


def _coded(value: Any, where: str, tensors: list[Tensor]) -> Any:
    """As JSON has it: of what it does not know (tensors, tuples, dicts by any key) a dict of one
    entry.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Tensor):
        if value.is_sparse or str(value.dtype).removeprefix("torch.") not in DTYPES:
            raise TypeError(
                f"{where or 'the content'} is a tensor of {value.dtype}, which no file of a fit "
                "holds"
            )
        tensors.append(value)
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, dict):
        return {
            "dict": [
                [_coded(key, where, tensors), _coded(one, f"{where}[{key!r}]", tensors)]
                for key, one in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        inside = [_coded(one, f"{where}[{i}]", tensors) for i, one in enumerate(value)]
        return inside if isinstance(value, list) else {"tuple": inside}
    raise TypeError(
        f"{where or 'the content'} is a {type(value).__name__}, which is neither a tensor nor a "
        "plain value"
    )


def _decoded(value: Any, numbers: memoryview) -> tuple[Any, memoryview]:
    """The value, and the bytes that it leaves for those after it."""
    if isinstance(value, list):
        inside = []
        for one in value:
            found, numbers = _decoded(one, numbers)
            inside.append(found)
        return inside, numbers
    if not isinstance(value, dict):
        return value, numbers
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return _tensor(inner, numbers)
    if kind not in ("tuple", "dict"):
        raise ValueError(f"unknown kind {kind!r}")
    inside, numbers = _decoded(inner, numbers)
    if kind == "tuple":
        return tuple(inside), numbers
    # dict() would take pairs of letters too
    return {key: one for key, one in inside}, numbers  # noqa: C416


def _tensor(described: Any, numbers: memoryview) -> tuple[Tensor, memoryview]:
    name, shape = described
    if (
        not all(type(size) is int and 0 <= size < 2**48 for size in shape)
        or math.prod(shape) >= 2**48
    ):
        raise ValueError(f"no tensor has the shape {shape}")
    dtype = DTYPES[name]
    size = math.prod(shape) * dtype.itemsize
    if size > len(numbers):
        raise ValueError(f"a tensor of {shape} needs {size} bytes, and {len(numbers)} are left")
    if not size:
        return torch.empty(shape, dtype=dtype), numbers
    own = torch.frombuffer(bytearray(numbers[:size]), dtype=torch.uint8)
    if dtype is torch.bool and int(own.max()) > 1:
        raise ValueError("a truth value is neither 0 nor 1")
    return own.view(dtype).reshape(shape), numbers[size:]


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
