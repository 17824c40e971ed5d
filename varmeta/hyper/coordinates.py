"""Coordinates of eta in which its posterior is nearly Gaussian.

They are theta0 as it is, log sds, and transformed correlations.

    theta0, shared parameters         themselves
    log_precision                     log of each weight's own sd
    prior_tril, entries of U          asinh(U); of two weights, atanh of their correlation
    log_scale, other scales           themselves

Where the support of a hyperprior has an edge, `bounds` put it at infinity.

A posterior density of these coordinates needs the Jacobian of the hyperpriors' own units, which
`log_density` has in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.hyper.bounds import bounds
from varmeta.models.model import TaskModel
from varmeta.priors.factors import PRECISION, TRIL
from varmeta.priors.hyperprior import log_correlation_jacobian


class Coordinates:
    """The map between eta and its coordinates.

    The coordinates are one tensor of the same name and shape for each of eta's.

    Where no hyperprior is given the density is flat in theta0 and the shared parameters, in each
    sd, in the noise scale, and over correlation matrices.
    """

    def __init__(self, model: TaskModel, eta: Mapping[str, Tensor], bounded: bool = False) -> None:
        """bounded: whether edges of the hyperpriors' supports are put at infinity."""
        self.model = model
        self.shapes = {name: value.shape for name, value in eta.items()}
        like = next(iter(eta.values()))
        self.scales = (
            set()
            if model.likelihood is None
            else {n for n in model.likelihood.init(like) if n[:4] == "log_"}
        )
        self.bounds = bounds(model, self.shapes) if bounded else {}

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def is_location(self) -> Tensor:
        """Which numbers belong to theta0 or a shared parameter, `(size,)`."""
        named = self.model.start
        return torch.cat(
            [torch.full((shape.numel(),), name in named) for name, shape in self.shapes.items()]
        )

    def of(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coordinates of eta."""
        found = {name: self._of(name, eta) for name in self.shapes}
        return found | {name: one.coordinate(found[name]) for name, one in self.bounds.items()}

    def _of(self, name: str, eta: Mapping[str, Tensor]) -> Tensor:
        if name.partition(".")[0] == PRECISION:
            wider = self._row_norms(eta).log() if TRIL in eta else 0.0
            return -0.5 * eta[name] + wider
        return torch.asinh(eta[name]) if name == TRIL else eta[name]

    def _row_norms(self, eta: Mapping[str, Tensor]) -> Tensor:
        return self.model.prior.row_norms(self.model.weights, eta)

    def eta(self, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """eta at these coordinates."""
        coordinates = self._inside(coordinates)
        tril = {name: torch.sinh(value) for name, value in coordinates.items() if name == TRIL}
        found = {}
        for name, value in coordinates.items():
            if name.partition(".")[0] == PRECISION:
                narrower = self._row_norms({PRECISION: value, **tril}).log() if tril else 0.0
                found[name] = -2.0 * (value - narrower)
            else:
                found[name] = tril.get(name, value)
        return found

    def _inside(self, coordinates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The coordinates in the units that are listed above, whatever their edges."""
        moved = {name: one.value(coordinates[name]) for name, one in self.bounds.items()}
        return dict(coordinates) | moved

    def log_density(self, coordinates: Mapping[str, Tensor], jacobian: bool = True) -> Tensor:
        """log of the hyperpriors' density, up to a constant.

        jacobian: of the coordinates; else of the sds, precisions and scales themselves, for
            estimates of their mode.
        """
        eta, prior, weights = self.eta(coordinates), self.model.prior, self.model.weights
        total = next(iter(coordinates.values())).new_zeros(()) - self.model.penalty(eta)
        if not jacobian:
            return total
        for name, one in self.bounds.items():
            total = total + one.log_slope(coordinates[name])
        coordinates = self._inside(coordinates)
        # d precision / d log sd = -2 precision, d sd / d log sd = sd
        power = -2.0 if prior.hyperprior is not None else 1.0
        for name, value in coordinates.items():
            if name.partition(".")[0] == PRECISION:
                total = total + power * value.sum()
            elif name == TRIL:
                total = (
                    total
                    + log_correlation_jacobian(
                        self._row_norms(eta), prior.block_sizes(weights).to(value)
                    )
                    + value.cosh().log().sum()
                )
            elif name in self.scales:
                total = total + value.sum()
        return total

    # -- one vector --------------------------------------------------------------------------------

    def vector(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([coordinates[name].reshape(-1) for name in self.shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of `vector`."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def eta_of(self, vectors: Tensor) -> dict[str, Tensor]:
        """eta at rows of coordinates `(K, size)`: tensors with a leading axis K."""
        return torch.func.vmap(lambda vector: self.eta(self.named(vector)))(vectors)

    def log_density_of(self, vectors: Tensor, jacobian: bool = True) -> Tensor:
        """`log_density` of rows `(K, size)`, `(K,)`."""
        return torch.func.vmap(lambda vector: self.log_density(self.named(vector), jacobian))(
            vectors
        )
