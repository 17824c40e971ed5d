"""The parameters in which a network's output is linear, known from how it is built and never by trying it out."""

from __future__ import annotations

from torch import nn

from varmeta.linear_predictor import LinearPredictor

# Modules without parameters whose output is linear in their input, so that they may follow a linear layer.
_LINEAR_MAPS = (nn.Identity, nn.Flatten, nn.Unflatten)


def linear_parameters(net: nn.Module) -> frozenset[str]:
    """Names of parameters in which the output is linear (affine) together, whatever the others are; may be empty.

    Known are `nn.Linear`, `LinearPredictor`, and an `nn.Sequential` that ends in one of them: its last layer.  A subclass,
    a hook, a parametrisation or a `forward` of one's own may do anything, so nothing is known of them.

    >>> sorted(linear_parameters(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))))
    ['2.bias', '2.weight']
    >>> linear_parameters(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
    frozenset()
    """
    if not _is_plain(net):
        return frozenset()
    # exact types: a subclass may have another forward
    if type(net) in (nn.Linear, LinearPredictor):
        return frozenset(name for name, _ in net.named_parameters())
    if type(net) is nn.Sequential:
        for name, module in reversed(list(net.named_children())):
            if type(module) in _LINEAR_MAPS and _is_plain(module):
                continue
            inside = {f"{name}.{inner}" for inner in linear_parameters(module)}
            # a parameter that is used in an earlier layer too is listed there, under the earlier layer's name
            return frozenset(inside & {known for known, _ in net.named_parameters()})
    return frozenset()


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is its class's `forward` and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
