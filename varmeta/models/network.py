"""A network run with weights from outside: for one task, and for many tasks at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from varmeta.models.check_net import check_output

Network = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(weights by name, x `(points, ...)`) -> outputs `(points, channels)`"""


def one_task(net: nn.Module, fixed: dict[str, Tensor]) -> Network:
    """The network as a function of the weights that vary.

    fixed: by name, what is the same for all tasks.

    Raises ValueError, when it is run, where what the network puts out is not a tensor with a row
    for each of x's.
    """

    def run(own: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        with differentiable_attention():
            return check_output(torch.func.functional_call(net, own | fixed, (x,)), x)

    return run


def all_tasks(
    network: Network,
    weights: dict[str, Tensor],
    x: Tensor,
    lead: torch.Size,
    task_chunk_size: int | None,
) -> Tensor:
    """Outputs `(*lead, tasks, points, channels)` of all tasks at once.

    weights `(*lead, tasks, *shape)` and x `(tasks, points, ...)`; without any weights the outputs
    are the same for all of `lead`.
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
    """Attention written out within it.

    PyTorch's fused kernels have no second derivative, and some no first one under vmap.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
