"""Keep rows that a graph cuts into parts and joins again in parts.

A task's weights are one row, cut into the layers' parts by the model.  Autograd therefore ends
every gradient with a concatenation, which a compiler can only write as one loop with a branch for
each part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import fx

from varmeta.graphs.nodes import Node, aten, shape_of

# Rows cut into more parts than this stay whole: every operation on them would become as many.
MAX_PARTS = 12
# Shorter rows are left alone: a loop over them costs less than starting one for each part.
MIN_SIZE = 256

_POINTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
    aten.mul.Scalar,
    aten.where.self,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.abs.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.div.Scalar,
    aten.addcmul.default,
    aten.clamp.default,
    aten.square.default,
    aten.lerp.Scalar,
}


class _Parts:
    """Which nodes are known in parts along their last axis, and those parts."""

    def __init__(self, graph: fx.Graph, sizes: tuple[int, ...]) -> None:
        self.graph, self.sizes, self.size = graph, sizes, sum(sizes)
        self.known: dict[Node, list[Node]] = {}

    def call(self, like: Node, target: Any, args: tuple[Any, ...], kwargs: Any, part: int) -> Node:
        new = self.graph.call_function(target, args, kwargs)
        value = like.meta["val"]
        last = self.sizes[part] if value.dim() and value.shape[-1] == self.size else 1
        new.meta["val"] = value.new_empty((*value.shape[:-1], last)) if value.dim() else value
        return new

    def of(self, node: Node) -> list[Node]:
        """The parts of a node as long as the row; views where it is known as a whole only."""
        if node not in self.known:
            cuts, begin = [], 0
            for part, size in enumerate(self.sizes):
                cuts.append(
                    self.call(node, aten.slice.Tensor, (node, -1, begin, begin + size), {}, part)
                )
                begin += size
            self.known[node] = cuts
        return self.known[node]


def in_parts(graph: fx.Graph) -> None:
    """Carry concatenations along the last axis on until they are cut apart again.

    They are carried through what acts on each number by itself.
    """
    sizes = _cut_sizes(graph)
    if sizes is None:
        return
    parts = _Parts(graph, sizes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        with graph.inserting_before(node):
            rule = _RULES.get(node.target) or (_pointwise if node.target in _POINTWISE else None)
            if rule is not None:
                rule(parts, node)


def _cut_sizes(graph: fx.Graph) -> tuple[int, ...] | None:
    """The sizes into which rows are cut most often."""
    found = Counter(
        tuple(node.args[1])
        for node in graph.nodes
        if node.target is aten.split_with_sizes.default and _is_last(node, (*node.args, 0)[2])
    )
    cuts = [
        sizes
        for sizes, _ in found.most_common()
        if 1 < len(sizes) <= MAX_PARTS and sum(sizes) >= MIN_SIZE
    ]
    return cuts[0] if cuts else None


def _is_last(node: Node, axis: int) -> bool:
    shape = shape_of(node.args[0] if isinstance(node.args[0], fx.Node) else node.args[0][0])
    return len(shape) > 0 and axis % len(shape) == len(shape) - 1


def _pointwise(parts: _Parts, node: Node) -> None:
    shape = shape_of(node)
    inputs = node.all_input_nodes
    if not shape or shape[-1] != parts.size or not any(x in parts.known for x in inputs):
        return
    lengths = {x: (shape_of(x) or (1,))[-1] for x in inputs}
    if not all(length in (1, parts.size) for length in lengths.values()):
        return
    made = []
    for part in range(len(parts.sizes)):

        def of_part(x: Any, part: int = part) -> Any:
            return parts.of(x)[part] if lengths[x] == parts.size else x

        args = fx.map_arg(node.args, of_part)
        kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}
        made.append(parts.call(node, node.target, args, fx.map_arg(kwargs, of_part), part))
    _replace(parts, node, made)


def _replace(parts: _Parts, node: Node, made: list[Node]) -> None:
    """Whoever still reads the whole of `node` reads the concatenation of its parts, which dies if
    nobody does.
    """
    whole = parts.graph.call_function(aten.cat.default, (made, -1))
    whole.meta.update(node.meta)
    node.replace_all_uses_with(whole)
    parts.known[whole] = made


def _cat(parts: _Parts, node: Node) -> None:
    inputs, whole = node.args[0], node.meta["val"]
    axis = node.args[1] if len(node.args) > 1 else 0
    alike = all(
        x.meta["val"].dtype == whole.dtype and len(shape_of(x)) == whole.dim() for x in inputs
    )
    if alike and _is_last(node, axis) and tuple(shape_of(x)[-1] for x in inputs) == parts.sizes:
        parts.known[node] = list(inputs)


def _split(parts: _Parts, node: Node) -> None:
    if tuple(node.args[1]) == parts.sizes and _is_last(node, (*node.args, 0)[2]):
        cuts = parts.of(node.args[0])
        for user in list(node.users):
            user.replace_all_uses_with(cuts[user.args[1]])


def _slice(parts: _Parts, node: Node) -> None:
    given = tuple(node.args)
    source, axis, begin, end, *step = given + (0, 0, 2**62)[len(given) - 1 :]
    if source not in parts.known:
        return
    if not _is_last(node, axis):
        if not step or step == [1]:
            _shaped(parts, node)
        return
    edges = [sum(parts.sizes[:k]) for k in range(len(parts.sizes) + 1)]
    for part, (low, high) in enumerate(pairwise(edges)):
        if (begin, min(end, parts.size)) == (low, high) and step in ([], [1]):
            node.replace_all_uses_with(parts.known[source][part])


def _shaped(parts: _Parts, node: Node) -> None:
    """Operations on the axes before the last."""
    source, shape = node.args[0], shape_of(node)
    if source not in parts.known or not shape or shape[-1] != parts.size:
        return
    before = shape_of(source)
    target, args = node.target, node.args[1:]
    if target is aten.unsqueeze.default and args[0] % len(shape) == len(shape) - 1:
        return
    if target in (aten.squeeze.dim, aten.sum.dim_IntList):
        axes = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        if any(axis % len(before) == len(before) - 1 for axis in axes):
            return
        # an axis counted from the end is the same in every part
    made = []
    for part, size in enumerate(parts.sizes):
        new = list(args)
        if target in (aten.reshape.default, aten.expand.default):
            new[0] = [*shape[:-1], size]
        made.append(
            parts.call(node, target, (parts.known[source][part], *new), dict(node.kwargs), part)
        )
    _replace(parts, node, made)


def _sum(parts: _Parts, node: Node) -> None:
    source = node.args[0]
    if source not in parts.known or source.meta["val"].dtype.itemsize < 4:
        return  # of half precision a part's sum may overflow where the whole one does not
    shape = shape_of(source)
    axes = [axis % len(shape) for axis in node.args[1]] if shape and node.args[1] else []
    if shape and len(shape) - 1 in axes:
        total: Node | None = None
        for part in parts.known[source]:
            new = parts.graph.call_function(node.target, (part, *node.args[1:]), dict(node.kwargs))
            new.meta["val"] = node.meta["val"]
            if total is not None:
                new = parts.graph.call_function(aten.add.Tensor, (total, new))
                new.meta["val"] = node.meta["val"]
            total = new
        assert total is not None
        node.replace_all_uses_with(total)
    elif axes:
        _shaped(parts, node)


_RULES: dict[Any, Callable[[_Parts, Node], None]] = {
    aten.cat.default: _cat,
    aten.split_with_sizes.default: _split,
    aten.slice.Tensor: _slice,
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys(
        (
            aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.reshape.default,
        ),
        _shaped,
    ),
}  # fmt: skip
