"""Files of the format before ("varmeta fit 3"), which are torch's own.

Such a file has no checksum, nor the model's configuration.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import torch

from varmeta.files.container import DamagedError
from varmeta.likelihoods.base import Likelihood
from varmeta.models.model import TaskModel

FORMAT = "varmeta fit 3"
LACKS = (
    "{} has the format of an older version ('"
    + FORMAT
    + "'), which has no checksum and does not know the hyperpriors, lkj and "
    "other settings of the model: see that the model is the one that was fitted, and save the fit "
    "anew"
)
# Tensors that share memory, as tasks may their x, take more bytes than the file has; this many
# times more is no fit.
SHARED = 1000


def unpacked(data: bytes) -> Any:
    """The content of such a file.

    Raises DamagedError for anything else, before it takes more memory than the file.
    """
    foreign = DamagedError("it has another format, is damaged, or holds code, which is never run")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise foreign
            if (
                sum(entry.file_size for entry in entries) > len(data)
                or archive.testzip() is not None
            ):
                raise foreign
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DamagedError:
        raise
    except (
        Exception
    ) as error:  # torch raises its own, pickle's, zipfile's and more for foreign files
        # torch's words would advise to let the file run code
        raise foreign from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedError(f"expected the format {FORMAT!r} or a later one")
    _check_size(content, len(data))
    return content


def _check_size(content: Any, size: int) -> None:
    """Lists that hold each other, and tensors that show one number many times, are larger than they
    look.
    """
    waiting, count, numbers = [content], 0, 0
    while waiting:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, torch.Tensor):
            _check_tensor(value, size)
            numbers += value.numel() * value.element_size()
        if count > size or numbers > SHARED * size:
            raise DamagedError("its content is far larger than the file")


def _check_tensor(value: torch.Tensor, size: int) -> None:
    steps = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
    end = value.storage_offset() + steps + 1
    if value.numel() and end * value.element_size() > value.untyped_storage().nbytes():
        raise DamagedError("a tensor reaches beyond its numbers")
    if value.untyped_storage().nbytes() > size:
        raise DamagedError("a tensor has more numbers than the file")


def check_likelihood(saved: str, model: TaskModel, shown: str) -> None:
    """Raises ValueError where what both versions know of the likelihood differs."""
    now = _settings(model)
    kind, _, settings = saved.partition(" ")
    own_kind, _, own = now.partition(" ")
    before, after = (json.loads(text) if text else {} for text in (settings, own))
    common = set(before) & set(after)
    if kind != own_kind or any(before[name] != after[name] for name in common):
        raise ValueError(f"{shown} is a fit with the likelihood {saved}, but this model has {now}")


def _settings(model: TaskModel) -> str:
    return "program" if model.likelihood is None else _plainly(model.likelihood)


def _plainly(likelihood: Likelihood) -> str:
    known = {
        name: _plainly(value) if isinstance(value, Likelihood) else value
        for name, value in vars(likelihood).items()
        if isinstance(value, (bool, int, float, str, Likelihood))
    }
    return f"{type(likelihood).__name__} {json.dumps(known, sort_keys=True)}"
