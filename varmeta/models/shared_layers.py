"""The layers of a network that come before all that varies: run once, for many calls of the rest.

What no task's weights touch puts out the same at every inner step and every draw.  A network is cut
where the first weights that vary come in, into a body, which needs the data and eta alone, and a
head.  Whatever cannot be cut, or asks about other rows or another eta than those of which the
body's outputs are known, is run whole: the numbers are the same either way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from varmeta.graphs.process import ALONE
from varmeta.models.recurrent import can_be_unrolled

Features = tuple[Tensor, ...]
"""What the body puts out for rows x, each `(tasks, points, ...)` as a rule: what the head needs."""

# What of a tensor is no tensor, by method and by attribute: the head works it out itself.
_SIZES = ("size", "dim", "numel", "ndimension")
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")


class Split(NamedTuple):
    """A network in two: `net(x)` is `head(x, *body(x))`.

    Both have the network's own parameters and buffers, under their names there.
    """

    body: fx.GraphModule
    head: fx.GraphModule


class _Tracer(fx.Tracer):
    """Looks into a module only where something in it varies, and nothing but its forward is run."""

    # what is made of a buffer is no constant: it follows the buffer to the data's precision
    proxy_buffer_attributes = True

    def __init__(self, varying: frozenset[int]) -> None:
        super().__init__()
        self.varying = varying

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            super().is_leaf_module(m, module_qualified_name)
            or can_be_unrolled(m)
            or not _is_plain(m)
            or not _holds(m, self.varying)
        )


def split(net: nn.Module, varying: Collection[str]) -> Split | None:
    """The network cut where the first of the parameters called `varying` come in.

    None where no layer with parameters or buffers comes before them, and for a network that
    `torch.fx` cannot follow, in which one parameter serves in two layers, or that writes into what
    another layer may read.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> parts = split(net, ["2.weight", "2.bias"])
    >>> x = torch.ones(5, 3)
    >>> torch.equal(parts.head(x, *parts.body(x)), net(x))
    True
    >>> [name for name, _ in parts.head.named_parameters()]
    ['2.weight', '2.bias']
    """
    every = list(net.named_parameters(remove_duplicate=False))
    if len({id(value) for _, value in every}) < len(every) or not _is_plain(net):
        return None
    own = frozenset(id(value) for name, value in every if name in varying)
    try:
        with ALONE:  # which patches nn.Module
            graph = _Tracer(own).trace(net, _defaults(net))
        return _cut(net, graph, own)
    except Exception:  # anything may stand in a forward, and only some of it can be followed
        return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _holds(module: nn.Module, values: frozenset[int]) -> bool:
    return any(id(value) in values for value in module.parameters())


def _defaults(net: nn.Module) -> dict[str, Any]:
    """The forward's arguments but the first, at their defaults: nobody gives them."""
    _, *others = inspect.signature(net.forward).parameters.values()
    return {p.name: p.default for p in others if p.kind is p.POSITIONAL_OR_KEYWORD}


def _cut(net: nn.Module, graph: fx.Graph, varying: frozenset[int]) -> Split | None:
    x = next(node for node in graph.nodes if node.op == "placeholder")
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, Node) or any(_writes(net, node) for node in graph.nodes):
        return None
    moving, light = _moving(net, graph, varying), _light(graph)
    # the head's own nodes, and those that cost nothing
    needed = _before([result], lambda node: node in moving or node in light)
    ends = [
        node
        for node in graph.nodes
        if node is not x and node not in moving and node not in light
        and (node is result or any(user in needed for user in node.users))
    ]  # fmt: skip
    ahead = _before(ends, lambda node: node is not x)
    if not any(_has_numbers(net, node) for node in ahead):
        return None
    body = _part(graph, [x], ahead, ends)
    head = _part(graph, [x, *ends], needed, [result])
    return Split(fx.GraphModule(net, body), fx.GraphModule(net, _alone(head)))


def _moving(net: nn.Module, graph: fx.Graph, varying: frozenset[int]) -> set[Node]:
    """The nodes that depend on what varies."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            own = _holds(net.get_submodule(str(node.target)), varying)
        else:
            own = node.op == "get_attr" and id(_attribute(net, str(node.target))) in varying
        if own or any(given in found for given in node.all_input_nodes):
            found.add(node)
    return found


def _writes(net: nn.Module, node: Node) -> bool:
    """Whether a node may write into what others read: the two parts do not run in its order."""
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        if not any(getattr(part, "inplace", False) for part in module.modules()):
            return False
        # x is written into by nobody (`check`), and a layer's own output that nobody else reads, as
        # an activation's after a convolution, may be
        return not all(given.op == "placeholder" or _is_fresh(net, given)
                       for given in node.all_input_nodes)  # fmt: skip
    name = str(getattr(node.target, "__name__", node.target))
    called = node.op in ("call_function", "call_method")
    written = name.endswith("_") and not name.endswith("__")
    return called and (written or bool(node.kwargs.get("inplace")) or "out" in node.kwargs)


def _is_fresh(net: nn.Module, node: Node) -> bool:
    """Whether a node is a layer's new tensor, and read by one other alone."""
    return node.op == "call_module" and _has_numbers(net, node) and len(node.users) == 1


