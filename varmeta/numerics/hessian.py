"""The dense second derivatives of many small problems at once.

Rows of a Hessian are products of the gradient's graph with unit vectors, some at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from varmeta.graphs.process import unheard
from varmeta.numerics.batching import cannot_be_batched

# Rows made at once: enough to hide the overhead, few enough to bound the memory.
CHUNK = 8


def pulled_back(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Sequence[Tensor],
    stacked: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """sum_j vectors_j . d outputs_j / d leaf, for each leaf; where outputs are a gradient, H v.

    The graph is kept.

    vectors: one shaped as each output, or where `stacked` many, `(number, *output.shape)`; what is
        found has that axis then too.
    """
    # an output that is constant, as the gradient of a linear term, has no graph; autograd refuses
    # it
    moving = [j for j, output in enumerate(outputs) if output.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if moving:
        found = torch.autograd.grad(
            [outputs[j] for j in moving],
            leaves,
            [vectors[j] for j in moving],
            retain_graph=True,
            create_graph=create_graph,
            # and not materialize_grads, whose zeros would lack the stack's axis
            allow_unused=True,
            is_grads_batched=stacked,
        )
    lead = vectors[0].shape[:1] if stacked else ()
    return [
        leaf.new_zeros(*lead, *leaf.shape) if x is None else x
        for leaf, x in zip(leaves, found, strict=True)
    ]


class Rows:
    """Products with stacks of vectors, which remembers whether they can be batched.

    batched: whether to try; an operation without a batching rule (a user's autograd.Function) has
        them taken one by one.
    """

    def __init__(self, batched: bool = True) -> None:
        self.batched = batched

    def __call__(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        vectors: Sequence[Tensor],
        create_graph: bool = False,
    ) -> list[Tensor]:
        """As `pulled_back` of a stack, `(number, *leaf.shape)` for each leaf; some at a time."""
        if not len(vectors[0]):
            return [leaf.new_zeros(0, *leaf.shape) for leaf in leaves]
        chunks = [
            self._chunk(outputs, leaves, stack, create_graph)
            for stack in zip(*(vector.split(CHUNK) for vector in vectors), strict=True)
        ]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _chunk(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        vectors: Sequence[Tensor],
        create_graph: bool,
    ) -> list[Tensor]:
        if self.batched:
            try:
                # torch loops over operations without a batching rule by itself, and says so each
                # time
                with unheard("There is a performance drop"):
                    return pulled_back(outputs, leaves, vectors, True, create_graph)
            except RuntimeError as error:
                if not cannot_be_batched(error):
                    raise
                self.batched = False
        rows = [
            pulled_back(outputs, leaves, one, create_graph=create_graph)
            for one in zip(*vectors, strict=True)
        ]
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def unit_vectors(like: Tensor) -> Tensor:
    """For every task the same unit vectors, `(size, tasks, size)`, `like` `(tasks, size)`."""
    size = like.shape[-1]
    basis = torch.eye(size, dtype=like.dtype, device=like.device)
    return basis.unsqueeze(1).expand(size, *like.shape)


def jacobian(values: Tensor, x: Tensor, rows: Rows, create_graph: bool = False) -> Tensor:
    """d values / d x of values `(tasks, n)` at the tasks' own x `(tasks, size)`.

    `(tasks, n, size)`: the tasks do not see each other, so that one product serves all.
    """
    return rows([values], [x], [unit_vectors(values)], create_graph)[0].movedim(0, 1)


def task_hessians(losses: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses `(tasks,)` of x `(tasks, size)`, and their Hessians `(tasks, size, size)`.

    >>> task_hessians(lambda x: 2.0 * x.square().sum(-1), torch.ones(1, 2))
    (tensor([4.]), tensor([[[4., 0.],
             [0., 4.]]]))
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        found = losses(point)
        (gradient,) = torch.autograd.grad(found.sum(), point, create_graph=True)
        return found.detach(), symmetric(jacobian(gradient, point, Rows()))


def vector_hessian(fn: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Hessian `(size, size)` of a scalar function of a vector `(size,)`.

    >>> vector_hessian(lambda v: v[0] * v[1], torch.ones(2))
    tensor([[0., 1.],
            [1., 0.]])
    """
    return task_hessians(lambda row: fn(row.squeeze(0)).reshape(1), at.unsqueeze(0))[1].squeeze(0)


def of_products(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The symmetric part of A `(tasks, size, size)`, given only v -> A v on rows like `like`.

    >>> of_products(lambda v: 3.0 * v, torch.zeros(1, 2))
    tensor([[[3., 0.],
             [0., 3.]]])
    """
    return symmetric(torch.stack([product(v) for v in unit_vectors(like)], -1))


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of `(..., n, n)`."""
    return 0.5 * (matrix + matrix.mT)
