"""The prior as it was learned: numbers by parameter name, and a table that a person can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varmeta.display.shown import Shown
from varmeta.likelihoods.base import NOISE_SCALE
from varmeta.models.by_tensor import are_many, between, of_tensor
from varmeta.models.labels import parameter_labels
from varmeta.models.model import TaskModel
from varmeta.models.prior_frame import by_tensor, frame_of
from varmeta.priors.factor_normal import FactorNormal

if TYPE_CHECKING:
    import pandas as pd

# Numbers that a table, and a repr, show; networks have more.
ROWS, FEW = 20, 4
MAX_CORRELATIONS = 10


@dataclass(frozen=True, repr=False)
class LearnedPrior(Shown):
    """N(theta0, Lambda^-1) as learned.

    loc, precision, sd: by parameter name, in the parameter's shape; precision is 1 / variance of
        each weight on its own, so for a dense covariance not the diagonal of its inverse.
    labels: one readable name per weight, in the order of `covariance`.
    dense_covariance: `(D, D)`, None where the weights are independent, of which a network has too
        many for it, and where the covariance is of low rank.
    factor: F `(D, rank)` of a low-rank covariance diag(s)^2 + F F', by the weights' units; None of
        others.
    shared: parameters that are the same for all tasks, by name; shared_labels: the readable names
        of their entries.
    coefficients: by how much a task's features move loc, for each weight and feature of the prior's
        covariates, by name (`intercept:log_uppm`), in the parameter's shape; units: the weight's
        per unit of the feature.  loc is then that of a task whose features are 0.
        coefficient_labels: the readable names of their entries.
    observation: what the likelihood learned (a noise scale, a concentration, cutpoints), by a
        readable name.
    is_learned: whether the covariance was learned, or given by the user; held: the parameters whose
        theta0 was given.
    """

    loc: dict[str, Tensor]
    precision: dict[str, Tensor]
    sd: dict[str, Tensor]
    dense_covariance: Tensor | None
    labels: tuple[str, ...]
    shared: dict[str, Tensor]
    shared_labels: dict[str, tuple[str, ...]]
    is_learned: bool
    observation: dict[str, Tensor] = field(default_factory=dict)
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    coefficient_labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    factor: Tensor | None = None

    @classmethod
    def of(
        cls, model: TaskModel, eta: Mapping[str, Tensor], x_names: tuple[str, ...] | None = None
    ) -> LearnedPrior:
        weights, named = model.weights, parameter_labels(model, x_names)
        with torch.no_grad():
            distribution = model.prior_distribution(eta)
            spread = distribution.stddev
            dense = model.prior.dense
            return cls(
                loc=weights.unflatten(distribution.mean),
                precision=weights.unflatten(spread**-2),
                sd=weights.unflatten(spread),
                dense_covariance=distribution.covariance_matrix if dense else None,
                labels=tuple(label for name in weights.names for label in named[name]),
                shared={name: eta[name] for name in model.shared},
                shared_labels={name: named[name] for name in model.shared},
                is_learned=model.prior.learn_precision is not None,
                observation={} if model.likelihood is None else model.likelihood.learned(eta),
                coefficients={name: eta[name] for name in model.coefficients},
                coefficient_labels={name: named[name] for name in model.coefficients},
                held=tuple(weights.fixed),
                factor=distribution.root.columns
                if isinstance(distribution, FactorNormal)
                else None,
            )

    @property
    def scale(self) -> Tensor | None:
        """The noise scale, where it is learned."""
        return self.observation.get(NOISE_SCALE)

    @property
    def covariance(self) -> Tensor:
        """`(D, D)` in the order of `labels`."""
        if self.dense_covariance is not None:
            return self.dense_covariance
        if self.factor is None:
            return torch.diag(self._sd.square())
        shared = self.factor @ self.factor.mT
        return shared - torch.diag(shared.diagonal()) + torch.diag(self._sd.square())

    @property
    def correlation(self) -> Tensor:
        sd = self.covariance.diagonal().sqrt()
        return self.covariance / torch.outer(sd, sd)

    @property
    def _sd(self) -> Tensor:
        return torch.cat([value.reshape(-1) for value in self.sd.values()])

    @property
    def _rows(self) -> list[tuple[str, float, float]]:
        """Label, theta0 and sd of every weight."""
        loc = torch.cat([value.reshape(-1) for value in self.loc.values()])
        return list(zip(self.labels, loc.tolist(), self._sd.tolist(), strict=True))

    @property
    def _shared_rows(self) -> list[tuple[str, float]]:
        return _entries(self.shared, self.shared_labels)

    @property
    def _coefficient_rows(self) -> list[tuple[str, float]]:
        return _entries(self.coefficients, self.coefficient_labels)

    def frame(self, errors: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
        """One row for every number of the prior, by its label.

        Columns: kind, "weight", "shared", "covariate" or "observation"; value, theta0 of a weight
        and the number itself of the others, in y's unit per unit of its column; sd, the prior's
        standard deviation between tasks, NaN of what does not vary between them.

        errors: standard errors by parameter name, as `Fit.standard_errors`, for a column std_error.

        >>> import torch, varmeta as vm
        >>> model = vm.TaskModel(vm.LinearPredictor(["dose"]), vm.likelihoods.Gaussian())
        >>> fit = vm.fit(model, vm.datasets.lines(9, dtype=torch.float64))
        >>> fit.prior.frame()["kind"].to_dict()
        {'intercept': 'weight', 'dose': 'weight', 'noise scale': 'observation'}
        """
        rows = {
            "weight": self._rows,
            "shared": [(*row, math.nan) for row in self._shared_rows],
            "covariate": [(*row, math.nan) for row in self._coefficient_rows],
            "observation": [
                (name, float(value), math.nan) for name, value in self.observation.items()
            ],
        }
        return frame_of(rows, None if errors is None else self._errors(errors))

    def _table(self, errors: Mapping[str, Tensor] | None = None) -> pd.DataFrame:
        others = {
            "shared": self.shared,
            "covariate": self.coefficients,
            "observation": self.observation,
        }
        if any(are_many(named, ROWS) for named in (self.loc, self.shared)):
            return by_tensor(self.loc, self.sd, others)
        return self.frame(errors)

    def __str__(self) -> str:
        return self.table()

    def table(self, errors: Mapping[str, Tensor] | None = None) -> str:
        """The prior as text; errors: standard errors by parameter name, a column beside theta0."""
        most = self._most
        labels = [NOISE_SCALE, *self.observation]
        labels += [label for label, _ in self._coefficient_rows[:most]]
        for named, rows in ((self.loc, self._rows), (self.shared, self._shared_rows)):
            if are_many(named, most):
                labels += [of_tensor(name, value)[0] for name, value in [*named.items()][:most]]
            else:
                labels += [label for label, *_ in rows[:most]]
        width = max(map(len, labels))
        columns = _Columns(width, most, None if errors is None else self._errors(errors))
        return "\n".join(
            (
                columns.line("weight", "theta0", "std. error", f"{'prior sd':>12}"),
                *self._weight_lines(columns),
                *self._shared_lines(columns),
                *_entry_lines(columns, self._coefficient_rows, "covariate", "coefficients"),
                *(
                    columns.line(name, "", "", f"{float(value):>12.5g}")
                    for name, value in self.observation.items()
                ),
                *self._correlation_lines(width),
                *self._direction_lines(),
            )
        )

    @property
    def _most(self) -> int:
        """How many rows each of weights, shared numbers and coefficients gets."""
        sizes = [
            len(some) for some in (self._rows, self._shared_rows, self._coefficient_rows) if some
        ]
        return ROWS if sum(sizes) <= ROWS else ROWS // len(sizes)

    def _errors(self, errors: Mapping[str, Tensor]) -> dict[str, float]:
        """Standard errors by label, NaN where theta0 is held."""
        own = {name: torch.full_like(value, torch.nan) for name, value in self.loc.items()}
        own |= errors
        numbers = [float(e) for name in self.loc for e in own[name].reshape(-1)]
        numbers += [
            float(e)
            for name in (*self.shared, *self.coefficients)
            for e in errors[name].reshape(-1)
        ]
        others = (*self._shared_rows, *self._coefficient_rows)
        return dict(zip([*self.labels, *(label for label, _ in others)], numbers, strict=True))

    def _weight_lines(self, columns: _Columns) -> list[str]:
        # a number that was given must not be read as a finding
        fixed = "" if self.is_learned else " (fixed)"
        if are_many(self.loc, columns.most):
            lines = []
            for name, value in [*self.loc.items()][: columns.most]:
                label, size = of_tensor(name, value)
                held = " (theta0 fixed)" if name in self.held else ""
                last = f"{between(self.sd[name]):>12}{fixed}{held}"
                lines.append(columns.line(label, size, "", last))
            return lines + columns.left_out(len(self.loc), "tensors")
        given = [
            name in self.held for name, value in self.loc.items() for _ in range(value.numel())
        ]
        rows = self._rows
        lines = [
            columns.row(label, mean, f"{spread:>12.5g}{fixed}{' (theta0 fixed)' if held else ''}")
            for (label, mean, spread), held in zip(rows[: columns.most], given, strict=False)
        ]
        return lines + columns.left_out(len(rows), "weights")

    def _shared_lines(self, columns: _Columns) -> list[str]:
        if not are_many(self.shared, columns.most):
            return _entry_lines(columns, self._shared_rows, "shared", "shared numbers")
        found = [of_tensor(name, value) for name, value in [*self.shared.items()][: columns.most]]
        lines = [columns.line(label, size, "", f"{'shared':>12}") for label, size in found]
        return lines + columns.left_out(len(self.shared), "shared tensors")

    def _correlation_lines(self, width: int) -> list[str]:
        if len(self.labels) > MAX_CORRELATIONS:
            return []
        dense = self.covariance
        if not bool((dense - torch.diag(dense.diagonal())).any()):
            return []
        return ["correlations of the prior"] + [
            f"{label:<{width}} " + " ".join(f"{value:>6.3f}" for value in row)
            for label, row in zip(self.labels, self.correlation.tolist(), strict=True)
        ]

    def _direction_lines(self) -> list[str]:
        """What a low-rank prior's directions have of all variance, the largest first."""
        if self.factor is None:
            return []
        # in units of each weight's sd, so that no weight counts for more than another
        lengths = torch.linalg.svdvals(self.factor / self._sd.unsqueeze(-1))
        share = lengths.square() / len(self.factor)
        parts = ", ".join(f"{100.0 * one:.1f}" for one in share.tolist())
        several = f"{len(share)} directions" if len(share) > 1 else "one direction"
        return [f"shared by all weights: {several}, with {parts} % of their variance"]

    def __repr__(self) -> str:
        parts = [
            f"{label} {mean:.4g} (sd {spread:.3g})" for label, mean, spread in self._rows[:FEW]
        ]
        parts += [f"{label} {number:.4g} (shared)" for label, number in self._shared_rows[:FEW]]
        parts += [
            f"{label} {number:.4g} (covariate)" for label, number in self._coefficient_rows[:FEW]
        ]
        every = (self._rows, self._shared_rows, self._coefficient_rows)
        left = sum(max(0, len(some) - FEW) for some in every)
        parts += [f"{left} more"] if left else []
        parts += [f"{name} {float(value):.4g}" for name, value in self.observation.items()]
        return f"LearnedPrior({', '.join(parts)})"


