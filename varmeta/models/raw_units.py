"""A linear model's prior, learned from standardised data, in the data's own units.

With x' = (x - m) / s and y' = (y - l) / k, the coefficients of y on x are an affine function of
those of y' on x':

    slope_j     = k / s_j slope'_j
    intercept   = l + k (intercept' - sum_j m_j / s_j slope'_j)
    noise scale = k scale'

Coefficients of the prior's covariates go through the same linear map, less its shift, and are
divided by their feature's sd; so a feature that moves a slope of the scaled data moves the
intercept of the raw data too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from varmeta.likelihoods.base import NOISE_SCALE, TASK_SCALE
from varmeta.models.learned_prior import LearnedPrior
from varmeta.models.linear_predictor import LinearPredictor
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import named_parts
from varmeta.tasks.scaling import Scaling


def raw_prior(
    scaling: Scaling, model: TaskModel, eta: Mapping[str, Tensor], prior: LearnedPrior
) -> LearnedPrior:
    """See `Fit.raw_prior`."""
    slopes, intercept = _positions(model.net)
    if model.constants:
        raise ValueError(
            "raw_prior needs a model whose coefficients are all learned, but "
            f"{model.constants[0]!r} is a constant (requires_grad=False), which does not move with "
            "the units: standardise the predictions back, scaling.y_inverse"
        )
    start = {name: value for name, value in model.start.items() if name not in model.coefficients}
    theta = prior.loc | {name: eta[name] for name in model.shared}
    mean = torch.cat([theta[name].reshape(-1) for name in start])  # varying and shared
    matrix, shift = _affine_map(scaling, slopes, intercept, mean)
    if TASK_SCALE in start:  # a number of its own, and the last
        matrix[-1, -1], shift[-1] = 1.0, scaling.response[1].to(shift).log().reshape(())
    kind = torch.cat(
        [torch.full((value.numel(),), name in model.shared) for name, value in start.items()]
    )
    shared, varying = kind.nonzero().flatten(), (~kind).nonzero().flatten()
    if bool(matrix[shared][:, varying].any()):
        raise ValueError(
            "the slopes vary between tasks but the intercept is shared, and in raw units, where x "
            "is not centred, an intercept that is the same for all tasks does not say the same: "
            "let the intercept vary"
        )
    mean = matrix @ mean + shift
    rows = matrix[varying][:, varying]
    covariance = rows @ prior.covariance @ rows.T
    sd = covariance.diagonal().sqrt()
    moved = _moved(scaling, model, eta, rows)
    # theta0 is the location where the raw features are 0
    mean[varying] = mean[varying] - sum(
        scaling.features[feature][0] * by for feature, by in moved.items()
    )
    named = named_parts(mean, start)
    coefficients, labels = _named(model, prior, moved)
    return replace(
        prior,
        loc=model.weights.unflatten(mean[varying]),
        precision=model.weights.unflatten(sd**-2),
        sd=model.weights.unflatten(sd),
        dense_covariance=covariance,
        factor=None,
        shared={name: named[name] for name in model.shared},
        coefficients=coefficients,
        coefficient_labels=labels,
        observation={}
        if prior.scale is None
        else {NOISE_SCALE: prior.scale * scaling.response[1].to(prior.scale).reshape(())},
    )


def _moved(
    scaling: Scaling, model: TaskModel, eta: Mapping[str, Tensor], rows: Tensor
) -> dict[str, Tensor]:
    """By how much one raw unit of each feature moves the raw weights, `(D,)` by the feature's
    name.
    """
    moved = dict[str, Tensor]()
    for key, (name, feature) in model.coefficients.items():
        zeros = {other: rows.new_zeros(shape) for other, shape in model.weights.shapes.items()}
        by = rows @ model.weights.flatten(zeros | {name: eta[key]}) / scaling.features[feature][1]
        moved[feature] = moved[feature] + by if feature in moved else by
    return moved


def _named(
    model: TaskModel, prior: LearnedPrior, moved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The coefficients by name, those that are not 0 by the model's own making, and their
    labels.
    """
    weights, labels = model.weights, iter(prior.labels)
    own = {
        name: tuple(itertools.islice(labels, size))
        for name, size in zip(weights.names, weights.sizes, strict=True)
    }
    found = {
        f"{name}:{feature}": value
        for feature, by in moved.items()
        for name, value in weights.unflatten(by).items()
        if f"{name}:{feature}" in model.coefficients or bool(value.any())
    }
    return found, {
        key: tuple(f"{label}:{key.rpartition(':')[2]}" for label in own[key.rpartition(":")[0]])
        for key in found
    }


def _positions(net: nn.Module | None) -> tuple[list[int], int | None]:
    """Where slopes and intercept stand among all parameters."""
    if isinstance(net, nn.Linear) and net.out_features == 1:
        return list(range(net.in_features)), None if net.bias is None else net.in_features
    if isinstance(net, LinearPredictor):
        names = [name for name, _ in net.named_parameters()]
        slopes = [names.index(net.parameter_names[column]) for column in net.columns]
        return slopes, names.index(net.intercept_name) if net.intercept_name else None
    what = "a Pyro program" if net is None else f"a {type(net).__name__}"
    raise TypeError(
        "raw_prior needs a linear model, nn.Linear with one output or vm.LinearPredictor, not "
        f"{what}: of others standardise the predictions back, scaling.y_inverse"
    )


def _affine_map(
    scaling: Scaling, slopes: list[int], intercept: int | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Matrix `(P, P)` and shift `(P,)` that take the coefficients of the scaled data to those of
    the raw data.
    """
    loc, scale = (value.to(like).reshape(-1) for value in (scaling.x_loc, scaling.x_scale))
    y_loc, y_scale = (value.to(like).reshape(-1) for value in scaling.response)
    if len(loc) != len(slopes):
        raise ValueError(
            f"the scaling is of {len(loc)} columns of x, but the model has {len(slopes)}: give the "
            "tasks' own"
        )
    if y_loc.numel() != 1:
        raise ValueError(
            f"the scaling is of {y_loc.numel()} responses, but raw_prior serves models of one"
        )
    matrix, shift = torch.zeros(len(like), len(like)).to(like), torch.zeros_like(like)
    matrix[slopes, slopes] = y_scale / scale
    if intercept is None:
        if bool(loc.any()) or bool(y_loc.any()):
            raise ValueError(
                "the data were centred but the model has no intercept, so in raw units it would "
                "need one: add an intercept"
            )
        return matrix, shift
    matrix[intercept, intercept] = y_scale
    matrix[intercept, slopes] = -y_scale * loc / scale
    shift[intercept] = y_loc
    return matrix, shift