def _light(graph: fx.Graph) -> set[Node]:
    """Sizes, what is made of them alone, and parameters and buffers themselves."""
    found: set[Node] = set()
    for node in graph.nodes:
        size = node.op == "call_method" and node.target in _SIZES
        named = node.op == "call_function" and node.target is getattr
        made = node.op in ("call_function", "call_method") and node.all_input_nodes
        if (
            node.op == "get_attr"
            or size
            or (named and node.args[1] in _ATTRIBUTES)
            or (made and all(given in found for given in node.all_input_nodes))
        ):
            found.add(node)
    return found


def _before(ends: Sequence[Node], wanted: Any) -> set[Node]:
    """`ends` and all that they are made of, as far as it is `wanted`."""
    found: set[Node] = set()
    ahead = [node for node in ends if wanted(node)]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += [given for given in node.all_input_nodes if wanted(given)]
    return found


def _has_numbers(net: nn.Module, node: Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_module":
        return False
    module = net.get_submodule(str(node.target))
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _part(
    graph: fx.Graph, given: Sequence[Node], nodes: set[Node], results: Sequence[Node]
) -> fx.Graph:
    """The graph of `nodes` as a function of `given`, which returns the tuple of `results`."""
    part, where = fx.Graph(), dict[Node, Node]()
    for number, node in enumerate(given):
        where[node] = part.placeholder(f"given_{number}")
    for node in graph.nodes:
        if node in nodes and node not in where:
            where[node] = part.node_copy(node, where.__getitem__)
    part.output(tuple(where[node] for node in results))
    return part


def _alone(graph: fx.Graph) -> fx.Graph:
    """The graph with its only result instead of a tuple of it."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    output.args = (output.args[0][0],)
    return graph


def _attribute(net: nn.Module, target: str) -> Any:
    value: Any = net
    for part in target.split("."):
        value = getattr(value, part)
    return value


def numbers_of(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of `values` whose names the module has."""
    own = (*module.named_parameters(), *module.named_buffers())
    return {name: values[name] for name, _ in own if name in values}


# -- what is known of some rows --------------------------------------------------------------------


class Ahead:
    """The body's outputs for some rows at one eta, each worked out when it is first asked for.

    run: from x `(tasks, points, ...)` to its features, with their derivative in `shared`.
    shared: what of eta the network's layers share.
    rows: x of which this is to know.
    known: the features of the first of them, where they are at hand.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Features],
        shared: Mapping[str, Tensor],
        rows: Sequence[Tensor],
        known: Features | None = None,
    ) -> None:
        self.run, self.shared, self.rows = run, shared, rows
        self._known: dict[int, Features] = {} if known is None else {0: known}

    def of(self, eta: Mapping[str, Tensor], x: Tensor) -> Features | None:
        """The features of x at eta; None where that is not what this knows.

        Of these very tensors they are, with their derivative, and of eta's numbers without one:
        whoever asks at another eta, or differentiates another copy of it, gets None.
        """
        at = next((number for number, rows in enumerate(self.rows) if rows is x), None)
        same = all(eta[name] is value for name, value in self.shared.items())
        if at is None or not (
            same or all(_same_numbers(eta[name], value) for name, value in self.shared.items())
        ):
            return None
        if at not in self._known:
            with torch.enable_grad():
                self._known[at] = _kept(self.run(x), self.shared)
        known = self._known[at]
        return known if same else tuple(value.detach() for value in known)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether `one` asks for no derivative and is `other`'s memory."""
    if one.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(one):
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


class _Kept(torch.autograd.Function):
    """Values whose derivative may be asked for again and again: the graph behind them is kept."""

    @staticmethod
    def forward(ctx: Any, values: Features, *given: Tensor) -> Any:
        ctx.values, ctx.given = values, given
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        moved = [(v, g) for v, g in zip(ctx.values, outputs, strict=True) if v.requires_grad]
        found = torch.autograd.grad(
            [value for value, _ in moved],
            ctx.given,
            [gradient for _, gradient in moved],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return (None, *found)


def _kept(values: Features, shared: Mapping[str, Tensor]) -> Features:
    """The same values, through which one may differentiate several times."""
    learned = [value for value in shared.values() if value.requires_grad]
    if not (learned and any(value.requires_grad for value in values)):
        return values
    found: Features = _Kept.apply(values, *learned)
    return found
