"""How many inputs the layer of each parameter has.

They set the precision at which a network's outputs neither grow nor fade.
"""

from __future__ import annotations

from torch import nn


def fan_ins(net: nn.Module) -> dict[str, int]:
    """The number of inputs of its layer by parameter name, where it is more than one.

    Empty for a net of a single layer.

    As PyTorch's own starts have it, a bias has the fan-in of the weights beside it.  One layer is a
    regression, whose weights have the units of its columns, of which their number says nothing; an
    embedding's row is looked up, and a norm's scale has one input.

    >>> fan_ins(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
    {'2.weight': 8, '2.bias': 8}
    >>> fan_ins(nn.Linear(5, 1))
    {}
    """
    if sum(any(True for _ in module.parameters(recurse=False)) for module in net.modules()) < 2:
        return {}
    found = {}
    for module_name, module in net.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        own = dict(module.named_parameters(recurse=False))
        inputs = {
            name: value[0].numel() for name, value in own.items() if value.dim() > 1 and len(value)
        }
        widest = max(inputs.values(), default=1)
        for name, value in own.items():
            count = inputs.get(name, widest if value.dim() == 1 else 1)
            if count > 1:
                found[f"{module_name}.{name}" if module_name else name] = count
    return found
