"""-log p(y | eta) of linear Gaussian tasks with what is linear in it profiled out.

Given the noise scale s and the prior's covariance relative to it, L L' = s^2 K K', the best theta0
and shared parameters are those of generalised least squares; what is left to search are s and the
entries of K.  As in lme4 it is K itself that moves, not its logarithm: a covariance that loses rank
is an ordinary point of an even function.
Source: Bates, Maechler, Bolker and Walker, J. Stat. Softw. 67 (2015), sections 3.3 to 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from varmeta.fitting.reduced import ReducedTasks
from varmeta.guides.kl import root_of
from varmeta.guides.kl import scale as scale_of
from varmeta.likelihoods.base import SCALE, LocationScale
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.model import TaskModel
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.tree import named_parts
from varmeta.numerics.triangular import cholesky, lower_root, whitened
from varmeta.priors.factors import PRECISION, TRIL, log_precision_and_tril
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.strategy import Eta

FACTOR = "covariance"
# How small an entry of the covariance's factor is told as, against its row and against 1: a
# covariance must have an inverse.  The objective is even in it, so that it rises by its square
# alone.
_FLOOR, _FLOOR_OF_NOISE = 1e-6, 1e-7
# Of the sds that one observation knows: tasks as a rule differ by less.
_NARROWER = (1.0, 0.5, 0.25, 0.12, 0.06)


class Sums(NamedTuple):
    """What some tasks say at one covariance relative to the noise.

    quadratic: s^2 [Z r]' V^-1 [Z r] `(P, P)`, V the covariance of y.
    log_det: half of log|V / s^2|.
    number: of observations.
    log_weight: as in `ReducedTasks`.
    """

    quadratic: Tensor
    log_det: Tensor
    number: Tensor
    log_weight: Tensor

    def without(self, some: Sums) -> Sums:
        """These tasks less some of them."""
        return Sums(*(mine - theirs for mine, theirs in zip(self, some, strict=True)))


class OneTask(NamedTuple):
    """A task's part of `ReducedTasks`."""

    triangle: Tensor
    number: Tensor
    log_weight: Tensor


