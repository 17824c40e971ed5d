"""Whether an output is linear in some parameters, known from how the network is built.

It is never found by trying it out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from varmeta._checks import kind_of
from varmeta.models.linear_predictor import LinearPredictor

# Linear in their parameters, and in their input; exact types, since a subclass may have another
# forward.
_LINEAR = (nn.Linear, LinearPredictor)
# Without parameters, and linear in their input.
_LINEAR_MAPS = (nn.Identity, nn.Flatten, nn.Unflatten)


def is_linear_in(net: nn.Module, names: Collection[str]) -> bool:
    """Whether the output is known to be linear (affine) in the parameters `names` together.

    The others are fixed.

    Known are `nn.Linear`, `LinearPredictor`, and an `nn.Sequential` in which `names` belong to one
    such layer that no other than linear layers follow: its last layer, as a rule.  A subclass, a
    hook, a parametrisation or a `forward` of one's own may do anything, so nothing is known of
    them.

    >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> is_linear_in(net, ["2.weight", "2.bias"]), is_linear_in(net, ["0.weight"])
    (True, False)
    """
    every = dict(net.named_parameters(remove_duplicate=False))
    held = [*every.values(), *(value for _, value in net.named_buffers(remove_duplicate=False))]
    # what serves in two layers enters twice, and has a value under one of its names alone
    once = len({id(value) for value in held}) == len(held)
    return once and every.keys() >= set(names) and _is_linear_in(net, names)


def _is_linear_in(net: nn.Module, names: Collection[str]) -> bool:
    if not _is_plain(net):
        return False
    if type(net) in _LINEAR:
        return True
    if type(net) is not nn.Sequential:
        return False
    owners = {name.partition(".")[0] for name in names}
    # not `named_children`, which leaves out a module that comes a second time
    children = list(net._modules.items())
    at = [index for index, (child, _) in enumerate(children) if child in owners]
    if len(at) != 1:
        return False
    own = [name.partition(".")[2] for name in names]
    layers = [child for _, child in children if child is not None]
    return _is_linear_in(layers[at[0]], own) and all(map(_is_linear_map, layers[at[0] + 1 :]))


def head_of(net: nn.Module, names: Collection[str]) -> nn.Linear | None:
    """The last `nn.Linear` with a bias, where `names` are its parameters, both, and no others.

    After it may stand what moves numbers and changes none (`nn.Flatten`).  None elsewhere, and of
    what nothing is known, as in `is_linear_in`.

    >>> net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> head_of(net, ["2.weight", "2.bias"])
    Linear(in_features=8, out_features=3, bias=True)
    >>> head_of(net, ["2.weight"]) is None
    True
    """
    if not is_linear_in(net, names):
        return None
    own = {name.rpartition(".")[2] for name in names}
    owner = net.get_submodule(next(iter(names)).rpartition(".")[0])
    after = [module for module in net.modules() if next(module.parameters(recurse=False), None)
             is not None]  # fmt: skip
    if type(owner) is not nn.Linear or own != {"weight", "bias"} or after[-1] is not owner:
        return None
    return owner


def own_forward(net: nn.Module | None) -> str | None:
    """What to do about a network whose `forward` is its user's own; None for others.

    >>> own_forward(nn.Sequential(nn.Linear(1, 1))) is None
    True
    """
    if net is None or type(net) in (nn.Sequential, *_LINEAR):
        return None
    return (
        f"the network is {kind_of(net)}, whose own forward may do anything: give its parts as "
        "nn.Sequential(body, head)"
    )


def _is_linear_map(module: nn.Module) -> bool:
    """Whether the output is known to be linear (affine) in the input."""
    if not _is_plain(module):
        return False
    if type(module) is nn.Sequential:
        return all(_is_linear_map(child) for child in module._modules.values() if child is not None)
    return type(module) in (*_LINEAR, *_LINEAR_MAPS)


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def looks_straight(run: Callable[[Tensor], Tensor], theta: Tensor) -> bool:
    """Whether second differences of `run` around theta `(D,)` vanish but for rounding.

    They are taken along one direction; run takes points `(3, 1, D)`.  It proves nothing.
    """
    generator = torch.Generator().manual_seed(0)
    step = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta)
    # a kink may lie far from the start, so steps of several lengths
    for length in (1.0, 32.0, 1024.0):
        points = torch.stack([theta + length * step, theta, theta - length * step]).unsqueeze(1)
        with torch.no_grad():
            plus, middle, minus = run(points)
        size = max(float(plus.abs().max()), float(minus.abs().max()), 1e-30)
        bend, rounding = (plus + minus - 2 * middle).abs().max(), torch.finfo(theta.dtype).eps
        if not bool(bend <= 1e3 * rounding * size):
            return False
    return True
