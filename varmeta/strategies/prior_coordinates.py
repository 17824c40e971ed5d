"""A dense guide under a correlated prior: theta = theta0 + L u, u ~ N(0, 1), q(u) = N(m, C C').

Where the prior has all but lost a direction (a correlation of 1 or -1), F_i in the weights' own
coordinates is a valley many orders of magnitude narrower than long: Newton's steps ended on its
way, with posterior sds 17 % too wide.  Here the prior's part of F_i has curvature 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from varmeta.graphs.pieces import Graphed
from varmeta.guides.dense import Dense
from varmeta.guides.kl import scale
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree, map_tree
from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.factors import unit_lower
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.problem import Problem

Losses = Callable[..., Any]


def minimize_in_prior_coordinates(
    problem: Problem,
    fn: Losses,
    eta: Mapping[str, Tensor],
    start: Tree,
    minimizer: NewtonCG,
    **options: Any,
) -> Solution | None:
    """The minimum of fn(phi), found from the prior, which is all zeros here.

    phi has the shapes of `start`.

    options: as of `minimize`.  None unless the guide is dense and the prior correlates: elsewhere
    weights have no common directions to be freed of.
    """
    moved = _in_prior_coordinates(problem, fn, eta)
    if moved is None:
        return None
    inside, leave = moved
    found = minimize(inside, map_tree(torch.zeros_like, start), minimizer, **options)
    return found._replace(value=leave(found.value))


def _in_prior_coordinates(
    problem: Problem, fn: Losses, eta: Mapping[str, Tensor]
) -> tuple[Losses, Callable[[Tree], Tree]] | None:
    """fn as a function of phi in these coordinates, and the way back to phi."""
    with validation_enabled(False):
        prior = problem.model.prior_distribution(eta)
    correlated = isinstance(prior, dist.MultivariateNormal | FactorNormal)
    if type(problem.guide) is not Dense or not correlated:
        return None
    factor = scale(prior)
    assert factor is not None  # the prior is a Gaussian
    known = prior.mean.detach(), factor.detach()
    if not isinstance(fn, Graphed):
        return lambda free: fn(_leave(free, *known)), lambda free: _leave(free, *known)
    inside = Graphed(
        lambda given, free: fn.function(given[0], _leave(free, *given[1])),
        (fn.known, known),
        fn.graphs.setdefault("prior coordinates", {}),
    )
    return inside, lambda free: _leave(free, *known)


def _leave(free: Tree, loc: Tensor, factor: Tensor) -> Tree:
    """phi of the guide N(loc + L m, (L C)(L C)')."""
    found = {
        "loc": loc + free["loc"] @ factor.mT,
        "log_scale": factor.diagonal().log() + free["log_scale"],
    }
    if "tril" in free:
        size = len(factor)
        own = factor @ (free["log_scale"].exp().unsqueeze(-1) * unit_lower(free["tril"], size))
        rows, columns = torch.tril_indices(size, size, -1, device=own.device)
        found["tril"] = (own / found["log_scale"].exp().unsqueeze(-1))[..., rows, columns]
    return found
