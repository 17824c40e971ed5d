"""What a model's numbers are called when read: `dose` and `intercept` where that is known."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from varmeta.models.linear_predictor import INTERCEPT, LinearPredictor
from varmeta.models.model import TaskModel
from varmeta.priors.weights import Weights

# These hand the columns of x on as they are.
TRANSPARENT = (nn.Identity, nn.Flatten, nn.Dropout)


def parameter_labels(
    model: TaskModel, x_names: tuple[str, ...] | None = None
) -> dict[str, tuple[str, ...]]:
    """Labels of every entry of each parameter, flattened, by parameter name.

    Shared parameters and coefficients too.

    A linear layer that reads x itself is labelled by x's columns; everything else as in
    `Weights.labels`.  A coefficient of the prior's covariates is called as the weight that it
    moves, and the feature: `intercept:log_uppm`.

    >>> from varmeta import likelihoods
    >>> model = TaskModel(nn.Linear(2, 1), likelihoods.Gaussian())
    >>> parameter_labels(model, ("age", "dose"))
    {'weight': ('age', 'dose'), 'bias': ('intercept',)}
    >>> parameter_labels(model)
    {'weight': ('weight[0,0]', 'weight[0,1]'), 'bias': ('bias',)}
    """
    own = _parameters(model, x_names)
    moved = {
        key: tuple(f"{label}:{feature}" for label in own[name])
        for key, (name, feature) in model.coefficients.items()
    }
    return own | moved


def coefficients(
    model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Every coefficient of the prior's covariates as a number, `()`, by its label."""
    named = parameter_labels(model, x_names)
    return {
        label: number
        for key in model.coefficients
        for label, number in zip(named[key], eta[key].reshape(-1).unbind(), strict=True)
    }


def _parameters(model: TaskModel, x_names: tuple[str, ...] | None) -> dict[str, tuple[str, ...]]:
    plain = {
        name: Weights({name: value.shape}).labels
        for name, value in model.start.items()
        if name not in model.coefficients
    }
    if isinstance(model.net, LinearPredictor):
        return plain | {name: (column,) for column, name in model.net.parameter_names.items()}
    layer = _reader_of_x(model.net)
    if layer is None or x_names is None or layer[1].in_features != len(x_names):
        return plain
    prefix, linear = layer
    outputs = (
        [f"[{row}]" for row in range(linear.out_features)] if linear.out_features > 1 else [""]
    )
    named = plain | {
        f"{prefix}weight": tuple(f"{column}{output}" for output in outputs for column in x_names)
    }
    if linear.bias is not None:
        named[f"{prefix}bias"] = tuple(f"{INTERCEPT}{output}" for output in outputs)
    named = {
        name: labels for name, labels in named.items() if name in plain
    }  # the others are constants
    everything = [label for labels in named.values() for label in labels]
    # a column may be called "intercept" itself; labels that mean two things are worse than none
    return named if len(set(everything)) == len(everything) else plain


def _reader_of_x(net: nn.Module | None) -> tuple[str, nn.Linear] | None:
    """The linear layer that sees x as it is and is the only one with weights, and its name as a
    prefix.
    """
    if isinstance(net, nn.Linear):
        return "", net
    if not isinstance(net, nn.Sequential):
        return None
    for name, module in net.named_children():
        if isinstance(module, nn.Linear):
            alone = all(full.startswith(f"{name}.") for full, _ in net.named_parameters())
            return (f"{name}.", module) if alone else None
        if not isinstance(module, TRANSPARENT):
            return None
    return None
