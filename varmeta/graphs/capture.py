"""Trace a tensor function once into a graph, and call the compiled graph from then on.

What makes a function slow here is Python: handlers, modules, autograd's bookkeeping, one small
kernel after another.  A function that is pure in its tensors does the same arithmetic at every call
with the same shapes, so it is traced once (gradients and all) into a graph of plain tensor
operations, and the graph is compiled.  Nothing here knows what is computed.

Compiled graphs are kept for the whole process by what they compute, not by who asked: two fits of
the same model and shapes compile once.  torch keeps them on disk too (TORCHINDUCTOR_CACHE_DIR), so
that the next process only traces.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch import _guards as guards
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils import _pytree as pytree

from varmeta.graphs.nodes import is_view
from varmeta.graphs.process import ALONE, unheard
from varmeta.graphs.rewrite import rewrite

log = logging.getLogger("varmeta")

Function = Callable[..., Any]
Flat = Callable[[Sequence[Tensor]], list[Tensor]]


class CaptureError(RuntimeError):
    """A function that cannot be traced or compiled, with the reason in a sentence."""


class Traced(NamedTuple):
    """A graph of plain tensor operations, its constants, and the tree that it returns.

    The constants are the graph's last inputs.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    out: pytree.TreeSpec


class Captured:
    """`function` as a compiled graph, made at the first call with such arguments.

    One graph for each structure and shapes of the arguments.

    function: pure in its arguments, trees (dicts, lists, tuples) of tensors; no Python value may
        depend on a tensor's numbers.  Returns a tree of tensors, which carry no graph.

    Raises CaptureError at the first call where the function cannot be traced or compiled.

    >>> square = Captured(lambda tree: {"y": tree["x"] ** 2})
    >>> square({"x": torch.tensor([1.0, 2.0])})  # doctest: +SKIP
    {'y': tensor([1., 4.])}
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self._traced: dict[tuple[Any, ...], Traced] = {}
        self._made: dict[tuple[Any, ...], Flat] = {}

    def __call__(self, *args: Any) -> Any:
        leaves: list[Tensor] = []
        key = (_shape_of(args, leaves), signature(leaves))
        if key not in self._made:
            self._made[key] = runner(self._trace(key, args), leaves)
        return pytree.tree_unflatten(self._made[key](leaves), self._traced[key].out)

    def traced(self, *args: Any) -> Traced:
        """The graph for these arguments, which a later call need not trace again."""
        leaves: list[Tensor] = []
        return self._trace((_shape_of(args, leaves), signature(leaves)), args)

    def _trace(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> Traced:
        if key not in self._traced:
            leaves, structure = pytree.tree_flatten(args)
            self._traced[key] = trace(self.function, leaves, structure)
        return self._traced[key]


def _shape_of(tree: Any, leaves: list[Tensor]) -> Any:
    """What tells trees of one structure from others, hashable.

    Appends the leaves, in pytree's order.

    pytree's own, which serves all kinds of nodes, took a tenth of a small step.
    """
    if isinstance(tree, dict):
        return tuple([(name, _shape_of(value, leaves)) for name, value in tree.items()])
    if isinstance(tree, (tuple, list)):
        return (type(tree), *[_shape_of(value, leaves) for value in tree])
    leaves.append(tree)
    return None


def trace(function: Function, leaves: Sequence[Tensor], structure: pytree.TreeSpec) -> Traced:
    """The graph of `function`, whose arguments are `leaves` in that structure.

    Dead operations are dropped.
    """
    out: list[pytree.TreeSpec] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        values, spec = pytree.tree_flatten(
            function(*pytree.tree_unflatten(list(inputs), structure))
        )
        out.append(spec)
        return values

    try:
        with ALONE, _one_fake_mode():
            graph = make_fx(flat, tracing_mode="real")(*[leaf.detach() for leaf in leaves])
        # autograd's bookkeeping leaves operations whose results nobody reads; some of them the
        # compiler cannot handle
        graph.graph.eliminate_dead_code()
        rewrite(graph)
    except Exception as error:
        raise CaptureError(f"it cannot be traced: {_first_line(error)}") from error
    return Traced(graph, _lift(graph), out[0])


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """One mode for the shapes that a graph's nodes carry.

    torch makes one for each node otherwise, and each notes the whole Python stack: most of what
        tracing took.
    """
    with guards.tracing(guards.TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


def tracing() -> bool:
    """Whether this is being traced into a graph.

    No number can be read then, so loops run to their limit, masked.
    """
    return get_proxy_mode() is not None


def runner(traced: Traced, leaves: Sequence[Tensor]) -> Flat:
    """The compiled graph on flat inputs like `leaves`, to flat outputs."""
    constants = traced.constants
    run = compile_graph(traced.graph, [*leaves, *constants])
    return lambda now: list(run(*now, *constants))


def _lift(graph: fx.GraphModule) -> list[Tensor]:
    """Make a graph's constant tensors further inputs of it, so that equal computations are equal
    graphs; the constants.
    """
    constants: list[Tensor] = []
    placed = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        with graph.graph.inserting_after(placed[-1]):
            placeholder = graph.graph.placeholder(f"constant_{len(constants)}")
        placeholder.meta.update(node.meta)
        placed.append(placeholder)
        constants.append(getattr(graph, str(node.target)))
        node.replace_all_uses_with(placeholder)
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


# -- compilation -----------------------------------------------------------------------------------


@dataclass
class _Compiled:
    """Graphs that have been compiled in this process, by their code and the shapes of what they
    take.
    """

    graphs: dict[tuple[Any, ...], Function] = field(default_factory=dict)
    seconds: float = 0.0


_COMPILED = _Compiled()


# Called with True before a graph is compiled and with False after: whoever watches may say so.
watcher: ContextVar[Callable[[bool], None] | None] = ContextVar("watcher", default=None)


def seconds_compiling() -> float:
    """What compiling graphs has taken in this process so far."""
    return _COMPILED.seconds


def compile_graph(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Function:
    """The compiled graph: an equal one of this process, or a new one.

    A new one is compiled and tried on the examples.
    """
    key = (graph.code, signature(examples))
    if key not in _COMPILED.graphs:
        begin = time.perf_counter()
        told = watcher.get() or (lambda compiling: None)
        told(True)
        try:
            compiled = _compile(graph, examples)
        except Exception as error:
            raise CaptureError(f"it cannot be compiled: {_first_line(error)}") from error
        finally:
            told(False)
        _COMPILED.seconds += time.perf_counter() - begin
        _COMPILED.graphs[key] = compiled
    return _COMPILED.graphs[key]


def _compile(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Function:
    *others, last = _wrappers(examples)
    for options in others:
        try:
            return _compiled_by(options, graph, examples)
        except Exception as error:
            log.info("a graph cannot be compiled with %s (%s)", options, _first_line(error))
    return _compiled_by(last, graph, examples)


def _compiled_by(
    options: dict[str, Any], graph: fx.GraphModule, examples: Sequence[Tensor]
) -> Function:
    from torch import _inductor  # seconds, which a process without a compiled graph need not spend

    # the graph is made of plain operations already: nothing for torch.compile's front end, and its
    # guards, to add
    with _without_remarks(), ALONE, torch.no_grad(), _kept_on_disk():
        compiled: Function = _inductor.compile(graph, list(examples), options=options)
        compiled(*examples)
    return compiled


def _wrappers(examples: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Options for what calls the kernels one after another, the best first.

    The last, Python's, is always there.

    One in C++ takes up to 10 % less of a step of many kernels, and compiles as fast where the
    kernels are a file of their own (docs/speed.md).  It has not been tried on a GPU.
    """
    from torch._inductor import config

    python = {"cpp_wrapper": False}
    if any(x.device.type != "cpu" for x in examples) or not hasattr(
        config, "cpp_wrapper_build_separate"
    ):
        return [python]
    in_cpp: dict[str, Any] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        # kernels of vectors in a file of their own do not compile where the processor has no
        # vectors
        del in_cpp["cpp_wrapper_build_separate"]
    return [in_cpp, python]


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Within it the compiler keeps its warnings about its own parts to itself, of which nobody can
    do anything.

    It logs one for every operation that C++ calls by a longer way, such as a triangular solve.
    """
    lowering = logging.getLogger("torch._inductor.ir")
    level = lowering.level
    lowering.setLevel(logging.ERROR)
    try:
        with unheard():
            yield
    finally:
        lowering.setLevel(level)


def _kept_on_disk() -> AbstractContextManager[object]:
    """Within it, what is compiled is found again by other processes.

    The compiler refuses to where it knows of no shapes.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fixed = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    return tracing(TracingContext(fixed))


