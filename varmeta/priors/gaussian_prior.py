"""The meta-prior N(theta0, Lambda^-1) from which every task's weights come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.files.remember import Remembers
from varmeta.numerics.roots import LowRankRoot
from varmeta.numerics.triangular import lower_root
from varmeta.priors import hyperprior as densities
from varmeta.priors.check import (
    LearnPrecision,
    check_hyperpriors,
    check_precision,
    checked_blocks,
    checked_covariance,
    checked_learn_loc,
    checked_lkj,
    checked_rank,
)
from varmeta.priors.covariates import Covariates, check_covariates
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.factors import (
    FACTOR,
    PRECISION,
    TRIL,
    block_of,
    in_place,
    kept,
    log_precision_and_tril,
    together,
    trapezoid,
    unit_lower,
)
from varmeta.priors.hyperprior import Hyperprior
from varmeta.priors.start import check_names, factor_entries, log_precisions, rank_of
from varmeta.priors.weights import Weights


class GaussianPrior(Remembers):
    """N(theta0, Lambda^-1) over the weights of a task: theta0 is the anchor that pulls them.

    lambda is a *precision*, the inverse of a variance.

    precision: where learning starts, or the fixed value: one number, a dict by parameter or module
        name whose values are numbers or tensors of the parameter's shape.  Units: 1 / (weight's
        unit)^2.  Left out: 1 if fixed; if learned, `fit` starts regressions where one observation
        would know as much as the prior, else at 1; a network, unless "full", at each layer's fan-in
        (1-32-32-1: 1, 32, 32), where its outputs are as large as its inputs.
    learn_precision: None (fixed), "shared" (one lambda), "per_module", "per_parameter" (one for
        every single weight), "full" (a dense covariance over up to a few hundred weights, as lme4's
        `(1 + x | g)`), or "low_rank" (a variance of each weight's own and a few directions along
        which tasks differ in all weights together, for any number of weights).
    blocks: of "full", lists of parameter names whose weights are correlated with each other and
        with no others, `[["intercept", "x"], ["z"]]` for lme4's `(x | g) + (0 + z | g)`; a
        parameter in none of them is a block by itself.  Left out: all weights are one block.
    rank: how many directions "low_rank" has, fewer than a task's weights; left out, 5 or all
        weights but one.  More than the number of tasks - 1 find nothing to learn.
    loc: theta0 by parameter name, where it should not start at the network's own weights (or at
        zero).  `fit` starts there as it is told; parameters that are not named start at the best
        fit to all tasks at once, where a model is small.
    learn_loc: False holds theta0 where it is (`loc`, the network's own weights, or zero), a random
        effect without a fixed effect; a list of patterns holds it for all weights but those,
        `["intercept"]`.  Shared parameters are learned.
    covariance: a fixed or starting dense covariance `(D, D)`, in the order of the model's weights,
        instead of a precision.
    hyperprior: a distribution over each learned precision, such as `pyro.distributions.Gamma(2.,
        1.)`.  Its log density, taken with respect to the precision itself, is added to the
        objective once.
    scale_hyperprior: the same over each learned standard deviation, in the weight's unit: a
        half-normal, a half-Cauchy.  One distribution, or a dict by the names that learn_precision
        distinguishes; flat for names left out.
    loc_hyperprior: a distribution over every number of theta0, or a dict by parameter name, which
        may name shared parameters too; flat for names left out.
    lkj: concentration of the LKJ distribution over the correlations of "full"; 1 is uniform over
        correlation matrices.
    covariates: features of the tasks that move the prior, theta_i ~ N(theta0 + Gamma z_i,
        Lambda^-1): a dict of their names by parameter name, `{"intercept": ["log_uppm"]}`, or a
        list for all weights.  Each coefficient is learned, starts at 0 and is called
        `intercept:log_uppm`, a name that loc and a dict as loc_hyperprior know too; theta0 is the
        location of a task whose features are 0.

    The dense covariance is S S' with S = diag(exp(-log_precision / 2)) U and U unit lower
    triangular, so that both halves of it are free parameters without units.

    The low-rank one is diag(s)^2 + F F' with F = diag(s) W `(D, rank)`.  Free are each weight's own
    sd, exp(-log_precision / 2), which is s_j sqrt(1 + |W_j|^2), and W from its diagonal down: above
    it W is 0, or rotations of its columns would be the same prior.  The sign of a column says
    nothing, and is what the start made it: random numbers, the same always, that have a fifth of
    each weight's variance, since a column of zeros is a saddle.  It is a factor analysis of the
    tasks' weights; never is anything D x D, unless it is asked for.
    Source: Rubin and Thayer, Psychometrika 47 (1982); Woodbury's identity.

    Raises ValueError for a precision that is not positive and finite, and for an unknown
    `learn_precision`; TypeError for a precision that is no number.

    >>> GaussianPrior(learn_precision="low_rank", rank=2)
    GaussianPrior(learn_precision='low_rank', rank=2)
    """

    def __init__(
        self,
        precision: float | Mapping[str, float | Tensor] | None = None,
        learn_precision: LearnPrecision | None = None,
        *,
        loc: Mapping[str, Tensor | float] | None = None,
        covariance: Tensor | None = None,
        hyperprior: dist.TorchDistribution | None = None,
        scale_hyperprior: Hyperprior = None,
        loc_hyperprior: Hyperprior = None,
        lkj: float = 1.0,
        covariates: Covariates = None,
        learn_loc: bool | Sequence[str] = True,
        rank: int | None = None,
        blocks: Sequence[Sequence[str]] | None = None,
    ) -> None:
        check_precision(precision, learn_precision)
        self.start = precision
        self.learn_precision = learn_precision
        self.start_loc = dict(loc or {})
        self.covariance = checked_covariance(covariance, precision, learn_precision)
        check_hyperpriors(hyperprior, scale_hyperprior, learn_precision)
        self.hyperprior = hyperprior
        self.scale_hyperprior = densities.check(scale_hyperprior, "scale_hyperprior")
        self.loc_hyperprior = densities.check(loc_hyperprior, "loc_hyperprior")
        self.lkj = checked_lkj(lkj, learn_precision)
        self.covariates = check_covariates(covariates)
        self.learn_loc = checked_learn_loc(learn_loc)
        self.rank = checked_rank(rank, learn_precision)
        self.blocks = checked_blocks(blocks, learn_precision, self.covariance)

    def __repr__(self) -> str:
        parts = [f"precision={self.start}"] if isinstance(self.start, (int, float)) else []
        parts += (
            [f"precision of {', '.join(self.start)}"] if isinstance(self.start, Mapping) else []
        )
        parts += [] if self.covariance is None else [f"covariance {tuple(self.covariance.shape)}"]
        parts += (
            [] if self.learn_precision is None else [f"learn_precision={self.learn_precision!r}"]
        )
        parts += [f"loc of {', '.join(self.start_loc)}"] if self.start_loc else []
        parts += [] if self.hyperprior is None else [f"hyperprior={type(self.hyperprior).__name__}"]
        parts += [
            f"{name}={densities.describe(value)}"
            for name, value in (
                ("scale_hyperprior", self.scale_hyperprior),
                ("loc_hyperprior", self.loc_hyperprior),
            )
            if value is not None
        ]
        parts += [] if self.lkj == 1.0 else [f"lkj={self.lkj:g}"]
        parts += [f"covariates={self.covariates!r}"] if self.covariates else []
        parts += [] if self.rank is None else [f"rank={self.rank}"]
        parts += [] if self.blocks is None else [f"blocks={list(map(list, self.blocks))}"]
        parts += [] if self.learn_loc is True else [f"learn_loc={self.learn_loc!r}"]
        return f"GaussianPrior({', '.join(parts)})"

    @property
    def has_hyperprior(self) -> bool:
        """Whether any density of eta is added to the objective."""
        given = (self.hyperprior, self.scale_hyperprior, self.loc_hyperprior)
        return any(value is not None for value in given) or self.lkj != 1.0

    @property
    def dense(self) -> bool:
        """Whether it is a multivariate normal with a D x D factor."""
        return self.learn_precision == "full" or self.covariance is not None

    @property
    def correlates(self) -> bool:
        """Whether it learns how a task's weights depend on each other."""
        return self.learn_precision in ("full", "low_rank")

    @property
    def uniform(self) -> bool:
        """Whether all weights have the same precision, whatever it is."""
        one = self.learn_precision in (None, "shared") and not isinstance(self.start, Mapping)
        return one and self.covariance is None

    # -- eta ---------------------------------------------------------------------------------------

    def init(self, weights: Weights, like: Tensor) -> dict[str, Tensor]:
        """The prior's entries of eta, beside theta0.

        `log_precision...`, for "full" `prior_tril` and for "low_rank" `prior_factor`.
        """
        self._check(weights)
        if self.learn_precision is None:
            return {}
        return self._entries(weights, *self._start(weights, like))

    def _entries(
        self, weights: Weights, log_precision: Tensor, factor: Tensor
    ) -> dict[str, Tensor]:
        """The learned entries of eta from every weight's log precision `(D,)` and, for "full" and
        "low_rank", the factor's lower part.
        """
        if self.learn_precision == "shared":
            return {PRECISION: log_precision.mean()}
        if self.learn_precision == "full":
            factor = factor[kept(self.blocks, weights)] if self.blocks is not None else factor
            below = {TRIL: factor} if len(factor) else {}
            return {PRECISION: log_precision, **below}
        if self.learn_precision == "low_rank":
            return {PRECISION: log_precision, FACTOR: factor}
        named = weights.unflatten(log_precision)
        if self.learn_precision == "per_parameter":
            return {f"{PRECISION}.{name}": value.clone() for name, value in named.items()}
        parts: dict[str, list[Tensor]] = {}
        for name, value in named.items():
            parts.setdefault(weights.module(name), []).append(value.reshape(-1))
        return {f"{PRECISION}.{module}": torch.cat(part).mean() for module, part in parts.items()}

    def log_precision(self, weights: Weights, eta: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """log lambda of every weight, `(D,)`.

        For a dense covariance, of every weight given those before it.
        """
        if self.learn_precision is None:
            return self._start(weights, like)[0]
        if self.learn_precision == "shared":
            return eta[PRECISION].expand(weights.size)
        if self.correlates:
            return eta[PRECISION]
        key = (
            (lambda name: weights.module(name))
            if self.learn_precision == "per_module"
            else (lambda name: name)
        )
        parts = [
            eta[f"{PRECISION}.{key(name)}"].expand(shape).reshape(-1)
            for name, shape in weights.shapes.items()
        ]
        return torch.cat(parts)

    def distribution(self, weights: Weights, eta: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """p(theta | eta), event shape `(D,)`: a diagonal normal, or a multivariate one.

        Multivariate where the covariance is dense, by its products where it is of low rank.
        """
        loc = weights.flatten(eta)
        if self.learn_precision == "low_rank":
            return FactorNormal(loc, self._low_rank_root(weights, eta))
        if self.learn_precision == "shared":
            sd = torch.exp(-0.5 * eta[PRECISION]).expand(
                weights.size
            )  # one number, which `guides.kl` looks for
        else:
            sd = torch.exp(-0.5 * self.log_precision(weights, eta, loc))
        if not self.dense:
            diagonal: dist.TorchDistribution = dist.Normal(loc, sd).to_event(1)
            return diagonal
        tril = self.below(weights, eta[TRIL]) if TRIL in eta else self._start(weights, loc)[1]
        return dist.MultivariateNormal(
            loc, scale_tril=sd.unsqueeze(-1) * unit_lower(tril, weights.size)
        )

    def rank_for(self, weights: Weights) -> int:
        """The directions that the weights share under the prior; 0 unless it is "low_rank"."""
        return rank_of(self.rank, weights.size) if self.learn_precision == "low_rank" else 0

    def _low_rank_root(self, weights: Weights, eta: Mapping[str, Tensor]) -> LowRankRoot:
        factor = trapezoid(eta[FACTOR], weights.size, self.rank_for(weights))
        sd = torch.exp(-0.5 * eta[PRECISION])
        return LowRankRoot(sd * (1.0 + factor.square().sum(-1)).rsqrt(), factor)

    def learned(self, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The learned log precisions by what `learn_precision` tells apart.

        "", modules or parameters; of "full" and "low_rank" all, `(D,)`.
        """
        start = len(PRECISION) + 1
        return {
            key[start:]: value for key, value in eta.items() if key.partition(".")[0] == PRECISION
        }

    def below(self, weights: Weights, tril: Tensor) -> Tensor:
        """All entries of U below its diagonal, `(..., D (D - 1) / 2)`, from those that are free."""
        return tril if self.blocks is None else in_place(tril, self.blocks, weights)

    def block_sizes(self, weights: Weights) -> Tensor:
        """How many weights are in each weight's block, `(D,)`."""
        if self.blocks is None:
            return torch.full((weights.size,), weights.size)
        return together(self.blocks, weights).sum(-1)

    def row_norms(self, weights: Weights, eta: Mapping[str, Tensor]) -> Tensor:
        """The marginal sd of each weight over its conditional one, `(D,)`.

        Of the factor U of a learned dense covariance.
        """
        if TRIL not in eta:
            return torch.ones_like(eta[PRECISION])
        norms: Tensor = unit_lower(self.below(weights, eta[TRIL]), weights.size).norm(dim=-1)
        return norms

    def learned_sds(self, weights: Weights, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The learned standard deviations, named as in `learned`.

        Of "full" and "low_rank" by parameter name, each weight's on its own.
        """
        sds = {name: torch.exp(-0.5 * value) for name, value in self.learned(eta).items()}
        if not self.correlates:
            return sds
        return weights.unflatten(sds[""] * self.row_norms(weights, eta))

    def penalty(self, weights: Weights, eta: Mapping[str, Tensor]) -> Tensor | float:
        """-log of the hyperpriors' density at eta (0 where there is none), up to a constant."""
        loc: Mapping[str, Tensor] = (
            eta
            if isinstance(self.loc_hyperprior, Mapping)
            else {n: eta[n] for n in weights.names if n in eta}
        )
        total = -densities.log_density(self.loc_hyperprior, loc)
        if self.learn_precision is None:
            return total
        if self.hyperprior is not None:
            precisions = {name: value.exp() for name, value in self.learned(eta).items()}
            total = total - densities.log_density(self.hyperprior, precisions)
        if self.scale_hyperprior is not None:
            total = total - densities.log_density(
                self.scale_hyperprior, self.learned_sds(weights, eta)
            )
        if self.learn_precision == "full" and self.lkj != 1.0:
            total = total - densities.log_lkj(self.row_norms(weights, eta), self.lkj)
        return total

    def start_at(
        self, weights: Weights, eta: Mapping[str, Tensor], information: Tensor
    ) -> dict[str, Tensor]:
        """Entries of eta for a learned precision whose start was left open.

        They are what one observation knows about the weights.

        information: the mean Hessian of one observation's negative log likelihood, `(D, D)`.  Its
        inverse as the prior's covariance (the unit information prior) has the weights' units,
        wherever the predictors' origin is.
        """
        if self.learn_precision is None or self.start is not None or self.covariance is not None:
            return {}
        scale = information.diagonal().clamp(min=torch.finfo(information.dtype).tiny).rsqrt()
        if self.learn_precision != "full":
            return self._entries(weights, -2.0 * scale.log(), self._start_factor(weights, scale))
        if self.blocks is not None:
            information = information * together(self.blocks, weights).to(information)
        values, vectors = torch.linalg.eigh(scale[:, None] * information * scale)
        # in units of the diagonal; collinear predictors leave directions that no observation knows
        root = scale[:, None] * (vectors * values.clamp(min=1e-4).rsqrt())
        return self._entries(weights, *log_precision_and_tril(lower_root(root)))

    def inside(self, weights: Weights, eta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entries of eta for a learned dense covariance, its variances a hundredth larger.

        A singular one, at infinity of these entries, is flat in them, so that no line search leaves
        it.
        """
        if self.learn_precision != "full":
            return {}
        factor = self.distribution(weights, eta).scale_tril.double()
        wider = torch.cat([factor, 0.1 * torch.diag_embed(factor.norm(dim=-1))], -1)
        log_precision, tril = log_precision_and_tril(lower_root(wider))
        return self._entries(weights, log_precision.to(eta[PRECISION]), tril.to(eta[PRECISION]))

    # -- where learning starts ---------------------------------------------------------------------

    def _check(self, weights: Weights) -> None:
        check_names(self.start, self.learn_precision, self.scale_hyperprior, weights)
        self.rank_for(weights)  # that there are enough
        if self.blocks is not None:
            block_of(self.blocks, weights)  # that they have these names
        if self.covariance is not None and len(self.covariance) != weights.size:
            raise ValueError(
                f"covariance is {len(self.covariance)} x {len(self.covariance)}, but a task has "
                f"{weights.size} weights"
            )

    def _start(self, weights: Weights, like: Tensor) -> tuple[Tensor, Tensor]:
        """log lambda `(D,)`, and what the prior's factor has below its diagonal, or from it."""
        if self.covariance is not None:
            # in its own precision: what is positive definite in float64 need not be so in float32
            found = log_precision_and_tril(torch.linalg.cholesky(self.covariance))
            return found[0].to(like), found[1].to(like)
        diagonal = log_precisions(self.start, self.learn_precision, weights, like)
        return diagonal, self._start_factor(weights, like)

    def _start_factor(self, weights: Weights, like: Tensor) -> Tensor:
        if self.learn_precision == "low_rank":
            return factor_entries(weights.size, self.rank_for(weights), like)
        # only a dense prior has them, and a network too many
        below = weights.size * (weights.size - 1) // 2 if self.learn_precision == "full" else 0
        return like.new_zeros(below)
