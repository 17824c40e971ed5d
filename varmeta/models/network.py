"""A network run with weights from outside: for one task, and for many tasks at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from varmeta.graphs.process import ALONE
from varmeta.models.check_net import check_output
from varmeta.models.shared_layers import Features, Split, numbers_of

Network = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(weights by name, x `(points, ...)`) -> outputs `(points, channels)`"""

X = TypeVar("X", Tensor, tuple[Tensor, ...])

Rest = Callable[[dict[str, Tensor], tuple[Tensor, ...]], Tensor]
"""(weights by name, x and what the layers before them put out for it) -> outputs"""


def one_task(net: nn.Module, fixed: dict[str, Tensor]) -> Network:
    """The network as a function of the weights that vary.

    fixed: by name, what is the same for all tasks.

    Raises ValueError, when it is run, where what the network puts out is not a tensor with a row
    for each of x's.
    """

    def run(own: dict[str, Tensor], x: Tensor) -> Tensor:
        x = as_columns(x)
        with differentiable_attention():
            return check_output(torch.func.functional_call(net, own | fixed, (x,)), x)

    return run


def rest_of_one_task(split: Split, fixed: dict[str, Tensor]) -> Rest:
    """The head of a network as `one_task` is the whole: what comes after the shared layers."""
    fixed = numbers_of(split.head, fixed)

    def run(own: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
        x, *features = given
        x = as_columns(x)
        with differentiable_attention():
            out = torch.func.functional_call(split.head, own | fixed, (x, *features))
        return check_output(out, x)

    return run


def features(
    split: Split, fixed: dict[str, Tensor], x: Tensor, task_chunk_size: int | None
) -> Features:
    """What the shared layers put out for x `(tasks, points, ...)`, each `(tasks, ...)`."""
    fixed = numbers_of(split.body, fixed)

    def run(x: Tensor) -> Features:
        with differentiable_attention():
            found: Features = torch.func.functional_call(split.body, fixed, (as_columns(x),))
        return found

    found: Features = torch.func.vmap(run, chunk_size=task_chunk_size)(x)
    return found


def as_columns(x: Tensor) -> Tensor:
    """x of one task as a network is given it: `(points,)` is one column."""
    return x.unsqueeze(-1) if x.dim() == 1 else x


def all_tasks(
    network: Callable[[dict[str, Tensor], X], Tensor],
    weights: dict[str, Tensor],
    x: X,
    lead: torch.Size,
    task_chunk_size: int | None,
) -> Tensor:
    """Outputs `(*lead, tasks, points, channels)` of all tasks at once.

    weights `(*lead, tasks, *shape)` and x `(tasks, points, ...)`, or with it what the rest of a
    network needs; without any weights the outputs are the same for all of `lead`.
    """
    call = torch.func.vmap(network, chunk_size=task_chunk_size)
    if not weights:
        out = call(weights, x)
        return out.expand(*lead, *out.shape)
    for _ in lead:  # points of an expectation: the same x for each
        call = torch.func.vmap(call, in_dims=(0, None))
    return call(weights, x)


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention written out within it, and the network run by one thread at a time.

    PyTorch's fused kernels have no second derivative, and some no first one under vmap; that they
    are not used is the process's, and while a module runs with weights from outside it holds them.
    """
    with ALONE:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
