"""Rewrite a traced graph to compute the same with fewer passes over memory.

It is done before the graph is compiled.

Here: what need not be computed at all.  How products are laid out: `rewrite_products.py`.  Rows in
parts: `rewrite_parts.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from varmeta.graphs.nodes import Node, aten, is_view, shape_of
from varmeta.graphs.rewrite_parts import in_parts
from varmeta.graphs.rewrite_products import column_products, transposed_products

# They read the memory of another tensor as it lies, which is not kept.
_READS_STRIDES = {
    aten.as_strided.default,
    aten.view.dtype,
    aten.view_as_complex.default,
    aten.view_as_real.default,
}


def rewrite(graph: fx.GraphModule) -> None:
    """Rewrite the graph in place; its outputs stay the same but for rounding.

    Logarithms of exponentials that underflow stay finite, too.

    A graph that writes into its tensors, or reads memory as it lies, is left alone.
    """
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    if any(
        getattr(target, "_schema", None) is not None and target._schema.is_mutable
        for target in calls
    ):
        return
    if not _READS_STRIDES.isdisjoint(calls):
        return
    for node in graph.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides change below, and a view insists on them
    before = _aliases(graph.graph)
    _constants(graph.graph)
    _logarithms(graph.graph)
    _narrowed(graph.graph)
    _whole(graph.graph)
    column_products(graph.graph)
    transposed_products(graph.graph)
    in_parts(graph.graph)
    graph.graph.eliminate_dead_code()
    _own_outputs(graph.graph, before)
    graph.graph.lint()
    graph.recompile()


def _outputs(graph: fx.Graph) -> list[Node]:
    found: list[Node] = []
    fx.map_arg(graph.output_node().args, found.append)
    return found


def _aliases(graph: fx.Graph) -> list[bool]:
    """For each output whether its numbers share memory: with an input, an output before it, or one
    another.
    """
    seen: set[Node] = set()
    found = []
    for node in _outputs(graph):
        widened = False
        while node.op == "call_function" and is_view(node.target):
            widened |= node.target is aten.expand.default
            node = node.args[0]
        found.append(widened or node.op != "call_function" or node in seen)
        seen.add(node)
    return found


def _own_outputs(graph: fx.Graph, before: list[bool]) -> None:
    """Copy outputs that share memory now and did not: whoever gets a gradient may write into it."""
    last = graph.output_node()
    copied = iter([shares and not was for was, shares in zip(before, _aliases(graph), strict=True)])

    def own(node: Node) -> Node:
        if not next(copied):
            return node
        with graph.inserting_before(last):
            copy = graph.call_function(
                aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
            )
        copy.meta["val"] = node.meta["val"]
        return copy

    last.args = fx.map_arg(last.args, own)


_LIKE = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0}
_NEUTRAL = {aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0, aten.mul.Tensor: 1.0, aten.div.Tensor: 1.0}
_SAME_NUMBERS = {
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
}


def _constants(graph: fx.Graph) -> None:
    """Zeros and ones shaped like something do not read it, so what nobody else reads dies; plus 0
    and times 1 are nothing.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target in _LIKE and value.is_floating_point():
            node.replace_all_uses_with(_full(graph, node))
        elif (
            node.target in _NEUTRAL
            and not node.kwargs
            and all(isinstance(x, fx.Node) for x in node.args)
        ):
            same = _unchanged(graph, node)
            if same is not None:
                node.replace_all_uses_with(same)
    graph.eliminate_dead_code()


def _full(graph: fx.Graph, node: Node) -> Node:
    """Zeros or ones, of a shape that is written out."""
    value = node.meta["val"]
    with graph.inserting_before(node):
        made = {"dtype": value.dtype, "device": value.device}
        full = graph.call_function(aten.full.default, (list(value.shape), _LIKE[node.target]), made)
    full.meta["val"] = value.contiguous()
    return full


def _unchanged(graph: fx.Graph, node: Node) -> Node | None:
    """What a sum with zeros, or a product with ones, is equal to; None where it is neither."""
    value, (first, other) = node.meta["val"], node.args
    neutral = _NEUTRAL[node.target]
    if node.target in (aten.add.Tensor, aten.mul.Tensor) and _filled_with(first) == neutral:
        first, other = other, first
    if _filled_with(other) != neutral or first.meta["val"].dtype != value.dtype:
        return None
    if shape_of(first) == tuple(value.shape):
        return first
    with graph.inserting_before(node):
        same = graph.call_function(aten.expand.default, (first, list(value.shape)))
    same.meta["val"] = first.meta["val"].expand(value.shape)
    return same


