"""Lay out a graph's batched products so that they are fast and no transpose is copied.

The gradient of a layer `h @ W.T` comes transposed, and its derivative is a product of two
transposes.  Both cost more than the arithmetic of a small network (docs/speed.md).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from varmeta.graphs.nodes import Node, aten, shape_of


def column_products(graph: fx.Graph) -> None:
    """A product of two matrices that both lie column by column is made the other way round.

    The library does A.T @ B.T of 40 x 40 by 40 x 10 seven times slower than B @ A (docs/speed.md).
    """
    for node in list(graph.nodes):
        if node.target is not aten.bmm.default or not all(map(_by_columns, node.args)):
            continue
        with graph.inserting_before(node):
            new = _reversed(graph, node)
            back = graph.call_function(aten.transpose.int, (new, 1, 2))
        back.meta["val"] = new.meta["val"].mT
        node.replace_all_uses_with(back)
    graph.eliminate_dead_code()


def _reversed(graph: fx.Graph, product: Node) -> Node:
    """The transpose of a batched product A @ B, as B.T @ A.T."""
    flipped = []
    for x in reversed(product.args):
        flip = graph.call_function(aten.transpose.int, (x, 1, 2))
        flip.meta["val"] = x.meta["val"].mT
        flipped.append(flip)
    new = graph.call_function(aten.bmm.default, tuple(flipped))
    new.meta["val"] = product.meta["val"].mT.contiguous()
    return new


def _by_columns(node: Node) -> bool:
    rows, columns = shape_of(node)[-2:]
    return rows > 1 and columns > 1 and node.meta["val"].stride(-2) == 1


def transposed_products(graph: fx.Graph) -> None:
    """Replace the transpose of a batched product by the product of the transposes.

    So nothing is left to copy.  The same of sums of products.
    """
    for node in list(graph.nodes):
        if node.target is not aten.transpose.int:
            continue
        rank = len(shape_of(node))
        if {axis % rank for axis in node.args[1:]} != {rank - 2, rank - 1} or not _is_copied(node):
            continue
        if _flips(node.args[0]):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_flipped(graph, node.args[0]))
    graph.eliminate_dead_code()


def _is_copied(node: Node) -> bool:
    """Whether all that is done with a matrix is to write its numbers out row by row."""
    rows = shape_of(node)[-2:]

    def writes(user: Node) -> bool:
        if user.target is not aten.reshape.default:
            return user.target is aten.clone.default
        shape = shape_of(user)
        return shape[-1:] == (rows[0] * rows[1],) or (shape[-2:] == rows and _is_copied(user))

    return len(node.users) > 0 and all(map(writes, node.users))


def _flips(node: Node) -> bool:
    """Whether `_flipped` can make the transpose of `node`, which nobody else reads, without a
    copy.
    """
    if node.op != "call_function" or len(node.users) != 1:
        return False
    if node.target is aten.add.Tensor:
        same = not node.kwargs and all(
            isinstance(x, fx.Node) and shape_of(x) == shape_of(node) for x in node.args
        )
        return same and node.args[0] is not node.args[1] and all(map(_flips, node.args))
    if node.target in (aten.reshape.default, aten.detach.default):
        return shape_of(node.args[0])[-2:] == shape_of(node)[-2:] and _flips(node.args[0])
    if _is_flip(node):
        return True
    # flipped, of two that lie row by row, it would be a product of two that lie column by column
    return node.target is aten.bmm.default and any(map(_by_columns, node.args))


def _is_flip(node: Node) -> bool:
    return (
        node.target is aten.transpose.int
        and tuple(node.args[1:]) in ((1, 2), (-2, -1))
        and len(shape_of(node)) == 3
    )


def _flipped(graph: fx.Graph, node: Node) -> Node:
    """The last two axes of what `_flips` the other way round."""
    if _is_flip(node):
        return node.args[0]
    if node.target is aten.bmm.default:
        return _reversed(graph, node)
    value = node.meta["val"].mT
    args: tuple[Any, ...]
    if node.target is aten.add.Tensor:
        args = tuple(_flipped(graph, x) for x in node.args)
    elif node.target is aten.reshape.default:
        args = (_flipped(graph, node.args[0]), list(value.shape))
    else:
        args = (_flipped(graph, node.args[0]),)
    new = graph.call_function(node.target, args)
    new.meta["val"] = value.contiguous()
    return new
