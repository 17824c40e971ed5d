"""The prior as it was learned: numbers by parameter name, and a table that a person can read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varmeta.likelihoods.base import NOISE_SCALE
from varmeta.models.labels import parameter_labels
from varmeta.models.model import TaskModel

# Weights that a table, and a repr, show; networks have more.
ROWS, FEW = 40, 4
MAX_CORRELATIONS = 10


@dataclass(frozen=True, repr=False)
class LearnedPrior:
    """N(theta0, Lambda^-1) as learned.

    loc, precision, sd: by parameter name, in the parameter's shape; precision is 1 / variance of
        each weight on its own, so for a dense covariance not the diagonal of its inverse.
    labels: one readable name per weight, in the order of `covariance`.
    dense_covariance: `(D, D)`, None where the weights are independent, of which a network has too
        many for it.
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
            )

    @property
    def scale(self) -> Tensor | None:
        """The noise scale, where it is learned."""
        return self.observation.get(NOISE_SCALE)

    @property
    def covariance(self) -> Tensor:
        """`(D, D)` in the order of `labels`."""
        return (
            torch.diag(self._sd.square())
            if self.dense_covariance is None
            else self.dense_covariance
        )

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

    def __str__(self) -> str:
        return self.table()

    def table(self, errors: Mapping[str, Tensor] | None = None) -> str:
        """The prior as text; errors: standard errors by parameter name, a column beside theta0."""
        rows, shared, moved = self._rows, self._shared_rows, self._coefficient_rows
        beside = {}
        if errors is not None:
            known = {
                name: torch.full_like(value, torch.nan) for name, value in self.loc.items()
            } | dict(errors)
            own = [float(e) for name in self.loc for e in known[name].reshape(-1)]
            common = [
                float(e)
                for name in (*self.shared, *self.coefficients)
                for e in errors[name].reshape(-1)
            ]
            beside = dict(
                zip([label for label, *_ in (*rows, *shared, *moved)], own + common, strict=True)
            )

        def error(label: str) -> str:
            number = beside.get(label, math.nan)
            return "" if not beside else f" {'':>12}" if math.isnan(number) else f" {number:>12.5g}"

        shown, shown_shared = rows[:ROWS], shared[:ROWS]
        labels = [label for label, _, _ in shown] + [
            label for label, _ in (*shown_shared, *moved[:ROWS])
        ]
        width = max(map(len, [NOISE_SCALE, *self.observation, *labels]))
        gap = f" {'':>12}" if beside else ""
        lines = [
            f"{'weight':<{width}} {'theta0':>12}{' std. error'.rjust(13) if beside else ''} "
            f"{'prior sd':>12}"
        ]
        # a number that was given must not be read as a finding
        fixed = "" if self.is_learned else " (fixed)"
        given = [
            name in self.held for name, value in self.loc.items() for _ in range(value.numel())
        ]
        lines += [
            f"{label:<{width}} {mean:>12.5g}{error(label)} "
            f"{spread:>12.5g}{fixed}{' (theta0 fixed)' if held else ''}"
            for (label, mean, spread), held in zip(shown, given, strict=False)
        ]
        lines += [f"... and {len(rows) - ROWS} weights more"] if len(rows) > ROWS else []
        lines += [
            f"{label:<{width}} {number:>12.5g}{error(label)} {'shared':>12}"
            for label, number in shown_shared
        ]
        lines += [f"... and {len(shared) - ROWS} shared numbers more"] if len(shared) > ROWS else []
        lines += [
            f"{label:<{width}} {number:>12.5g}{error(label)} {'covariate':>12}"
            for label, number in moved[:ROWS]
        ]
        lines += [f"... and {len(moved) - ROWS} coefficients more"] if len(moved) > ROWS else []
        lines += [
            f"{name:<{width}} {'':>12}{gap} {float(x):>12.5g}"
            for name, x in self.observation.items()
        ]
        dense = self.dense_covariance
        if (
            dense is not None
            and len(rows) <= MAX_CORRELATIONS
            and bool((dense - torch.diag(dense.diagonal())).any())
        ):
            lines.append("correlations of the prior")
            for label, row in zip(self.labels, self.correlation.tolist(), strict=True):
                lines.append(f"{label:<{width}} " + " ".join(f"{value:>6.3f}" for value in row))
        return "\n".join(lines)

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
