"""Where small models start: at the best fit to all tasks at once, in any units of the data."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import torch
from torch import Tensor

from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.guides.delta import Delta
from varmeta.models.model import TaskModel
from varmeta.numerics.hessian import vector_hessian
from varmeta.numerics.joint_model import SharedProblem
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result
from varmeta.numerics.steps import Losses
from varmeta.numerics.tree import Tree, leaves
from varmeta.priors.factors import FACTOR, PRECISION, TRIL
from varmeta.strategies.expectation import MAX_CUBATURE_SIZE, Cubature, GaussHermite
from varmeta.strategies.objective import Objective
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch, Data, TaskSet

# Meta-parameters beyond which a model is no regression any more.
MAX_ETA_SIZE = 300
# A prior that is too wide is narrowed by this factor of its precision, at most so many times (its
# sds by a thousand).
_NARROWER, _MOST_NARROW = 4.0, 11
# How far ahead an edge is looked for, as a share of 1 or of a number's size.
_NEAR = 0.01
# Information below this is none: a mean that has saturated, or a weight that enters nowhere.
NO_INFORMATION = 1e-100


def is_regression(model: TaskModel, tasks: TaskSet, eta: Eta) -> bool:
    """Whether this is a regression, not a network.

    That is few weights, few meta-parameters, and an output linear in the weights (or a program).
    """
    small = (
        model.weights.size <= MAX_CUBATURE_SIZE
        and sum(value.numel() for value in eta.values()) <= MAX_ETA_SIZE
    )
    return small and model.looks_linear(tasks)


def pooled_start(problem: Problem, batch: Batch, eta: Eta) -> Eta:
    """eta at the best fit to all tasks at once, as if tasks did not differ.

    So start theta0, shared parameters and noise scales; a learned precision starts at what one
    observation knows.  What the user gave a start keeps it.

    Data in raw units (weights of hundreds of grams, a predictor around 2,000) put the optimum far
    from where a model starts; this brings the quadratic and quasi-Newton methods near enough, in
    any units.

    Warns where the data say nothing about a weight there; returns eta as it came where they did at
    its start, so that a nonlinear program's fit ran off, and where there are no support rows.
    """
    model = problem.model
    found = pooled_fit(model, batch, eta, model.prior.start_loc)
    if found is None:
        return eta
    best, information = found
    lost = information.diagonal().abs() < NO_INFORMATION
    if bool(lost.any()):
        at = zip(model.weights.names, lost.split(model.weights.sizes), strict=True)
        names = ", ".join(name for name, gone in at if bool(gone.any()))
        warnings.warn(
            f"where the fit to all tasks at once ends, the data say nothing about {names}, and "
            "the fit may not either: start nearer, by tensors in params or "
            "GaussianPrior(loc=...), or leave it out",
            RuntimeWarning,
            stacklevel=3,
        )
        if bool(
            (lost & (_information(model, batch, eta).diagonal().abs() >= NO_INFORMATION)).any()
        ):
            return eta
        information = information + torch.diag_embed(lost.to(information))  # a precision of 1
    return best | _precision_start(problem, batch, best, information)


def _precision_start(problem: Problem, batch: Batch, best: Eta, information: Tensor) -> Eta:
    """The learned precision's entries: what one observation knows, or more where a program's curve
    bends before that.

    One observation may know so little that the prior reaches where a curve means nothing (a
    logistic curve's scale at 0 or below) and derivatives are lost.  A loss that is quadratic over
    the prior rises by D / 2 an observation on average; one that rises by more than twice that, or
    is not finite, bends.
    """
    model, prior = problem.model, problem.model.prior
    begin = prior.start_at(model.weights, best, information)
    if (
        not begin
        or model.net is not None
        or not isinstance(problem.expectation, Cubature | GaussHermite)
    ):
        return begin
    if problem.guide.at_mode or problem.is_point(batch, best | begin):
        return begin
    pooled = float(pooled_loss(model, batch, best))
    rise = 0.5 * model.weights.size * float(batch.support.num_points.sum())
    if _bends(problem, batch, best | begin, pooled + 2.0 * rise):
        # along a ridge of the loss the weights trade for each other only near where it was measured
        alone = torch.diag_embed(information.diagonal().abs())
        for factor in (_NARROWER**k for k in range(_MOST_NARROW)):
            narrow = prior.start_at(model.weights, best, factor * alone)
            if not _bends(problem, batch, best | narrow, pooled + 2.0 * rise / factor):
                return narrow
    return begin


def _bends(problem: Problem, batch: Batch, eta: Eta, goal: float) -> bool:
    """Whether the mean loss over the prior exceeds `goal`, or it or a derivative is not finite."""
    at = SharedProblem(elbo_losses(problem, batch), problem.start(batch, eta), eta, None)
    x, e = at.start()
    _, total = at.loss(x, e)
    return not total <= goal or not all(bool(part.isfinite().all()) for part in at.hessian(x, e))


def pooled_fit(
    model: TaskModel, batch: Batch, eta: Eta, hold: Collection[str] = ()
) -> tuple[Eta, Tensor] | None:
    """eta fitted to all tasks at once, and what one observation knows there.

    The latter is the mean Hessian of its loss, `(D, D)`.

    hold: names that stay where they are.  None where the fit is not finite, and where no task has
        support rows.
    """
    if not bool(batch.support.num_points.any()):
        return None
    moving = [
        name
        for name in eta
        if name.partition(".")[0] not in (PRECISION, TRIL, FACTOR) and name not in hold
    ]
    if not moving:
        information = _information(model, batch, eta)
        return (eta, information) if bool(torch.isfinite(information).all()) else None

    def fn(row: Tree) -> Tensor:
        # one "task" whose parameters are all of eta's
        there = eta | {name: row[name].squeeze(0) for name in moving}
        # with what the hyperpriors say: a strict one may be far from where the data alone lead
        return (pooled_loss(model, batch, there) + model.penalty(there)).reshape(1)

    start = {name: eta[name].detach().unsqueeze(0) for name in moving}
    solution = minimize(fn, start, NewtonCG(), max_steps=100)
    if solution.worst == Result.NON_FINITE:
        return None
    if solution.worst != Result.CONVERGED:
        edges = _at_edges(fn, solution.value)
        # a mode there says nothing of the data, and no step leads on: better where it came from
        again = pooled_fit(model, batch, eta, {*hold, *edges}) if edges else None
        if again is not None:
            return again
    best = eta | {name: value.squeeze(0) for name, value in solution.value.items()}

    information = _information(model, batch, best)
    return (best, information) if bool(torch.isfinite(information).all()) else None


def _at_edges(fn: Losses, row: Tree) -> list[str]:
    """The names along which fn stops being finite a little further down its gradient: where the
    support of their hyperprior ends.
    """
    point = leaves(row)
    with torch.enable_grad():
        slopes = torch.autograd.grad(fn(point).sum(), list(point.values()), allow_unused=True)
    found = []
    for (name, value), slope in zip(row.items(), slopes, strict=True):
        if slope is not None and bool(slope.any()):
            step = _NEAR * value.abs().clamp(min=1.0) * slope / slope.abs().max()
            if not bool(fn(row | {name: value - step}).isfinite().all()):
                found.append(name)
    return found


def pooled_loss(model: TaskModel, batch: Batch, eta: Eta) -> Tensor:
    """The loss of all tasks with every weight at theta0, a scalar."""
    objective, noise = (
        Objective(model, Delta()),
        batch.support.like.new_zeros(1, 1, model.weights.size),
    )

    def of(data: Data) -> Tensor:
        phi = objective.guide.init(model, eta, data)
        return objective.terms(phi, eta, data, noise)[1].sum()

    return torch.stack([of(group.support) for _, group in batch.by_size()]).sum()


def _information(model: TaskModel, batch: Batch, eta: Eta) -> Tensor:
    """The mean Hessian of one observation's loss in theta0, `(D, D)`."""
    weights, count = model.weights, batch.support.num_points.sum().clamp(min=1)
    hessian = vector_hessian(
        lambda theta: pooled_loss(model, batch, eta | weights.unflatten(theta)),
        weights.flatten(eta),
    )
    return hessian / count
