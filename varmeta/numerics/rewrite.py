"""Rewrite a traced graph into one that computes the same with fewer passes over memory, before it is compiled.

A task's weights are one row, cut into the layers' parts by the model.  Autograd therefore ends every gradient with a
concatenation, which a compiler can only write as one loop with a branch for each part, and the gradient of a layer `h @ W.T`
comes transposed.  Both cost more than the arithmetic of a small network (docs/speed.md).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Node = Any  # an fx.Node, whose arguments fx types as anything at all

# Rows cut into more parts than this stay whole: every operation on them would become as many.
MAX_PARTS = 12
# Shorter rows are left alone: a loop over them costs less than starting one for each part.
MIN_SIZE = 256

_POINTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.exp.default,
    aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.pow.Tensor_Scalar,
    aten.mul.Scalar, aten.where.self, aten.clone.default, aten.detach.default, aten.alias.default, aten.abs.default,
    aten.zeros_like.default, aten.ones_like.default, aten.add.Scalar, aten.sub.Scalar, aten.div.Scalar,
    aten.addcmul.default, aten.clamp.default, aten.square.default, aten.lerp.Scalar,
}  # fmt: skip


def rewrite(graph: fx.GraphModule) -> None:
    """In place; the outputs are the same but for rounding.  A graph that writes into its tensors is left alone."""
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if any(getattr(target, "_schema", None) is not None and target._schema.is_mutable for target in calls):
        return
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides change below, and a view insists on them
    _constants(graph.graph)
    _logarithms(graph.graph)
    _narrowed(graph.graph)
    _transposed_products(graph.graph)
    _in_parts(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()


_LIKE = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
_NEUTRAL = {aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0, aten.mul.Tensor: 1.0, aten.div.Tensor: 1.0}
_SAME_NUMBERS = {
    aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
    aten.transpose.int, aten.clone.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


def _constants(graph: fx.Graph) -> None:
    """Zeros and ones shaped like something do not read it, so what nobody else reads dies; plus 0 and times 1 are nothing."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target in _LIKE and value.is_floating_point():
            with graph.inserting_before(node):
                made = {"dtype": value.dtype, "device": value.device}
                full = graph.call_function(aten.full.default, (list(value.shape), _LIKE[node.target]), made)
            full.meta["val"] = value.contiguous()
            node.replace_all_uses_with(full)
        elif node.target in _NEUTRAL and not node.kwargs and all(isinstance(x, fx.Node) for x in node.args):
            first, other = node.args
            neutral = _NEUTRAL[node.target]
            if node.target in (aten.add.Tensor, aten.mul.Tensor) and _filled_with(first) == neutral:
                first, other = other, first
            if _filled_with(other) != neutral or first.meta["val"].dtype != value.dtype:
                continue
            same = first
            if _shape(first) != tuple(value.shape):
                with graph.inserting_before(node):
                    same = graph.call_function(aten.expand.default, (first, list(value.shape)))
                same.meta["val"] = first.meta["val"].expand(value.shape)
            node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _filled_with(node: Node) -> float | None:
    """The number that a tensor holds everywhere, where that is plain to see."""
    while node.op == "call_function" and node.target in _SAME_NUMBERS:
        node = node.args[0]
    return float(node.args[1]) if node.target is aten.full.default else None


def _logarithms(graph: fx.Graph) -> None:
    """The logarithm of an exponential, such as of a scale that is kept as its logarithm, is there already."""
    for node in list(graph.nodes):
        if node.target is not aten.log.default:
            continue
        views, below = [], node.args[0]
        while below.target in _SAME_NUMBERS and below.op == "call_function":
            views.append(below)
            below = below.args[0]
        if below.target is not aten.exp.default or below.args[0].meta["val"].dtype != node.meta["val"].dtype:
            continue
        new = below.args[0]
        for view in reversed(views):
            with graph.inserting_before(node):
                copy = graph.call_function(view.target, (new, *view.args[1:]), dict(view.kwargs))
            copy.meta.update(view.meta)
            new = copy
        node.replace_all_uses_with(new)
    graph.eliminate_dead_code()


def _narrowed(graph: fx.Graph) -> None:
    """What is zero but for the first entry of some axes is added up there without being written out.

    That is the derivative of something that was looked at once for all tasks and weights: zeros but for the first, until a sum
    over them ends it.
    """
    first: dict[Node, tuple[Node, set[int]]] = {}  # those entries, and the axes along which zeros follow

    def call(node: Node, target: Any, *args: Any) -> Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        value, rest = args[0].meta["val"], args[1:]
        new.meta["val"] = value if target is aten.add.Tensor else target(value, *rest)
        return new

    for node in list(graph.nodes):
        if node.target is aten.slice_backward.default and node.args[3:] == (0, 1, 1):
            source, shape, axis = node.args[:3]
            inner, axes = first.get(source, (source, set()))
            first[node] = inner, axes | {axis % len(shape)}
            continue
        known = [first[x] for x in node.all_input_nodes if x in first]
        if not known or node.kwargs:
            continue
        (inner, axes), shape = known[0], _shape(node)
        if node.target is aten.add.Tensor and len(known) == 2:
            other, its = known[1]
            if axes == its and _shape(node.args[0]) == _shape(node.args[1]):
                first[node] = call(node, aten.add.Tensor, inner, other), axes
        elif node.target is aten.reshape.default and len(axes) == 1:
            # a row of its own, whatever axes of length one stand around it
            size = _shape(node.args[0])[min(axes)]
            if math.prod(_shape(node.args[0])) == size == math.prod(shape) and size in shape:
                ones = [1] * len(shape)
                first[node] = call(node, aten.reshape.default, inner, ones), {shape.index(size)}
        elif node.target is aten.sum.default:
            node.replace_all_uses_with(call(node, aten.sum.default, inner))
        elif node.target is aten.sum.dim_IntList and node.args[1]:
            summed = {axis % len(_shape(node.args[0])) for axis in node.args[1]}
            new = call(node, node.target, inner, *node.args[1:])
            if axes <= summed:
                node.replace_all_uses_with(new)
            elif len(node.args) > 2 and node.args[2]:  # the axes keep their places
                first[node] = new, axes - summed
    graph.eliminate_dead_code()