def _filled_with(node: Node) -> float | None:
    """The number that a tensor holds everywhere, where that is plain to see."""
    while node.op == "call_function" and node.target in _SAME_NUMBERS:
        node = node.args[0]
    real = node.target is aten.full.default and not isinstance(node.args[1], complex)
    return float(node.args[1]) if real else None


def _logarithms(graph: fx.Graph) -> None:
    """The logarithm of an exponential, such as of a scale that is kept as its logarithm, is there
    already.
    """
    for node in list(graph.nodes):
        if node.target is not aten.log.default:
            continue
        views, below = [], node.args[0]
        while below.target in _SAME_NUMBERS and below.op == "call_function":
            views.append(below)
            below = below.args[0]
        if (
            below.target is not aten.exp.default
            or below.args[0].meta["val"].dtype != node.meta["val"].dtype
        ):
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
    """What is zero but for the first entry of some axes is added up there without being written
    out.

    That is the derivative of something that was looked at once for all tasks and weights: zeros but
    for the first, until a sum over them ends it.
    """
    # those entries, and the axes along which zeros follow
    first: dict[Node, tuple[Node, set[int]]] = {}
    for node in list(graph.nodes):
        if node.target is aten.slice_backward.default and node.args[3:] == (0, 1, 1):
            source, shape, axis = node.args[:3]
            inner, axes = first.get(source, (source, set()))
            first[node] = inner, axes | {axis % len(shape)}
            continue
        known = [first[x] for x in node.all_input_nodes if x in first]
        if not known or node.kwargs:
            continue
        narrow = _narrow(graph, node, known)
        if narrow is None:
            continue
        if narrow[1]:
            first[node] = narrow
        else:  # a sum has ended the zeros
            node.replace_all_uses_with(narrow[0])
    graph.eliminate_dead_code()


def _narrow(
    graph: fx.Graph, node: Node, known: list[tuple[Node, set[int]]]
) -> tuple[Node, set[int]] | None:
    """A node's own first entries, and the axes along which zeros follow, from those of its inputs;
    None where they are not known.
    """
    (inner, axes), shape = known[0], shape_of(node)
    if node.target is aten.add.Tensor and len(known) == 2:
        other, its = known[1]
        if axes == its and shape_of(node.args[0]) == shape_of(node.args[1]):
            return _call(graph, node, aten.add.Tensor, inner, other), axes
    if node.target is aten.reshape.default and len(axes) == 1:
        # a row of its own, whatever axes of length one stand around it
        size = shape_of(node.args[0])[min(axes)]
        if 0 < math.prod(shape_of(node.args[0])) == size == math.prod(shape) and size in shape:
            ones = [1] * len(shape)
            new = _call(graph, node, aten.reshape.default, inner, ones)
            return new, {shape.index(size)}
    if node.target is aten.sum.default:
        return _call(graph, node, aten.sum.default, inner), set()
    if node.target is aten.sum.dim_IntList and node.args[1]:
        summed = {axis % len(shape_of(node.args[0])) for axis in node.args[1]}
        keeps_places = len(node.args) > 2 and node.args[2]
        if axes <= summed or keeps_places:
            return _call(graph, node, node.target, inner, *node.args[1:]), axes - summed
    return None


def _call(graph: fx.Graph, node: Node, target: Any, *args: Any) -> Node:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    value, rest = args[0].meta["val"], args[1:]
    new.meta["val"] = value if target is aten.add.Tensor else target(value, *rest)
    return new


def _whole(graph: fx.Graph) -> None:
    """A concatenation of one part, and a cut into one, are nothing.

    A step of CG on a single vector has both.
    """
    for node in list(graph.nodes):
        if node.target is aten.cat.default and len(node.args[0]) == 1:
            node.replace_all_uses_with(node.args[0][0])
        elif node.target is aten.split_with_sizes.default and len(node.args[1]) == 1:
            for part in list(node.users):
                part.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