def signature(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph is specialised to: shapes, strides, dtypes and devices."""
    return tuple(
        [(x.shape, None if x.is_contiguous() else _strides(x), x.dtype, x.device) for x in leaves]
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    # along an axis of length one there is no step, whatever torch says its length is
    return tuple(step if size > 1 else 1 for size, step in zip(x.shape, x.stride(), strict=True))


# Measured on two cores (docs/speed.md).  They are constants, and no clock is read, so that whether
# a fit is compiled, and with that the last digit of its numbers, is the same in every run.
_SECONDS_PER_OPERATION = 1.5e-5  # eagerly, with what autograd and Python add
_SECONDS_PER_BYTE = 1e-10
# where the compiler finds nothing on disk
FIRST_COMPILATION, _COMPILATION_PER_OPERATION = 20.0, 1e-2


def eager_seconds(graph: fx.GraphModule) -> float:
    """What one eager evaluation of a traced function takes, in seconds.

    It is estimated from the number and size of the function's operations.
    """
    number: int = sum(node.op == "call_function" for node in graph.graph.nodes)
    return number * _SECONDS_PER_OPERATION + graph_bytes(graph) * _SECONDS_PER_BYTE


def graph_bytes(graph: fx.GraphModule) -> int:
    """What all of a graph's operations write; views of what another wrote hold nothing."""
    return sum(
        _bytes(node)
        for node in graph.graph.nodes
        if node.op == "call_function" and not is_view(node.target)
    )


def compile_seconds(graph: fx.GraphModule) -> float:
    """What compiling it takes, from the number of its operations."""
    return FIRST_COMPILATION + len(graph.graph.nodes) * _COMPILATION_PER_OPERATION


def _bytes(node: fx.Node) -> int:
    values = node.meta.get("val")
    values = values if isinstance(values, (list, tuple)) else [values]
    return sum(math.prod(x.shape) * x.element_size() for x in values if isinstance(x, Tensor))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