def _shape(node: Any) -> tuple[int, ...]:
    """() also for what is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _transposed_products(graph: fx.Graph) -> None:
    """The transpose of a batched product is the product of the transposes: nothing is left to copy."""
    for node in list(graph.nodes):
        if node.target is not aten.transpose.int:
            continue
        shape, rank = _shape(node), len(_shape(node))
        product = _product_below(node.args[0])
        if product is None or not _is_copied(node) or {axis % rank for axis in node.args[1:]} != {rank - 2, rank - 1}:
            continue
        a, b = product.args
        with graph.inserting_before(node):
            flipped = [graph.call_function(aten.transpose.int, (x, 1, 2)) for x in (b, a)]
            new = graph.call_function(aten.bmm.default, tuple(flipped))
            whole = graph.call_function(aten.reshape.default, (new, list(shape)))
        for copy, x in zip(flipped, (b, a), strict=True):
            copy.meta["val"] = x.meta["val"].transpose(1, 2)
        new.meta["val"] = product.meta["val"].new_empty((product.meta["val"].shape[0], *shape[-2:]))
        whole.meta["val"] = node.meta["val"].contiguous()
        node.replace_all_uses_with(whole)
    graph.eliminate_dead_code()


def _is_copied(node: Node) -> bool:
    """Whether all that is done with a matrix is to write its numbers out row by row."""
    rows = _shape(node)[-2:]

    def writes(user: Node) -> bool:
        if user.target is not aten.reshape.default:
            return user.target is aten.clone.default
        shape = _shape(user)
        return shape[-1:] == (rows[0] * rows[1],) or (shape[-2:] == rows and _is_copied(user))

    return len(node.users) > 0 and all(map(writes, node.users))


def _product_below(node: Node) -> Node | None:
    """The batched product of which `node` is a view with other leading axes, if nobody else reads it."""
    rows = _shape(node)[-2:]
    while node.op == "call_function" and len(node.users) == 1 and _shape(node)[-2:] == rows:
        if node.target is aten.bmm.default:
            return node
        if node.target not in (aten.reshape.default, aten.detach.default):
            return None
        node = node.args[0]
    return None


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
                cuts.append(self.call(node, aten.slice.Tensor, (node, -1, begin, begin + size), {}, part))
                begin += size
            self.known[node] = cuts
        return self.known[node]


def _in_parts(graph: fx.Graph) -> None:
    """Carry concatenations along the last axis through what acts on each number, until they are cut apart again."""
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
    cuts = [sizes for sizes, _ in found.most_common() if 1 < len(sizes) <= MAX_PARTS and sum(sizes) >= MIN_SIZE]
    return cuts[0] if cuts else None


def _is_last(node: Node, axis: int) -> bool:
    shape = _shape(node.args[0] if isinstance(node.args[0], fx.Node) else node.args[0][0])
    return len(shape) > 0 and axis % len(shape) == len(shape) - 1


def _pointwise(parts: _Parts, node: Node) -> None:
    shape = _shape(node)
    inputs = node.all_input_nodes
    if not shape or shape[-1] != parts.size or not any(x in parts.known for x in inputs):
        return
    lengths = {x: (_shape(x) or (1,))[-1] for x in inputs}
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
    """Whoever still reads the whole of `node` reads the concatenation of its parts, which dies if nobody does."""
    whole = parts.graph.call_function(aten.cat.default, (made, -1))
    whole.meta.update(node.meta)
    node.replace_all_uses_with(whole)
    parts.known[whole] = made


def _cat(parts: _Parts, node: Node) -> None:
    inputs = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else 0
    if _is_last(node, axis) and tuple(_shape(x)[-1] for x in inputs) == parts.sizes:
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
    source, shape = node.args[0], _shape(node)
    if source not in parts.known or not shape or shape[-1] != parts.size:
        return
    before = _shape(source)
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
        made.append(parts.call(node, target, (parts.known[source][part], *new), dict(node.kwargs), part))
    _replace(parts, node, made)


def _sum(parts: _Parts, node: Node) -> None:
    source = node.args[0]
    if source not in parts.known:
        return
    shape = _shape(source)
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
