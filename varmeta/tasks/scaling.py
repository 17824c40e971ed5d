"""Shift and scale of the data, remembered for new tasks and for predictions in y's units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import kind_of
from varmeta.tasks.arrays import Part

Prior = TypeVar("Prior", covariant=True)


@runtime_checkable
class Reads(Protocol):
    """What a scaling asks of a likelihood.

    Whether y is a real number, and which part of y is the response.
    """

    @property
    def real_valued(self) -> bool: ...

    @property
    def predictive(self) -> Reads: ...

    def observed(self, y: Tensor) -> Tensor: ...


class Scalable(Protocol):
    """What a scaling asks of the tasks that it is applied to."""

    @property
    def feature_names(self) -> tuple[str, ...]: ...

    def mapped(
        self,
        rows: Callable[[Part, str | None], Part],
        features: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        scaling: Scaling,
    ) -> Self: ...


class Learned(Protocol[Prior]):
    """What a scaling asks of a fit."""

    def raw_prior(self, scaling: Scaling) -> Prior: ...


Tasks = TypeVar("Tasks", bound=Scalable)


@dataclass(frozen=True, eq=False, repr=False)
class Scaling:
    """x -> (x - x_loc) / x_scale and y -> (y - y_loc) / y_scale.

    x_loc, x_scale: `(*features,)`, in x's units.
    y_loc, y_scale: `(*event,)`, in y's units; 0 and 1 of what is no response, as of the weights of
        `Weighted`; int64 0 and 1 where integer y is left alone.
    features: mean and sd over the tasks of each feature, by name.
    likelihood: what y was taken for; None: floating y for numbers, integers for classes or counts.
    A log density of scaled y is brought to y's units by subtracting `y_scale.log()`, summed over
    the event.
    """

    x_loc: Tensor
    x_scale: Tensor
    y_loc: Tensor
    y_scale: Tensor
    features: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    likelihood: Reads | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        features: Mapping[str, Tensor] | None = None,
        likelihood: Reads | None = None,
    ) -> Scaling:
        """Mean and sd of the rows x and y, and of each feature over tasks.

        The sd of a constant column is taken as 1.

        See `TaskSet.standardized`.  Raises TypeError where the likelihood is none.
        """
        if likelihood is not None and (
            isinstance(likelihood, type) or not isinstance(likelihood, Reads)
        ):
            raise TypeError(
                "likelihood must be one of varmeta.likelihoods, such as Gaussian() or "
                f"model.likelihood, not {kind_of(likelihood)}"
            )
        y_moments = _moments_of_y(y, likelihood, x.dtype)
        known = {name: _moments(value.double()) for name, value in (features or {}).items()}
        moments = {name: (float(loc), float(scale)) for name, (loc, scale) in known.items()}
        return cls(*_moments(x), *y_moments, moments, likelihood)

    def apply(self, tasks: Tasks) -> Tasks:
        """The tasks, support and query, scaled by these numbers.

        Raises ValueError where the shapes differ.
        """

        def scaled(part: Part, name: str | None) -> Part:
            x, y = part
            for what, tensor, loc in (("x", x, self.x_loc), ("y", y, self.y_loc)):
                if tensor.shape[1:] != loc.shape:
                    raise ValueError(
                        f"task {name!r}: a row of {what} has shape {tuple(tensor.shape[1:])}, but "
                        f"this scaling was made from rows of shape {tuple(loc.shape)}: give tasks "
                        "with the same columns"
                    )
            y = (y.to(x) - self.y_loc.to(x)) / self.y_scale.to(x) if self._scales_y else y
            return (x - self.x_loc.to(x)) / self.x_scale.to(x), y

        if set(tasks.feature_names) != set(self.features):
            raise ValueError(
                f"these tasks have the features {sorted(tasks.feature_names)}, but this scaling "
                f"was made from tasks with {sorted(self.features)}: give the same"
            )

        def standard(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: (value - self.features[name][0]) / self.features[name][1]
                for name, value in features.items()
            }

        return tasks.mapped(scaled, standard, self)

    def after(self, first: Scaling) -> Scaling:
        """What scaling by `first` and then by this one does to the raw data."""

        def both(name: str) -> tuple[Tensor, Tensor]:
            loc, scale = (getattr(self, f"{name}_{what}") for what in ("loc", "scale"))
            # the dtypes stay: whole numbers say that y was left alone
            at, by = (getattr(first, f"{name}_{what}").to(loc.device) for what in ("loc", "scale"))
            return at + by * loc, by * scale

        features = {
            name: (at + by * self.features[name][0], by * self.features[name][1])
            for name, (at, by) in first.features.items()
        }
        told = first.likelihood if self.likelihood is None else self.likelihood
        return Scaling(*both("x"), *both("y"), features, told)

    def is_same(self, other: Scaling) -> bool:
        """Whether both lead to the same units, to a thousandth of them."""
        mine, its = self._numbers(), other._numbers()
        return mine.shape == its.shape and bool(((mine - its).abs() <= 1e-3 * mine[1]).all())

    def _numbers(self) -> Tensor:
        """All locs and all scales, `(2, columns)`."""
        rows = [
            torch.cat([x.flatten().double().cpu(), y.flatten().double().cpu()])
            for x, y in ((self.x_loc, self.y_loc), (self.x_scale, self.y_scale))
        ]
        known = torch.tensor([self.features[name] for name in sorted(self.features)])
        return torch.cat([torch.stack(rows), known.reshape(-1, 2).double().T], 1)

    def x(self, values: Any) -> Tensor:
        """Raw x, in x's units, scaled: where a posterior is to predict.

        values: `(..., *features)`; of a single column any shape, which stays.

        Raises ValueError where the rows have another shape than those the scaling was made from.

        >>> x, y = [[1970.0], [1990.0]], [60.0, 70.0]
        >>> scaling = Scaling.of(torch.tensor(x), torch.tensor(y))
        >>> scaling.x([[1990.0], [2000.0]]).tolist()
        [[1.0], [2.0]]
        >>> mean, sd = torch.tensor(0.5), torch.tensor(0.1)
        >>> scaling.y_inverse(mean).item(), (scaling.y_scale * sd).item()
        (67.5, 0.5)
        """
        loc, scale = self.x_loc, self.x_scale
        rows = torch.as_tensor(values, dtype=loc.dtype, device=loc.device)
        if loc.numel() == 1:
            return (rows - loc.reshape(())) / scale.reshape(())
        if rows.shape[-loc.dim() :] != loc.shape:
            raise ValueError(
                f"x has shape {tuple(rows.shape)}, but this scaling was made from rows of shape "
                f"{tuple(loc.shape)}: give one such row per point"
            )
        return (rows - loc) / scale

    def y_inverse(self, values: Tensor) -> Tensor:
        """Scaled responses, or predictions of them, `(..., *event)`, in y's units.

        Without weights, which are no responses.  Means, quantiles and draws are brought back so;
        an sd is not shifted, so it is `y_scale * sd`.
        """
        loc, scale = self.response
        return values * scale.to(values) + loc.to(values) if self._scales_y else values

    @property
    def response(self) -> tuple[Tensor, Tensor]:
        """y_loc and y_scale of the response alone, as predictions have it."""
        if self.likelihood is None:
            return self.y_loc, self.y_scale
        predicted = self.likelihood.predictive
        return predicted.observed(self.y_loc), predicted.observed(self.y_scale)

    def raw_prior(self, fit: Learned[Prior]) -> Prior:
        """The prior that `fit` learned from the scaled tasks, in the data's own units.

        theta0, covariance, noise scale.

        fit: of a linear model, `nn.Linear` with one output or `LinearPredictor`.

        Raises TypeError for another model; ValueError where the raw-unit model is none of the same
        kind, as with centred data and no intercept.

        >>> import varmeta as vm
        >>> tasks, scaling = vm.datasets.radon().standardized()
        >>> prior = vm.GaussianPrior(learn_precision="full")
        >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior)
        >>> fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
        >>> scaling.raw_prior(fit)  # radon in log(pCi/L), floor 0 or 1
        LearnedPrior(floor -0.6561 (sd 0.314), intercept 1.494 (sd 0.333), noise scale 0.717)
        """
        return fit.raw_prior(self)

    def __repr__(self) -> str:
        def numbers(loc: Tensor, scale: Tensor) -> str:
            texts = [
                np.array2string(v.cpu().numpy(), precision=4, separator=", ", threshold=6)
                for v in (loc, scale)
            ]
            return f"loc {texts[0]}, scale {texts[1]}"

        y = numbers(self.y_loc, self.y_scale) if self._scales_y else "left alone"
        known = "".join(
            f"; {name}: loc {loc:.4g}, scale {scale:.4g}"
            for name, (loc, scale) in self.features.items()
        )
        return f"Scaling(x: {numbers(self.x_loc, self.x_scale)}; y: {y}{known})"

    @property
    def left_raw(self) -> bool:
        """Whether whole numbers in y were left as they were for want of a likelihood."""
        return not self._scales_y and self.likelihood is None

    @property
    def _scales_y(self) -> bool:
        return self.y_loc.is_floating_point()


def common_scaling(scalings: Iterable[Scaling | None]) -> Scaling | None:
    """The one that all were made by; None where they are of several."""
    first, *others = dict.fromkeys(scalings) or [None]
    if first is None or any(other is None or not first.is_same(other) for other in others):
        return None
    return first


def _moments_of_y(y: Tensor, likelihood: Reads | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of y `(rows, *event)`, in `dtype` where it is scaled: 0 and 1 of what the likelihood does not
    take for a real number.
    """
    none = torch.zeros_like(y[0]), torch.ones_like(y[0])
    if likelihood is None:
        return _moments(y) if y.is_floating_point() else none
    if not likelihood.real_valued:
        return none
    # which entries of a row are responses, by their positions: a weight is none
    positions = torch.arange(y[0].numel(), device=y.device).reshape(1, *y.shape[1:])
    response = torch.isin(positions[0], likelihood.observed(positions))
    loc, scale = _moments(y.to(dtype))
    return torch.where(response, loc, torch.zeros_like(loc)), torch.where(
        response, scale, torch.ones_like(scale)
    )


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    # in float64: the squares of large float32 overflow, and an infinite sd makes everything 0
    wide = rows.double()
    loc, scale = wide.mean(0).to(rows), wide.std(0, correction=0).to(rows)
    # compared directly: rounding in the mean leaves a constant column with a tiny sd instead of 0
    constant = (rows == rows[:1]).all(0)
    return loc, torch.where(constant, torch.ones_like(scale), scale)
