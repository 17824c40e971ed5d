"""Trace a tensor function once into a graph, and call the compiled graph from then on.

What makes a function slow here is Python: handlers, modules, autograd's bookkeeping, one small kernel after another.  A function
that is pure in its tensors does the same arithmetic at every call with the same shapes, so it is traced once (gradients and
all) into a graph of plain tensor operations, and the graph is compiled.  Nothing here knows what is computed.

Compiled graphs are kept for the whole process by what they compute, not by who asked: two fits of the same model and shapes
compile once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

log = logging.getLogger("varmeta")

Function = Callable[..., Any]


@dataclass
class _Compiled:
    """Graphs that have been compiled in this process, by their code and the shapes of what they take."""

    graphs: dict[tuple[Any, ...], Function] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


_COMPILED = _Compiled()


def compile_cost() -> float:
    """Seconds that the next new graph will take to compile, judged by those before it (the first in a process is slow)."""
    return max(_COMPILED.seconds[-3:]) if _COMPILED.seconds else FIRST_COMPILE


# Measured on two cores: the first graph in a process 20 to 45 s, later ones 2 to 8 s.
FIRST_COMPILE = 30.0


class Captured:
    """`function` as a graph, made at its first call for each structure and shapes of its arguments, then compiled.

    function: pure in its arguments, trees (dicts, lists, tuples) of tensors; no Python value may depend on a tensor's
        numbers.  Returns a tree of tensors, which carry no graph.
    compiled: False keeps the captured graph uncompiled (the same operations, one by one).

    Raises CaptureError at the first call where the function cannot be traced or compiled.

    >>> square = Captured(lambda tree: {"y": tree["x"] ** 2}, compiled=False)
    >>> square({"x": torch.tensor([1.0, 2.0])})
    {'y': tensor([1., 4.])}
    """

    def __init__(self, function: Function, compiled: bool = True) -> None:
        self.function = function
        self.compiled = compiled
        self._made: dict[tuple[Any, ...], Callable[[Sequence[Tensor]], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, structure = pytree.tree_flatten(args)
        key = (structure, signature(leaves))
        if key not in self._made:
            self._made[key] = self._make(leaves, structure)
        return self._made[key](leaves)

    def _make(self, leaves: list[Tensor], structure: pytree.TreeSpec) -> Callable[[Sequence[Tensor]], Any]:
        graph, out = capture(self.function, leaves, structure)
        constants = lift(graph, len(leaves))
        run: Function = compile_graph(graph, [*leaves, *constants]) if self.compiled else graph
        return lambda now: pytree.tree_unflatten(list(run(*now, *constants)), out)


class CaptureError(RuntimeError):
    """A function that cannot be traced or compiled, with the reason in a sentence."""


def capture(
    function: Function, leaves: Sequence[Tensor], structure: pytree.TreeSpec
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """The graph of `function` on flat inputs, dead operations dropped, and the structure of what it returns."""
    out: list[pytree.TreeSpec] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        values, spec = pytree.tree_flatten(function(*pytree.tree_unflatten(list(inputs), structure)))
        out.append(spec)
        return values

    try:
        graph = make_fx(flat, tracing_mode="real")(*[leaf.detach() for leaf in leaves])
    except Exception as error:
        raise CaptureError(f"it cannot be traced: {str(error).partition(chr(10))[0]}") from error
    # autograd's bookkeeping leaves operations whose results nobody reads; some of them the compiler cannot handle
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, out[0]


def lift(graph: fx.GraphModule, num_inputs: int) -> list[Tensor]:
    """Make a graph's constant tensors further inputs of it, so that equal computations are equal graphs; the constants."""
    constants: list[Tensor] = []
    placed = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert len(placed) == num_inputs
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        with graph.graph.inserting_after(placed[-1]):
            placeholder = graph.graph.placeholder(f"constant_{len(constants)}")
        placed.append(placeholder)
        constants.append(getattr(graph, str(node.target)))
        node.replace_all_uses_with(placeholder)
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


def compile_graph(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Function:
    """The compiled graph: an equal one of this process, or a new one, compiled and tried on the examples."""
    key = (graph.code, signature(examples))
    if key not in _COMPILED.graphs:
        begin = time.perf_counter()
        compiled = torch.compile(graph, fullgraph=True, dynamic=False)
        try:
            compiled(*examples)
        except Exception as error:
            raise CaptureError(f"it cannot be compiled: {str(error).partition(chr(10))[0]}") from error
        _COMPILED.seconds.append(time.perf_counter() - begin)
        _COMPILED.graphs[key] = compiled
    return _COMPILED.graphs[key]


def signature(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is specialised to: shapes, strides, dtypes and devices."""
    return tuple((tuple(x.shape), x.stride(), x.dtype, x.device) for x in leaves)
