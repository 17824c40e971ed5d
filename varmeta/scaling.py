"""Shift and scale of the data, remembered so that new tasks get the same and predictions come back in y's units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta._arrays import Part
from varmeta._words import kind_of
from varmeta.bayes.likelihood import Likelihood
from varmeta.tasks import TaskSet

if TYPE_CHECKING:
    from varmeta.bayes.model import TaskModel
    from varmeta.learned_prior import LearnedPrior
    from varmeta.result import Fit


@dataclass(frozen=True, eq=False, repr=False)
class Scaling:
    """x -> (x - x_loc) / x_scale and y -> (y - y_loc) / y_scale.

    x_loc, x_scale: `(*features,)`, in x's units.
    y_loc, y_scale: `(*event,)`, in y's units; 0 and 1 of what is no response, as of the weights of `Weighted`; int64 0 and 1
        where integer y is left alone.
    features: mean and sd over the tasks of each feature, by name.
    likelihood: what y was taken for; None: floating y for numbers, integers for classes or counts.
    A log density of scaled y is brought to y's units by subtracting `y_scale.log()`, summed over the event.
    """

    x_loc: Tensor
    x_scale: Tensor
    y_loc: Tensor
    y_scale: Tensor
    features: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    likelihood: Likelihood | None = None

    @classmethod
    def of(cls, tasks: TaskSet, likelihood: Likelihood | None = None) -> Scaling:
        """Pooled mean and sd of the support rows; the sd of a constant column is taken as 1.  See `TaskSet.standardized`."""
        if not (likelihood is None or isinstance(likelihood, Likelihood)):
            raise TypeError(
                f"likelihood must be one of varmeta.likelihoods, such as Gaussian() or model.likelihood, "
                f"not {kind_of(likelihood)}"
            )
        supports = [task.support for task in tasks if task.support is not None]
        if not supports:
            raise ValueError("no task has support data, so there is nothing to take a mean of: standardize with others")
        x, y = (torch.cat([support[i] for support in supports]) for i in (0, 1))
        y_moments = _moments_of_y(y, likelihood, x.dtype)
        known = {name: value.double() for name, value in tasks.batch().support.features.items()}
        features = {
            name: (float(loc), float(scale))
            for name, (loc, scale) in zip(known, map(_moments, known.values()), strict=True)
        }
        return cls(*_moments(x), *y_moments, features, likelihood)

    def apply(self, tasks: TaskSet) -> TaskSet:
        """The tasks, support and query, scaled by these numbers.  Raises ValueError where the shapes differ."""

        def scaled(part: Part | None, name: str | None) -> Part | None:
            if part is None:
                return None
            x, y = part
            for what, tensor, loc in (("x", x, self.x_loc), ("y", y, self.y_loc)):
                if tensor.shape[1:] != loc.shape:
                    raise ValueError(
                        f"task {name!r}: a row of {what} has shape {tuple(tensor.shape[1:])}, but this scaling was "
                        f"made from rows of shape {tuple(loc.shape)}: give tasks with the same columns"
                    )
            y = (y.to(x) - self.y_loc.to(x)) / self.y_scale.to(x) if self._scales_y else y
            return (x - self.x_loc.to(x)) / self.x_scale.to(x), y

        if set(tasks.feature_names) != set(self.features):
            raise ValueError(
                f"these tasks have the features {sorted(tasks.feature_names)}, but this scaling was made from tasks with "
                f"{sorted(self.features)}: give the same"
            )

        def standard(features: Mapping[str, float] | None) -> dict[str, float]:
            return {
                name: (value - self.features[name][0]) / self.features[name][1]
                for name, value in (features or {}).items()
            }

        scaled_tasks = [
            replace(t, support=scaled(t.support, t.name), query=scaled(t.query, t.name), features=standard(t.features))
            for t in tasks
        ]
        new = TaskSet(scaled_tasks, dtype=tasks.dtype, x_names=tasks.x_names)
        new.left_raw = not self._scales_y and self.likelihood is None
        return new

    def y_inverse(self, values: Tensor) -> Tensor:
        """Scaled responses, or predictions of them, `(..., *event)`, in y's units; without weights, which are no responses."""
        loc, scale = self.response
        return values * scale.to(values) + loc.to(values) if self._scales_y else values

    @property
    def response(self) -> tuple[Tensor, Tensor]:
        """y_loc and y_scale of the response alone, as predictions have it."""
        if self.likelihood is None:
            return self.y_loc, self.y_scale
        return self.likelihood.observed(self.y_loc), self.likelihood.observed(self.y_scale)

    def raw_prior(self, fit: Fit) -> LearnedPrior:
        """The prior that `fit` learned from the scaled tasks, in the data's own units: theta0, covariance, noise scale.

        fit: of a linear model, `nn.Linear` with one output or `LinearPredictor`.

        Raises TypeError for another model; ValueError where the raw-unit model is none of the same kind, as with centred data
        and no intercept.

        >>> import varmeta as vm
        >>> tasks, scaling = vm.datasets.radon().standardized()
        >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), vm.GaussianPrior(learn_precision="full"))
        >>> scaling.raw_prior(vm.fit(model, tasks, vm.Joint("multivariate_normal")))  # radon in log(pCi/L), floor 0 or 1
        LearnedPrior(floor -0.6561 (sd 0.314), intercept 1.494 (sd 0.333), noise scale 0.717)
        """
        from varmeta.raw_units import raw_prior

        return raw_prior(self, fit)

    def __repr__(self) -> str:
        def numbers(loc: Tensor, scale: Tensor) -> str:
            texts = [np.array2string(v.cpu().numpy(), precision=4, separator=", ", threshold=6) for v in (loc, scale)]
            return f"loc {texts[0]}, scale {texts[1]}"

        y = numbers(self.y_loc, self.y_scale) if self._scales_y else "left alone"
        known = "".join(f"; {name}: loc {loc:.4g}, scale {scale:.4g}" for name, (loc, scale) in self.features.items())
        return f"Scaling(x: {numbers(self.x_loc, self.x_scale)}; y: {y}{known})"

    @property
    def _scales_y(self) -> bool:
        return self.y_loc.is_floating_point()