class ProfiledEvidence:
    """The objective as a function of its coordinates, and the maps between them and eta.

    The coordinates, all in float64: "covariance", the lower triangle of K in whitened columns, of a
    learned dense prior; of others each learned sd over s, by the name of its log precision;
    "log_scale" where s is learned; theta0, shared parameters and
    coefficients by name, where a hyperprior acts on them.

    restricted: integrate theta0 and the other linear parameters out, under a flat density in their
        own units, instead of taking the best of them: lme4's REML criterion.  Not where a
        hyperprior acts on them.
    """

    def __init__(
        self,
        model: TaskModel,
        tasks: ReducedTasks,
        eta: Eta,
        linear: tuple[str, ...],
        restricted: bool = False,
    ) -> None:
        self.model, self.tasks, self.eta, self.linear = model, tasks, eta, linear
        self.restricted = restricted
        self.size = model.weights.size
        prior = model.prior
        self.dense = prior.learn_precision == "full"
        self.learns_scale = SCALE in eta
        self.has_hyperprior = model.has_hyperprior
        # a quadratic of their own, where no hyperprior acts on them
        self.profiles_places = prior.loc_hyperprior is None
        places = (*model.weights.names, *linear)
        self.places = tuple(name for name in places if name in eta)
        self.precisions = () if self.dense else tuple(
            name for name in eta if name.partition(".")[0] == PRECISION
        )  # fmt: skip
        self._map = self._free_places(places)
        self._identity = torch.eye(self.size).to(tasks.triangles)
        self._lower = torch.tril(torch.ones_like(self._identity))
        # where each entry of the factor stands among the coordinates
        rows, columns = torch.tril_indices(self.size, self.size)
        self._entry = torch.zeros(self.size, self.size, dtype=torch.int64)
        self._entry[rows, columns] = torch.arange(len(rows))
        # what the weights that vary cannot move
        rest = tasks.triangles[:, self.size :].flatten(0, 1)
        self.within = rest.mT @ rest
        self._count = tasks.counts.sum()

    def _free_places(self, names: tuple[str, ...]) -> Tensor:
        """(P x F + 1) from the places that are learned, and 1, to minus the whitened coordinates,
        and 1.
        """
        r, size = self.tasks.whitening, len(self.tasks.whitening)
        sizes = {name: self.model.start[name].numel() for name in names}
        free = torch.cat([torch.full((n,), name in self.eta) for name, n in sizes.items()])
        held = torch.cat(
            [
                torch.zeros(n).to(r)
                if name in self.eta
                else self.model.start[name].reshape(-1).to(r)
                for name, n in sizes.items()
            ]
        )
        if bool(free.all()):  # any basis of them will do
            return torch.eye(size + 1, dtype=r.dtype)
        top = torch.cat([-r[:, free], (self.tasks.origin - r @ held).unsqueeze(-1)], -1)
        return torch.cat([top, torch.eye(top.shape[1], dtype=r.dtype)[-1:]])

    # -- the objective -----------------------------------------------------------------------------

    def __call__(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """-log p(y | eta), nats, less the log density of the hyperpriors."""
        return self._penalised(coordinates, self.sums(coordinates))

    def _penalised(self, coordinates: Mapping[str, Tensor], sums: Sums) -> Tensor:
        loss = self.loss(coordinates, sums)
        return loss + self.penalty(coordinates) if self.has_hyperprior else loss

    def penalty(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """-log of the hyperpriors' density."""
        raw = self._raw(coordinates, self.factor(coordinates))
        return torch.as_tensor(self.model.penalty(raw)).to(self.tasks.origin)

    def loss(self, coordinates: Mapping[str, Tensor], sums: Sums) -> Tensor:
        """-log p(y | eta) of these tasks, at the places that are best for them; or integrated."""
        if not self.profiles_places:
            return -self.log_evidence(coordinates, sums, self._white(coordinates))
        root = self._root(sums.quadratic)
        loss = self._normal(coordinates, sums, root[-1, -1].square())
        return loss + self._integrated(coordinates, root) if self.restricted else loss

    def _integrated(self, coordinates: Mapping[str, Tensor], root: Tensor) -> Tensor:
        """What -log of a normal gains where the free places are integrated out."""
        diagonal = root.diagonal()[:-1]
        width = self.log_scale(coordinates) + 0.5 * math.log(2 * math.pi)
        gained = diagonal.log().sum() - len(diagonal) * width
        return gained + self.tasks.whitening.diagonal().log().sum() if self._is_white else gained

    def log_evidence(self, coordinates: Mapping[str, Tensor], sums: Sums, at: Tensor) -> Tensor:
        """log p(y | eta) of these tasks at places: minus their whitened coordinates, and 1."""
        return -self._normal(coordinates, sums, at @ sums.quadratic @ at)

    def _normal(self, coordinates: Mapping[str, Tensor], sums: Sums, squares: Tensor) -> Tensor:
        """-log of a normal density of y."""
        log_scale = self.log_scale(coordinates)
        fit = sums.number * log_scale + 0.5 * squares * torch.exp(-2.0 * log_scale)
        return 0.5 * math.log(2 * math.pi) * sums.number - sums.log_weight + fit + sums.log_det

    def sums(self, coordinates: Mapping[str, Tensor]) -> Sums:
        """What all tasks say together."""
        return self._sums(self.factor(coordinates))

    def _sums(self, factor: Tensor) -> Sums:
        white, log_det = self._whitened(factor, self.tasks.triangles)
        flat = white.flatten(0, 1)
        count, log_weight = self._count, self.tasks.log_weights.sum()
        return Sums(flat.mT @ flat + self.within, log_det.sum(), count, log_weight)

    def of_one(self, coordinates: Mapping[str, Tensor], task: OneTask) -> Sums:
        """What a task says."""
        white, log_det = self._whitened(self.factor(coordinates), task.triangle.unsqueeze(0))
        rest = task.triangle[self.size :]
        quadratic = white[0].mT @ white[0] + rest.mT @ rest
        return Sums(quadratic, log_det[0], task.number, task.log_weight)

    def white_places(self, coordinates: Mapping[str, Tensor], sums: Sums) -> Tensor:
        """Those that are best for these tasks, or those given: as `log_evidence` takes them."""
        return self.best(sums.quadratic)[0] if self.profiles_places else self._white(coordinates)

    def _whitened(self, factor: Tensor, triangles: Tensor) -> tuple[Tensor, Tensor]:
        """Each task's rows that its weights can move, in units of their spread, `(T, D, P)`, and
        half of log|V_i / s^2|; nothing is taken from what is larger, so no digit is lost.
        """
        own = triangles[:, : self.size]
        moved = own[..., : self.size] @ factor
        return whitened(moved @ moved.mT + self._identity, own)

    def log_evidence_at(self, eta: Eta) -> Tensor:
        """log p(y | eta) of all tasks at any eta, nats, float64; differentiable."""
        wide = {name: value.double() for name, value in eta.items()}
        return self.log_evidence(wide, self._sums(self._factor_at(wide)), self._white(wide))

    def reach(self, eta: Eta) -> Tensor:
        """The widest that a task's weights move its rows under the prior, in units of the noise.

        Its square is what I is added to, so that beyond 1e4 half of the digits are lost.
        """
        wide = {name: value.double() for name, value in eta.items()}
        own = self.tasks.triangles[:, : self.size, : self.size]
        return (own @ self._factor_at(wide)).abs().amax()

    def _factor_at(self, eta: Eta) -> Tensor:
        own = self.tasks.whitening[: self.size, : self.size]
        with validation_enabled(False):
            root = root_of(self.model.prior_distribution(eta)).matrix
        return own @ root * torch.exp(-self.log_scale(eta))

    def losses(self, eta: Eta) -> Tensor:
        """-log p(y_i | eta) `(T,)`, nats."""
        coordinates = self.enter(eta)
        wide = {name: value.double() for name, value in eta.items()}
        at = self._white(wide)
        white, log_det = self._whitened(self.factor(coordinates), self.tasks.triangles)
        rest = self.tasks.triangles[:, self.size :] @ at
        squares = (white @ at).square().sum(-1) + rest.square().sum(-1)
        log_scale = self.log_scale(coordinates)
        constant = math.log(2 * math.pi) + 2.0 * log_scale
        return (
            0.5 * self.tasks.counts * constant
            - self.tasks.log_weights
            + log_det
            + 0.5 * squares * torch.exp(-2.0 * log_scale)
        )

    def determines(self, some: Sums, every: Sums, least: float) -> Tensor:
        """Whether some tasks determine the places and the noise scale that are profiled.

        least: what they must know of what every task knows; and have left of a fit to them.
        """
        if not self.profiles_places:
            return torch.ones((), dtype=torch.bool)
        known, all_of_it = (self._map.mT @ sums.quadratic @ self._map for sums in (some, every))
        unit = all_of_it.diagonal(dim1=-2, dim2=-1).rsqrt()
        root = cholesky(unit.unsqueeze(-1) * known * unit.unsqueeze(-2))
        pivots = root.diagonal(dim1=-2, dim2=-1).square()
        # NaN is no more than least
        found = (pivots[..., :-1] > least).all(-1)
        return found & (pivots[..., -1] > least) if self.learns_scale else found

    @property
    def _is_white(self) -> bool:
        """Whether the free places are the whitened coordinates, none being held."""
        return len(self._map) == self._map.shape[1]

    def _root(self, quadratic: Tensor) -> Tensor:
        """Cholesky's of the quadratic in the free places and 1."""
        return cholesky(self._map.mT @ quadratic @ self._map)

    def _squares(self, coordinates: Mapping[str, Tensor], quadratic: Tensor) -> Tensor:
        """The quadratic at the places, or at the best of them."""
        if self.profiles_places:
            return self._root(quadratic)[-1, -1].square()
        at = self._white(coordinates)
        return at @ quadratic @ at

    def _white(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """Minus the whitened coordinates of the places, and 1."""
        r = self.tasks.whitening
        linear = [coordinates[name].reshape(-1).to(r) for name in self.linear]
        places = torch.cat([self.model.weights.flatten(coordinates).to(r), *linear])
        return torch.cat([self.tasks.origin - r @ places, r.new_ones(1)])

    def factor(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """K `(D, D)` in whitened columns: any root of the prior's covariance over s^2."""
        own = self.tasks.whitening[: self.size, : self.size]
        if self.dense:
            return coordinates[FACTOR][self._entry] * self._lower
        if self.precisions:
            # what it makes of log precisions, one for each weight, it makes of sds
            return own * self.model.prior.log_precision(self.model.weights, coordinates, own)
        return own @ self._given * torch.exp(-self.log_scale(coordinates))

    @property
    def _given(self) -> Tensor:
        eta = {name: value.double() for name, value in self.eta.items()}
        factor = scale_of(self.model.prior_distribution(eta))
        assert factor is not None
        return torch.diag(factor) if factor.dim() == 1 else factor

    def log_scale(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        if self.learns_scale:
            return coordinates[SCALE]
        inner = unweighted(self.model.likelihood)
        assert isinstance(inner, LocationScale)  # it is Gaussian
        return self.tasks.origin.new_tensor(math.log(inner.scale))

    # -- what is known at an eta -------------------------------------------------------------------

    def covariance_of_places(self, eta: Eta) -> Tensor:
        """Of the estimates of theta0 and the other linear parameters, given the variances.

        In the order of `places`: that of generalised least squares, or with a hyperprior on them
        the inverse of their Hessian.
        """
        coordinates = self.enter(eta)
        r = self.tasks.whitening
        if not self.profiles_places:
            at = torch.cat([coordinates[name].reshape(-1) for name in self.places])
            known = {name: coordinates[name] for name in self.places}
            hessian = vector_hessian(
                lambda flat: self({**coordinates, **named_parts(flat, known)}), at
            )
            inverse: Tensor = torch.cholesky_inverse(cholesky(hessian))
            return inverse
        inner = (self._map.mT @ self.sums(coordinates).quadratic @ self._map)[:-1, :-1]
        root = cholesky(inner) / self.log_scale(coordinates).exp()
        back = torch.linalg.inv(r).mT if self._is_white else torch.eye(len(inner)).to(r)
        half = torch.linalg.solve_triangular(root, back, upper=False)
        covariance: Tensor = half.mT @ half
        return covariance

    def correlation(self, eta: Eta) -> Tensor:
        """The prior's correlations `(D, D)` between the weights of whitened columns."""
        rows = torch.nn.functional.normalize(self.factor(self.enter(eta)), dim=-1)
        return rows @ rows.mT

    def information(self, eta: Eta) -> Tensor:
        """What the best-informed task's data say about each weight alone, as a precision `(D,)`."""
        coordinates = self.enter(eta)
        factor = self.factor(coordinates)
        moved = self.tasks.triangles[:, : self.size, : self.size] @ factor
        root = cholesky(moved.mT @ moved + torch.eye(self.size).to(factor))
        own = self.tasks.whitening[: self.size, : self.size]
        prior = torch.linalg.solve_triangular(own, factor, upper=True)  # in the weights' units
        after = torch.linalg.solve_triangular(root, prior.mT.expand_as(root), upper=False)
        before = prior.square().sum(-1)
        gained = after.square().sum(-2).reciprocal() - before.reciprocal()
        largest: Tensor = gained.amax(0)
        return largest * torch.exp(-2.0 * self.log_scale(coordinates))

    # -- the maps ----------------------------------------------------------------------------------

    def enter(self, eta: Eta) -> dict[str, Tensor]:
        """The coordinates of eta."""
        wide = {name: value.double() for name, value in eta.items()}
        found = {name: wide[name] for name in self.places if not self.profiles_places}
        scale = self.log_scale(wide).exp()
        if self.dense:
            own = self.tasks.whitening[: self.size, : self.size]
            factor = lower_root(own @ self.model.prior_distribution(wide).scale_tril) / scale
            rows, columns = torch.tril_indices(self.size, self.size)
            found[FACTOR] = factor[rows, columns]
        found |= {name: torch.exp(-0.5 * wide[name]) / scale for name in self.precisions}
        return found | ({SCALE: wide[SCALE]} if self.learns_scale else {})

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The coordinates where a search from `eta` begins.

        Places and noise at the fit to all tasks at once, a learned precision at what one
        observation knows, each unless the user said where it starts.
        """
        eta, flat = self.eta, self.tasks.triangles.flatten(0, 1)
        pooled = flat.mT @ flat
        at = {**eta, **self._best_places(pooled)}
        at |= {name: eta[name] for name in self.model.prior.start_loc if name in eta}
        if self.learns_scale:
            pivot = self._root(pooled)[-1, -1]
            if bool(pivot > 0):
                at[SCALE] = (pivot / self._count**0.5).log()
        scale = self.log_scale(at).double().exp()
        own = self.tasks.whitening[: self.size, : self.size]
        begin = self.model.prior.start_at(self.model.weights, at, own.mT @ own / scale.square())
        found = self.enter(at | begin)
        if self.dense and begin:  # as it is meant, to the last digit
            rows, columns = torch.tril_indices(self.size, self.size)
            found[FACTOR] = torch.eye(self.size, dtype=own.dtype)[rows, columns]
        return self._narrowed(found) if begin else found

    def _narrowed(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        """The best of a few narrower priors below the start, the rest of y being the noise's.

        All sds together first, then one after another.
        """
        moving = {
            name: value
            for name, value in start.items()
            if name != SCALE and name not in self.places
        }
        flat = torch.cat([value.reshape(-1) for value in moving.values()])
        one_by_one = torch.eye(len(flat)).to(flat)[flat != 0]
        best, least = start, math.inf
        for which in (torch.ones_like(flat), *one_by_one[: self.size]):
            for share in _NARROWER:
                found = {**start, **named_parts(flat * torch.where(which > 0, share, 1.0), moving)}
                sums = self.sums(found)
                if self.learns_scale:
                    squares = self._squares(found, sums.quadratic)
                    found[SCALE] = 0.5 * (squares / self._count).log()
                loss = float(self._penalised(found, sums))
                if loss < least:
                    best, least = found, loss
            flat = torch.cat([best[name].reshape(-1) for name in moving])
        return best

    def leave(self, coordinates: Mapping[str, Tensor]) -> Eta:
        """Eta at these coordinates, and at the best of what is profiled.

        With a covariance that has an inverse.
        """
        factor = self.factor(coordinates)
        if self.dense:
            factor = _held(factor)
        else:
            least = {
                name: coordinates[name].abs().clamp(min=_FLOOR_OF_NOISE) for name in self.precisions
            }
            coordinates = {**coordinates, **least}
        raw = self._raw(coordinates, factor)
        return {name: raw[name].to(value) for name, value in self.eta.items()}

    def _raw(self, coordinates: Mapping[str, Tensor], factor: Tensor) -> Eta:
        """eta as the model knows it; what is profiled at its best."""
        raw = {**self.eta, **{name: coordinates[name] for name in coordinates if name in self.eta}}
        log_scale = self.log_scale(coordinates)
        if self.profiles_places:
            raw |= self._best_places(self.sums(coordinates).quadratic)
        if self.dense:
            own = self.tasks.whitening[: self.size, : self.size]
            root = torch.linalg.solve_triangular(own, factor, upper=True) * log_scale.exp()
            raw[PRECISION], tril = log_precision_and_tril(lower_root(root))
            if TRIL in self.eta:
                raw[TRIL] = tril
        for name in self.precisions:
            raw[name] = -2.0 * (coordinates[name].abs().log() + log_scale)
        return raw

    @property
    def free(self) -> Tensor:
        """(P, F), from the places that are learned to minus the whitened coordinates."""
        return self._map[:, :-1]

    def best(self, quadratic: Tensor) -> tuple[Tensor, Tensor]:
        """Minus the whitened coordinates of the best places, and 1, `(P,)`.

        And the inverse `(F, F)` of their quadratic.
        """
        inner = self._map.mT @ quadratic @ self._map
        inverse: Tensor = torch.cholesky_inverse(cholesky(inner[:-1, :-1]))
        at = self._map @ torch.cat([-inverse @ inner[:-1, -1], inner.new_ones(1)])
        return at, inverse

    def _best_places(self, quadratic: Tensor) -> Eta:
        root = self._root(quadratic)
        best = -torch.linalg.solve_triangular(root[:-1, :-1].mT, root[-1:, :-1].mT, upper=True)[
            :, 0
        ]
        if self._is_white:
            white = (self.tasks.origin - best).unsqueeze(-1)
            best = torch.linalg.solve_triangular(self.tasks.whitening, white, upper=True)[:, 0]
        return named_parts(best, {name: self.eta[name] for name in self.places})


def _held(factor: Tensor) -> Tensor:
    """With a positive diagonal, no smaller than what a covariance with an inverse needs."""
    least = torch.maximum(_FLOOR * factor.norm(dim=-1), torch.full_like(factor[0], _FLOOR_OF_NOISE))
    diagonal = factor.diagonal()
    held = torch.where(diagonal < 0, -1.0, 1.0) * torch.maximum(diagonal.abs(), least)
    return factor + torch.diag_embed(held - diagonal)
