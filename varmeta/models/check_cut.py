"""Whether the two parts of a network are the network: torch.fx follows one way through a forward.

What asks for the kind of its input, tries and catches, works under `torch.no_grad`, or writes into
a tensor that has two names may go another way when it is traced, without an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.models.check_rows import moved_by
from varmeta.models.model import TaskModel
from varmeta.tasks import Data

# Rows on which both are run.
ROWS = 8


def check_cut(model: TaskModel, eta: Mapping[str, Tensor], data: Data) -> None:
    """Have the network run whole from now on where its parts differ in a value or a derivative.

    The rows of one task are looked at, at eta and away from it, where a layer that starts at 0
    shows too.

    eta: the model's, also with a strategy's entries beside.
    """
    if not model.cut or model.ahead(eta, []) is model or not data.width:
        return
    task = int(data.num_points.argmax())
    x = data.take(slice(task, task + 1), min(ROWS, int(data.num_points[task]))).x
    for away in (0.0, 1.0):
        known = {name: value.detach() for name, value in eta.items()}
        here = {name: value.requires_grad_() for name, value in moved_by(away, known).items()}
        with torch.enable_grad():
            whole, parts = (_pass(one, here, x) for one in (model, model.ahead(here, [x])))
        if not all(map(_alike, parts, whole)):
            model.cut = False
            return


def _pass(model: TaskModel, eta: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """The output for one task, and the derivative of a sum of it by all of eta, as one vector."""
    theta = model.weights.flatten(eta)
    out = model.output(theta.reshape(1, 1, -1), eta, x)
    # another factor for each number, so that none cancels another
    factors = torch.linspace(1.0, 2.0, out.numel()).to(out).reshape(out.shape)
    found = torch.autograd.grad(
        (factors * out).sum(), list(eta.values()), allow_unused=True, materialize_grads=True
    )
    return [out.detach(), torch.cat([one.reshape(-1) for one in found])]


def _alike(one: Tensor, other: Tensor) -> bool:
    size = other[other.isfinite()].abs().max() if bool(other.isfinite().any()) else 1.0
    tolerance = torch.finfo(other.dtype).eps ** 0.5 * float(size)
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
