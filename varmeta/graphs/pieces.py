"""Run pieces of an algorithm as compiled graphs where the function that it works on can be one.

A minimiser or a linear solver writes its repeated work as a *piece*, `piece(fn, *args)`, which
returns tensors, and calls `run(fn, piece, *args)`.  For an ordinary fn that is just the call.  A
`Graphed` fn is traced into the piece, and from then on the whole of it, fn's derivatives included,
is one compiled graph.  Whoever writes the piece need not know which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from varmeta.graphs.capture import Captured, Flat, runner, signature, trace

Piece = Callable[..., Any]
Graphs = dict[Hashable, Any]


class Graphed:
    """`function(known, *args)` as a function of args, all of whose tensors are in `known` and args.

    function: pure, tensors in and out; the same whenever `graphs` is the same.
    known: a tree of tensors that may change between two objects, but not in shape without another
        graph.
    graphs: where the graphs are kept, for the next object with other numbers.
    """

    def __init__(self, function: Callable[..., Any], known: Any, graphs: Graphs) -> None:
        self.function, self.known, self.graphs = function, known, graphs

    def __call__(self, *args: Any) -> Any:
        return self.function(self.known, *args)

    def at(self, *more: Any) -> Graphed:
        """The function of the first arguments, these last ones known."""
        function = self.function
        graphs = self.graphs.setdefault("at", {})
        return Graphed(
            lambda known, *args: function(known[0], *args, *known[1]), (self.known, more), graphs
        )

    def run(self, piece: Piece, *args: Any) -> Any:
        return self._captured(piece)(self.known, args)

    def traced(self, piece: Piece, *args: Any) -> fx.GraphModule:
        """The piece's graph, which `run` need not trace again."""
        return self._captured(piece).traced(self.known, args).graph

    def _captured(self, piece: Piece) -> Captured:
        if piece not in self.graphs:
            self.graphs[piece] = Captured(self._applied(piece))
        return cast("Captured", self.graphs[piece])

    def linearize(self, piece: Piece, *args: Any) -> tuple[Any, Graphed]:
        key = ("linearized", piece)
        if key not in self.graphs:
            self.graphs[key] = _Linearized(self._applied(piece))
        return cast("tuple[Any, Graphed]", self.graphs[key](self.known, args))

    def _applied(self, piece: Piece) -> Callable[..., Any]:
        function = self.function
        return lambda known, args: piece(lambda *x: function(known, *x), *args)


def run(fn: Any, piece: Piece, *args: Any) -> Any:
    """`piece(fn, *args)`, as a graph where fn is `Graphed`.

    piece: hashable, equal for equal work.
    """
    return fn.run(piece, *args) if isinstance(fn, Graphed) else apply(fn, piece, *args)


def apply(fn: Any, piece: Piece, *args: Any) -> Any:
    """`piece(fn, *args)`, eagerly."""
    return piece(fn, *args)


def linearize(fn: Any, piece: Piece, *args: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """What `piece(fn, *args)` returns: a value, and a linear map.

    The map takes tensors shaped like the first of args.

    Where fn is `Graphed`, the work that does not depend on the map's argument is done here, once,
    and the map is a `Graphed`.
    """
    return fn.linearize(piece, *args) if isinstance(fn, Graphed) else piece(fn, *args)


def call(fn: Any, *args: Any) -> Any:
    """The piece that is fn itself."""
    return fn(*args)


def at(fn: Callable[..., Any], *more: Any) -> Callable[..., Any]:
    """fn with its last arguments known."""
    return fn.at(*more) if isinstance(fn, Graphed) else lambda *args: fn(*args, *more)


class _Parts(NamedTuple):
    """A traced function, cut into what does not depend on the map's argument and what does.

    primal: leaves -> the value's leaves, then the residuals; out: the value's structure;
    tangent: (residuals, v) -> product, with the graphs of pieces in which it was used.
    """

    primal: Flat
    out: pytree.TreeSpec
    tangent: fx.GraphModule
    graphs: Graphs


class _Linearized:
    def __init__(self, function: Callable[..., tuple[Any, Callable[[Tensor], Tensor]]]) -> None:
        self.function = function
        self._made: dict[tuple[Any, ...], _Parts] = {}

    def __call__(self, known: Any, args: tuple[Any, ...]) -> tuple[Any, Graphed]:
        leaves, structure = pytree.tree_flatten((known, args))
        key = (structure, signature(leaves))
        if key not in self._made:
            self._made[key] = self._make(leaves, structure, args[0])
        parts = self._made[key]
        found = parts.primal(leaves)
        count = parts.out.num_leaves
        product = Graphed(
            lambda residuals, v: parts.tangent(*residuals, v)[0], found[count:], parts.graphs
        )
        return pytree.tree_unflatten(found[:count], parts.out), product

    def _make(self, leaves: list[Tensor], structure: pytree.TreeSpec, like: Tensor) -> _Parts:
        specs: list[pytree.TreeSpec] = []

        def flat(inputs: list[Tensor], v: Tensor) -> list[Tensor]:
            value, product = self.function(*pytree.tree_unflatten(inputs, structure))
            values, spec = pytree.tree_flatten(value)
            specs.append(spec)
            return [*values, product(v)]

        examples, both = pytree.tree_flatten((leaves, torch.ones_like(like)))
        traced = trace(flat, examples, both)
        primal, tangent = _cut(traced.graph, len(leaves))
        return _Parts(runner(traced._replace(graph=primal), leaves), specs[0], tangent, {})


def _cut(graph: fx.GraphModule, num_leaves: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph's operations that do not depend on its input number `num_leaves`, and those that
    do.

    The first takes the other inputs and returns all outputs but the last, then the residuals; the
    second takes the residuals and that input, and returns the last output.
    """
    nodes = list(graph.graph.nodes)
    v = [node for node in nodes if node.op == "placeholder"][num_leaves]
    moving = {v}
    for node in nodes:
        if node.op == "call_function" and any(
            argument in moving for argument in node.all_input_nodes
        ):
            moving.add(node)
    (output,) = (node for node in nodes if node.op == "output")
    *values, product = output.args[0]
    residuals = list(
        dict.fromkeys(
            a for node in nodes if node in moving for a in node.all_input_nodes if a not in moving
        )
    )
    if product not in moving:
        residuals.append(product)

    primal, where = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        if node not in moving and node.op != "output":
            where[node] = primal.node_copy(node, where.__getitem__)
    primal.output([where[node] for node in (*values, *residuals)])
    primal.eliminate_dead_code()

    tangent, there = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in (*residuals, v):
        there[node] = tangent.placeholder(node.name)
        there[node].meta.update(node.meta)
    for node in nodes:
        if node in moving and node is not v:
            there[node] = tangent.node_copy(node, there.__getitem__)
    tangent.output([there[product]])
    return fx.GraphModule(graph, primal), fx.GraphModule(graph, tangent)
