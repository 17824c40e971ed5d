"""Coordinates for a dense prior over linear weights, free of the columns' units and origins.

    out = D theta_i + E beta + constant, [D E] = [Q_d Q_e] R over the rows of all tasks (QR), so
    that out = Q_d w_i + Q_e b + constant with w_i = R_d theta_i + R_de beta and b = R_e beta; w_i =
    psi + L u_i,  u_i ~ N(0, 1),  q(u_i) = N(m_i, C_i C_i').

A dense prior is closed under affine maps of the columns, so the optimum is that of the raw columns;
but there its rounding errors grow with the distance of the columns from 0, and here they do not.
The factor L is free, its diagonal any real number: a covariance that loses rank, at infinity of the
log precisions, is an ordinary point L_jj = 0 here (Bates et al., lme4, J. Stat. Software 67 (2015),
section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import pyro
import torch
from pyro import poutine
from torch import Tensor

from varmeta.guides.dense import Dense
from varmeta.guides.quadrature import Quadrature
from varmeta.models.model import TaskModel
from varmeta.models.pyro_program import DATA, TASKS, observed_log_prob
from varmeta.numerics.tree import Tree, named_parts
from varmeta.numerics.triangular import held_off_zero, lower_root, whitened_columns
from varmeta.priors.factors import PRECISION, TRIL, log_precision_and_tril, unit_lower
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch, Data

# How small an entry of L's diagonal is told as, against its row, and against where L started: a
# covariance must have an inverse.  The objective is even in it, so that it rises by its square
# alone.
_FLOOR, _FLOOR_OF_START = 1e-6, 1e-7


@dataclass(frozen=True)
class Whitened:
    """The coordinates of one problem.

    eta's names are kept: theta0's hold psi, the shared ones b, the prior's the factor L.
    """

    problem: Problem
    rows: list[
        tuple[Tensor, Batch, Tensor, Tensor]
    ]  # tasks, their batch, the whitened design, the constant
    triangle: Tensor  # R, (D + S, D + S)
    linear: tuple[str, ...]  # names of beta
    size: Tensor  # of L at the start
    raw_places: (
        bool  # theta0 and beta stay as they are: a hyperprior acts on each alone, or some are held
    )

    @classmethod
    def of(cls, problem: Problem, batch: Batch, eta: Eta) -> Whitened | None:
        """The whitened problem, or None where the model has none.

        It has none where it is not linear by construction, its prior or guide is not dense, or its
        columns are collinear.
        """
        model = problem.model
        if model.prior.learn_precision != "full" or model.prior.scale_hyperprior is not None:
            return None
        if model.prior.blocks is not None:  # a factor of whitened columns mixes them
            return None
        gaussian = type(problem.guide) in (Dense, Quadrature)
        if not gaussian or not problem.deterministic or not model.all_linear:
            return None
        linear = (*model.shared, *model.coefficients)
        groups = [
            (tasks, group, *_design(model, group.support, eta, linear))
            for tasks, group in batch.by_size()
        ]
        kept = [
            (design * group.support.mask.reshape(*design.shape[:2], 1, 1), tasks)
            for tasks, group, design, _ in groups
        ]
        stacked = torch.cat([design.reshape(-1, design.shape[-1]) for design, _ in kept]).double()
        count = sum(int(group.support.num_points.sum()) for _, group, _, _ in groups)
        known = whitened_columns(stacked)
        if known is None:
            return None
        unit = max(1, count) ** 0.5
        q, r = unit * known[0], known[1] / unit
        rows, first = [], 0
        for tasks, group, design, constant in groups:
            number = design[..., 0].numel()
            part = q[first : first + number].reshape(design.shape).to(design)
            rows.append((tasks, group, part, constant))
            first += number
        raw_places = model.prior.loc_hyperprior is not None or bool(model.weights.fixed)
        made = cls(problem, rows, r, linear, r.new_ones(()), raw_places)
        _, inside = made.enter({}, eta)
        return replace(made, size=made.factor(inside).norm(dim=-1).max())

    # -- the maps ----------------------------------------------------------------------------------

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """R_d, R_de and R_e."""
        size = self.problem.model.weights.size
        r = self.triangle
        return r[:size, :size], r[:size, size:], r[size:, size:]

    def factor(self, eta: Mapping[str, Tensor]) -> Tensor:
        """L, from its diagonal and the entries below it."""
        diagonal = eta[PRECISION]
        lower = torch.diag_embed(diagonal)
        if TRIL not in eta:
            return lower
        triangle = unit_lower(eta[TRIL], len(diagonal))
        return lower + triangle - torch.eye(len(diagonal)).to(triangle)

    def places(self, eta: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """psi and b."""
        psi, b = self.problem.model.weights.flatten(eta).to(like), _flat(eta, self.linear, like)
        if not self.raw_places:
            return psi, b
        r_d, r_de, r_e = (block.to(like) for block in self._blocks())
        return r_d @ psi + r_de @ b, r_e @ b

    def _raw_places(self, eta: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """theta0 and beta."""
        r_d, r_de, r_e = self._blocks()
        theta, beta = self.problem.model.weights.flatten(eta).to(r_d), _flat(eta, self.linear, r_d)
        if self.raw_places:
            return theta, beta
        beta = _back(r_e, beta.unsqueeze(-1)).squeeze(-1)
        return _back(r_d, (theta - r_de @ beta).unsqueeze(-1)).squeeze(-1), beta

    def enter(self, phi: Tree, eta: Eta) -> tuple[Tree, Eta]:
        """The coordinates of (phi, eta); phi may be {}."""
        weights, like = self.problem.model.weights, eta[PRECISION]
        r_d, r_de, r_e = self._blocks()
        theta, beta = weights.flatten(eta).double(), _flat(eta, self.linear, r_d)
        prior = self.problem.model.prior_distribution(
            {name: value.double() for name, value in eta.items()}
        )
        psi = r_d @ theta + r_de @ beta
        factor = lower_root(r_d @ prior.scale_tril)
        inside = eta | _lower_entries(factor, eta)
        if not self.raw_places:
            inside |= {**_split(psi, eta, weights.names), **_split(r_e @ beta, eta, self.linear)}
        inside = {name: value.to(like) for name, value in inside.items()}
        if not phi:
            return {}, inside
        spread = phi["log_scale"].double().exp().unsqueeze(-1)
        triangle = (
            unit_lower(phi["tril"].double(), len(psi)) if "tril" in phi else torch.ones_like(spread)
        )
        own = _solve(factor, lower_root(r_d @ (spread * triangle)))
        moved = phi["loc"].double() @ r_d.mT + r_de @ beta - psi
        found = {"loc": _solve(factor, moved.unsqueeze(-1)).squeeze(-1), **_scales(own, phi)}
        return {name: found[name].to(phi[name]) for name in phi}, inside

    def leave(self, phi: Tree, eta: Eta) -> tuple[Tree, Eta]:
        """(phi, eta) at these coordinates, with a covariance that has an inverse; phi may be {}."""
        like = eta[PRECISION]
        r_d, r_de, _ = self._blocks()
        factor = self.factor(eta).double()
        least = torch.maximum(_FLOOR * factor.norm(dim=-1), _FLOOR_OF_START * self.size)
        # the sign of a column of L says nothing, but u's must follow it
        factor = held_off_zero(factor, least)
        raw = self._raw(eta, factor)
        raw = {name: value.to(like) for name, value in raw.items()}
        if not phi:
            return {}, raw
        spread = phi["log_scale"].double().exp().unsqueeze(-1)
        triangle = (
            unit_lower(phi["tril"].double(), len(factor))
            if "tril" in phi
            else torch.ones_like(spread)
        )
        own = lower_root(_back(r_d, factor @ (spread * triangle)))
        psi, origin = self.places(eta, r_d)[0], r_de @ self._raw_places(eta)[1]
        loc = _back(r_d, (psi + phi["loc"].double() @ factor.mT - origin).unsqueeze(-1)).squeeze(-1)
        found = {"loc": loc, **_scales(own, phi)}
        return {name: found[name].to(phi[name]) for name in phi}, raw

    def _raw(self, eta: Mapping[str, Tensor], factor: Tensor) -> Eta:
        """eta as the model knows it, for an L that may have been held off 0."""
        raw = dict(eta)
        if not self.raw_places:
            theta, beta = self._raw_places(eta)
            raw |= {
                **_split(theta, eta, self.problem.model.weights.names),
                **_split(beta, eta, self.linear),
            }
        log_precision, tril = log_precision_and_tril(lower_root(_back(self._blocks()[0], factor)))
        raw[PRECISION] = log_precision
        return raw | {TRIL: tril} if TRIL in eta else raw

    # -- the objective -----------------------------------------------------------------------------

    def losses(self) -> Losses:
        """F_i `(tasks,)` of these coordinates.

        The values are those of the raw ones where log p is quadratic in theta.

        Elsewhere they differ by what the expectation's rule is off: its points lie along the axes
        of another root of the same covariance.
        """
        noise = self.problem.noise("elbo", self.rows[0][1], 0)
        size, density = self.problem.model.weights.size, self.log_density()
        mean = self.problem.objective.mean  # Gauss-Hermite's points have weights

        def fn(phi: Tree, eta: Mapping[str, Tensor]) -> Tensor:
            factor = torch.diag_embed(phi["log_scale"].exp())
            if "tril" in phi:
                factor = factor @ unit_lower(phi["tril"], size)
            squares = factor.square().sum((-2, -1)) + phi["loc"].square().sum(-1)
            divergence = 0.5 * (squares - size) - phi["log_scale"].sum(-1)
            u = phi["loc"] + (factor @ noise.unsqueeze(-1)).squeeze(-1)  # (points, tasks, D)
            return divergence + mean(-density(u, eta))

        return fn

    def log_density(self) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
        """log p(y_i | u, eta) `(points, tasks)` of u `(points, tasks, D)`."""
        back = torch.cat([tasks for tasks, *_ in self.rows]).argsort()

        def fn(u: Tensor, eta: Mapping[str, Tensor]) -> Tensor:
            if len(self.rows) == 1:
                return self._part(u, eta, self.rows[0])
            parts = [self._part(u[:, group[0]], eta, group) for group in self.rows]
            return torch.cat(parts, 1)[:, back]

        return fn

    def _part(
        self, u: Tensor, eta: Mapping[str, Tensor], group: tuple[Tensor, Batch, Tensor, Tensor]
    ) -> Tensor:
        _, batch, design, constant = group
        model, size = self.problem.model, self.problem.model.weights.size
        own, common = design[..., :size], design[..., size:]
        psi, b = self.places(eta, own)
        out = torch.einsum("tncd,ptd->ptnc", own, psi + u @ self.factor(eta).mT)
        out = out + common @ b if self.linear else out
        out = out.reshape(*out.shape[:2], *constant.shape[1:]) + constant
        return _log_density(model, out, eta, batch.support)

    def penalty(self, eta: Eta) -> Tensor | float:
        """-log of the hyperpriors at the raw eta."""
        if not self.problem.model.has_hyperprior:
            return 0.0
        return self.problem.model.penalty(self._raw(eta, self.factor(eta).double()))


def whitened_correlation(problem: Problem, batch: Batch, eta: Eta) -> Tensor | None:
    """The prior's correlations `(D, D)` between the weights of whitened columns.

    None where there are no such columns.
    """
    inside = Whitened.of(problem, batch, eta)
    if inside is None:
        return None
    factor = inside.factor(inside.enter({}, eta)[1]).double()
    rows: Tensor = factor / factor.norm(dim=-1, keepdim=True)
    return rows @ rows.mT


def _design(
    model: TaskModel, data: Data, eta: Eta, linear: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Columns `(tasks, points, channels, D + S)` by which the output moves with theta and beta, and
    what it is at 0.
    """
    x, _ = data.filled
    zero = {**eta, **{name: torch.zeros_like(eta[name]) for name in linear}}
    theta = x.new_zeros(model.weights.size)  # theta0 plays no part in what the network puts out

    def output(own: Tensor, named: Eta) -> Tensor:
        spread = own.expand(len(data), 1, len(own))
        return model.output(model.moved(spread, named, data), named, x)

    with torch.no_grad():
        constant = output(theta, zero)
        columns = [output(one, zero) - constant for one in torch.eye(len(theta)).to(theta)]
        for name in linear:
            for one in torch.eye(zero[name].numel()).to(theta):
                columns.append(
                    output(theta, {**zero, name: one.reshape(zero[name].shape)}) - constant
                )
    return torch.stack(columns, -1).reshape(*constant.shape[:2], -1, len(columns)), constant


