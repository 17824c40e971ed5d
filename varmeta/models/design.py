"""The design of a linear output: the columns by which it moves with its parameters.

For a network that is linear in some parameters by construction (`linearity.py`): what its last
linear layer is given, and from that a column for every parameter of the layer.  Nothing is probed,
and the columns carry the derivative of the layers before.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from varmeta.models.linear_predictor import LinearPredictor
from varmeta.models.network import as_columns, differentiable_attention


def columns(
    net: nn.Module, names: Collection[str], values: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """The columns of the parameters called `names` of one layer, and the output where they are 0.

    `(points, outputs, parameters)`, in the order of `names`, and `(points, outputs)`.

    values: every other parameter of the network, by name.
    x: `(points, ...)`, of one task where rows meet.  Several outputs of a row stand flat.

    >>> known = {"bias": torch.ones(1)}
    >>> design, constant = columns(nn.Linear(1, 1), ["weight"], known, torch.eye(1))
    >>> design.tolist(), constant.tolist()
    ([[[1.0]]], [[1.0]])
    """
    x = as_columns(x)
    with differentiable_attention():
        found, constant = _columns(net, tuple(names), values, x)
    outputs = math.prod(constant.shape[1:])  # of no points too
    return found.reshape(len(x), outputs, found.shape[-1]), constant.reshape(len(x), outputs)


def given_to(
    net: nn.Module, names: Collection[str], values: Mapping[str, Tensor], x: Tensor
) -> Tensor:
    """What the layer that the parameters called `names` belong to is given, `(points, inputs)`.

    net, values, x: as for `columns`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
    >>> given_to(net, ["1.weight", "1.bias"], {}, torch.ones(3, 1, 2)).tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    x = as_columns(x)
    with differentiable_attention():
        while type(net) is nn.Sequential:
            owner = next(iter(names)).partition(".")[0]
            x = _before(net, owner, values, x)
            names, values = [name.partition(".")[2] for name in names], _of(owner, values)
            net = net.get_submodule(owner)
    return x


def _before(net: nn.Sequential, owner: str, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """x after the children before `owner`."""
    for name, child in net._modules.items():
        if name == owner:
            break
        if child is not None:
            x = torch.func.functional_call(child, _of(name, values), (x,))
    return x


def _columns(
    net: nn.Module, names: tuple[str, ...], values: Mapping[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    if type(net) is not nn.Sequential:
        layer = _predictor if type(net) is LinearPredictor else _linear
        parts, constant = layer(net, values, x)
        for name, part in parts.items():
            if name not in names:
                constant = constant + part @ values[name].reshape(-1).to(part)
        return torch.cat([parts[name] for name in names], -1), constant
    owner = names[0].partition(".")[0]
    children = [(name, child) for name, child in net._modules.items() if child is not None]
    at = [name for name, _ in children].index(owner)
    x = _before(net, owner, values, x)
    own = tuple(name.partition(".")[2] for name in names)
    found, constant = _columns(children[at][1], own, _of(owner, values), x)
    for name, child in children[at + 1 :]:
        run = partial(torch.func.functional_call, child, _of(name, values))
        after = run((constant,))
        # the layer is affine: what a column adds to the constant, it adds to any other
        moved = torch.func.vmap(run, ((-1,),), -1)((constant.unsqueeze(-1) + found,))
        found, constant = moved - after.unsqueeze(-1), after
    return found, constant


def _linear(
    net: nn.Module, values: Mapping[str, Tensor], x: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    assert isinstance(net, nn.Linear)
    eye = torch.eye(net.out_features, dtype=x.dtype, device=x.device)
    # an output's weights move that output alone
    weight = eye.unsqueeze(-1) * x[..., None, None, :]
    parts = {"weight": weight.flatten(-2)}
    if net.bias is not None:
        parts["bias"] = eye.expand(*x.shape[:-1], *eye.shape)
    return parts, x.new_zeros(*x.shape[:-1], net.out_features)


def _predictor(
    net: nn.Module, values: Mapping[str, Tensor], x: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    assert isinstance(net, LinearPredictor)
    parts = {net.intercept_name: x.new_ones(len(x), 1)} if net.intercept_name else {}
    constant = x.new_zeros(len(x))
    for j, name in enumerate(net.columns):
        if name in net.offset:
            constant = constant + x[:, j]
        else:
            parts[net.parameter_names[name]] = x[:, j : j + 1]
    return parts, constant


def _of(owner: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What belongs to a child, by its name there."""
    start = len(owner) + 1
    return {name[start:]: value for name, value in values.items() if name.startswith(f"{owner}.")}
