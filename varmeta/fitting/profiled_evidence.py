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

from varmeta.fitting.free_places import FreePlaces
from varmeta.fitting.profiled_coordinates import COVARIANCE, ProfiledCoordinates, least_entries
from varmeta.fitting.reduced import ReducedTasks
from varmeta.likelihoods.base import SCALE
from varmeta.models.model import TaskModel
from varmeta.numerics.tree import named_parts
from varmeta.numerics.triangular import held_off_zero, lower_root, whitened
from varmeta.priors.factors import PRECISION, TRIL, kept, log_precision_and_tril
from varmeta.strategies.strategy import Eta

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


class ProfiledEvidence(ProfiledCoordinates):
    """The objective as a function of the coordinates, and what is best given them.

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
        super().__init__(model, tasks, eta, linear)
        self.restricted = restricted
        self.has_hyperprior = model.has_hyperprior
        places = (*model.weights.names, *linear)
        r = tasks.whitening
        free = [torch.full((model.start[n].numel(),), n in eta) for n in places]
        values = torch.cat([model.start[name].reshape(-1).to(r) for name in places])
        self.free = FreePlaces.of(r, tasks.origin, torch.cat(free), values)
        self._identity = torch.eye(self.size).to(tasks.triangles)
        # what the weights that vary cannot move
        rest = tasks.triangles[:, self.size :].flatten(0, 1)
        self.within = rest.mT @ rest
        self._count = tasks.counts.sum()

    # -- the objective -----------------------------------------------------------------------------

    def __call__(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """-log p(y | eta), nats, less the log density of the hyperpriors."""
        loss = self.loss(coordinates, self.sums(coordinates))
        return loss + self.penalty(coordinates) if self.has_hyperprior else loss

    def penalty(self, coordinates: Mapping[str, Tensor]) -> Tensor:
        """-log of the hyperpriors' density."""
        raw = self._raw(coordinates, self.factor(coordinates))
        return torch.as_tensor(self.model.penalty(raw)).to(self.tasks.origin)

    def loss(self, coordinates: Mapping[str, Tensor], sums: Sums) -> Tensor:
        """-log p(y | eta) of these tasks, at the places that are best for them; or integrated."""
        if not self.profiles_places:
            return -self.log_evidence(coordinates, sums, self.white(coordinates))
        root = self.free.root(sums.quadratic)
        loss = self.normal(coordinates, root[-1, -1].square(), *sums[1:])
        return loss + self._integrated(coordinates, root) if self.restricted else loss

    def _integrated(self, coordinates: Mapping[str, Tensor], root: Tensor) -> Tensor:
        """What -log of a normal gains where the free places are integrated out."""
        width = self.log_scale(coordinates) + 0.5 * math.log(2 * math.pi)
        return self.free.log_volume(root) - (len(root) - 1) * width

    def log_evidence(self, coordinates: Mapping[str, Tensor], sums: Sums, at: Tensor) -> Tensor:
        """log p(y | eta) of these tasks at places: minus their whitened coordinates, and 1."""
        return -self.normal(coordinates, at @ sums.quadratic @ at, *sums[1:])

    def normal(
        self,
        coordinates: Mapping[str, Tensor],
        squares: Tensor,
        log_det: Tensor,
        number: Tensor,
        log_weight: Tensor,
    ) -> Tensor:
        """-log of a normal density of y, nats, of all tasks together or of each.

        squares: s^2 times those of what is left, in units of its covariance; else as in `Sums`.
        """
        log_scale = self.log_scale(coordinates)
        fit = number * log_scale + 0.5 * squares * torch.exp(-2.0 * log_scale)
        return 0.5 * math.log(2 * math.pi) * number - log_weight + fit + log_det

    def sums(self, coordinates: Mapping[str, Tensor]) -> Sums:
        """What all tasks say together."""
        return self.sums_of(self.factor(coordinates))

    def sums_of(self, factor: Tensor) -> Sums:
        white, log_det = self.whitened(factor, self.tasks.triangles)
        flat = white.flatten(0, 1)
        count, log_weight = self._count, self.tasks.log_weights.sum()
        return Sums(flat.mT @ flat + self.within, log_det.sum(), count, log_weight)

    def of_one(self, coordinates: Mapping[str, Tensor], task: OneTask) -> Sums:
        """What a task says."""
        white, log_det = self.whitened(self.factor(coordinates), task.triangle.unsqueeze(0))
        rest = task.triangle[self.size :]
        quadratic = white[0].mT @ white[0] + rest.mT @ rest
        return Sums(quadratic, log_det[0], task.number, task.log_weight)

    def white_places(self, coordinates: Mapping[str, Tensor], sums: Sums) -> Tensor:
        """Those that are best for these tasks, or those given: as `log_evidence` takes them."""
        if self.profiles_places:
            return self.free.best(sums.quadratic)
        return self.white(coordinates)

    def whitened(self, factor: Tensor, triangles: Tensor) -> tuple[Tensor, Tensor]:
        """Each task's rows that its weights can move, in units of their spread, `(T, D, P)`.

        And half of log|V_i / s^2|, `(T,)`; nothing is taken from what is larger, so no digit is
        lost.
        """
        own = triangles[:, : self.size]
        moved = own[..., : self.size] @ factor
        return whitened(moved @ moved.mT + self._identity, own)

    def determines(self, some: Sums, every: Sums, least: float) -> Tensor:
        """Whether some tasks determine the places and the noise scale that are profiled.

        least: what they must know of what every task knows; and have left of a fit to them.
        """
        if not self.profiles_places:
            return torch.ones((), dtype=torch.bool)
        pivots = self.free.known(some.quadratic, every.quadratic)
        # NaN is no more than least
        found = (pivots[..., :-1] > least).all(-1)
        return found & (pivots[..., -1] > least) if self.learns_scale else found

    def _squares(self, coordinates: Mapping[str, Tensor], quadratic: Tensor) -> Tensor:
        """The quadratic at the places, or at the best of them."""
        if self.profiles_places:
            return self.free.root(quadratic)[-1, -1].square()
        at = self.white(coordinates)
        return at @ quadratic @ at

    # -- at eta ------------------------------------------------------------------------------------

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The coordinates where a search from `eta` begins.

        A learned noise at what the fit to all tasks at once leaves; places at that fit and a
        learned precision at what one observation knows, each unless the user said where it starts.
        """
        eta, flat = self.eta, self.tasks.triangles.flatten(0, 1)
        pooled = flat.mT @ flat
        at = {**eta, **self._best_places(pooled)}
        at |= {name: eta[name] for name in self.model.prior.start_loc if name in eta}
        if self.learns_scale:
            pivot = self.free.root(pooled)[-1, -1]
            if bool(pivot > 0):
                at[SCALE] = (pivot / self._count**0.5).log()
        scale = self.log_scale(at).double().exp()
        own = self.own_whitening
        begin = self.model.prior.start_at(self.model.weights, at, own.mT @ own / scale.square())
        found = self.enter(at | begin)
        if self.dense and begin:  # as it is meant, to the last digit
            found[COVARIANCE] = torch.eye(self.size, dtype=own.dtype)[self.entries]
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
        for number, which in enumerate((torch.ones_like(flat), *one_by_one[: self.size])):
            for share in _NARROWER[min(number, 1) :]:  # 1 is the best so far, once it is known
                found = {**start, **named_parts(flat * torch.where(which > 0, share, 1.0), moving)}
                sums = self.sums(found)
                squares = self._squares(found, sums.quadratic)
                if self.learns_scale:
                    found[SCALE] = 0.5 * (squares / self._count).log()
                # of the evidence under REML too: where to begin is no matter of the criterion
                loss = float(self.normal(found, squares, *sums[1:]))
                loss += float(self.penalty(found)) if self.has_hyperprior else 0.0
                if loss < least:
                    best, least = found, loss
            flat = torch.cat([best[name].reshape(-1) for name in moving])
        return best

    def leave(self, coordinates: Mapping[str, Tensor]) -> Eta:
        """Eta at these coordinates, and at the best of what is profiled.

        With a covariance that has an inverse.
        """
        if self.dense:
            triangle = self.triangle(coordinates)
            factor = self.of_triangle(held_off_zero(triangle, least_entries(triangle)))
        else:
            factor = self.factor(coordinates)
            held = {
                name: torch.maximum(coordinates[name].abs(), least)
                for name, least in self.least_sds().items()
            }
            coordinates = {**coordinates, **held}
        raw = self._raw(coordinates, factor)
        return {name: raw[name].to(value) for name, value in self.eta.items()}

    def _raw(self, coordinates: Mapping[str, Tensor], factor: Tensor) -> Eta:
        """eta as the model knows it; what is profiled at its best."""
        raw = {**self.eta, **{name: coordinates[name] for name in coordinates if name in self.eta}}
        log_scale = self.log_scale(coordinates)
        if self.profiles_places:
            raw |= self._best_places(self.sums(coordinates).quadratic)
        if self.dense:
            own = self.own_whitening
            root = torch.linalg.solve_triangular(own, factor, upper=True) * log_scale.exp()
            raw[PRECISION], tril = log_precision_and_tril(lower_root(root))
            blocks = self.model.prior.blocks
            if TRIL in self.eta:
                raw[TRIL] = tril if blocks is None else tril[kept(blocks, self.model.weights)]
        for name in self.precisions:
            raw[name] = -2.0 * (coordinates[name].abs().log() + log_scale)
        return raw

    def _best_places(self, quadratic: Tensor) -> Eta:
        like = {name: self.eta[name] for name in self.places}
        return named_parts(self.free.best_values(quadratic), like)