def _entries(
    named: Mapping[str, Tensor], labels: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, float]]:
    return [
        (label, number)
        for name, value in named.items()
        for label, number in zip(labels[name], value.reshape(-1).tolist(), strict=True)
    ]


@dataclass(frozen=True)
class _Columns:
    """The columns of the table: a label, a number, its standard error where there are any, and what
    is said of it.

    most: rows that each part of the table gets.
    """

    width: int
    most: int
    errors: Mapping[str, float] | None

    def row(self, label: str, number: float, last: str) -> str:
        error = math.nan if self.errors is None else self.errors[label]
        return self.line(label, f"{number:.5g}", "" if math.isnan(error) else f"{error:.5g}", last)

    def line(self, label: str, number: str, error: str, last: str) -> str:
        beside = "" if self.errors is None else f" {error:>12}"
        return f"{label:<{self.width}} {number:>12}{beside} {last}"

    def left_out(self, number: int, several: str) -> list[str]:
        """What is said of rows beyond those that the part gets."""
        return [f"... and {number - self.most} {several} more"] if number > self.most else []


def _entry_lines(
    columns: _Columns, rows: list[tuple[str, float]], kind: str, several: str
) -> list[str]:
    lines = [columns.row(label, number, f"{kind:>12}") for label, number in rows[: columns.most]]
    return lines + columns.left_out(len(rows), several)