def left_raw(model: TaskModel, tasks: TaskSet) -> str | None:
    """A warning where `standardized()` took whole numbers in y for classes or counts, and the model takes them for numbers."""
    likelihood = model.likelihood
    supports = [task.support[1] for task in tasks if task.support is not None]
    if not tasks.left_raw or likelihood is None or not likelihood.real_valued or not supports:
        return None
    y = likelihood.observed(torch.cat(supports)).double()
    return (
        f"x is standardised but y, of whole numbers, is not (mean {float(y.mean()):.4g}, sd {float(y.std(correction=0)):.4g}), "
        f"since standardized() takes them for classes or counts; {type(likelihood).__name__} takes them for numbers.  Write "
        "tasks.standardized(model.likelihood), or give y as float"
    )


def _moments_of_y(y: Tensor, likelihood: Likelihood | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of y `(rows, *event)`, in `dtype` where it is scaled: 0 and 1 of what the likelihood does not take for a real number."""
    none = torch.zeros_like(y[0]), torch.ones_like(y[0])
    if likelihood is None:
        return _moments(y) if y.is_floating_point() else none
    if not likelihood.real_valued:
        return none
    # which entries of a row are responses, by their positions: a weight is none
    positions = torch.arange(y[0].numel(), device=y.device).reshape(1, *y.shape[1:])
    response = torch.isin(positions[0], likelihood.observed(positions))
    loc, scale = _moments(y.to(dtype))
    return torch.where(response, loc, torch.zeros_like(loc)), torch.where(response, scale, torch.ones_like(scale))


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    # in float64: the squares of large float32 overflow, and an infinite sd makes everything 0
    wide = rows.double()
    loc, scale = wide.mean(0).to(rows), wide.std(0, correction=0).to(rows)
    # compared directly: rounding in the mean leaves a constant column with a tiny sd instead of 0
    constant = (rows == rows[:1]).all(0)
    return loc, torch.where(constant, torch.ones_like(scale), scale)