def _log_density(model: TaskModel, out: Tensor, eta: Mapping[str, Tensor], data: Data) -> Tensor:
    """log p(data_i | out) `(points, tasks)` for outputs `(points, tasks, rows, ...)`."""
    if not data.width:
        return out.new_zeros(out.shape[:2])

    def program() -> None:
        with (
            pyro.plate(TASKS, len(data), dim=-2),
            pyro.plate(DATA, data.width, dim=-1),
            poutine.mask(mask=cast("torch.BoolTensor", data.mask)),
        ):
            model.observe_output(out, eta, data.filled[1], 3)

    with validation_enabled(False):
        return observed_log_prob(poutine.trace(program).get_trace()).sum(-1)


def _flat(eta: Mapping[str, Tensor], names: tuple[str, ...], like: Tensor) -> Tensor:
    return torch.cat([like.new_zeros(0), *(eta[name].reshape(-1).to(like) for name in names)])


def _split(flat: Tensor, eta: Mapping[str, Tensor], names: tuple[str, ...]) -> Eta:
    return named_parts(flat, {name: eta[name] for name in names})


def _solve(lower: Tensor, b: Tensor) -> Tensor:
    batch = b.shape[:-2]
    x: Tensor = torch.linalg.solve_triangular(lower.expand(*batch, *lower.shape), b, upper=False)
    return x


def _back(upper: Tensor, b: Tensor) -> Tensor:
    batch = b.shape[:-2]
    x: Tensor = torch.linalg.solve_triangular(upper.expand(*batch, *upper.shape), b, upper=True)
    return x


def _scales(factor: Tensor, phi: Tree) -> Tree:
    """A guide's entries from its factor `(tasks, D, D)`, the diagonal held off 0.

    A step far out may leave a guide no width at all, which has no logarithm.
    """
    least = torch.finfo(factor.dtype).eps * factor.norm(dim=-1)
    factor = held_off_zero(factor, least.clamp(min=torch.finfo(factor.dtype).tiny))
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    rows, columns = torch.tril_indices(factor.shape[-1], factor.shape[-1], -1)
    found = {
        "log_scale": diagonal.log(),
        "tril": (factor / diagonal.unsqueeze(-1))[..., rows, columns],
    }
    return {name: value for name, value in found.items() if name in phi}


def _lower_entries(factor: Tensor, eta: Mapping[str, Tensor]) -> Eta:
    rows, columns = torch.tril_indices(len(factor), len(factor), -1)
    found = {PRECISION: factor.diagonal(), TRIL: factor[rows, columns]}
    return {name: value for name, value in found.items() if name in eta}
