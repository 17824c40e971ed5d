"""Where small models start: at the best fit to all tasks at once, so that the data's units do not matter."""

from __future__ import annotations

import torch
from torch import Tensor

from varmeta.bayes.expectation import MAX_CUBATURE_SIZE
from varmeta.bayes.guide import Delta
from varmeta.bayes.model import TaskModel
from varmeta.bayes.objective import Objective
from varmeta.bayes.prior import PRECISION, TRIL
from varmeta.numerics.minimize import minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import Tree
from varmeta.problem import Problem
from varmeta.strategy import Eta
from varmeta.tasks import Batch, TaskSet

# Meta-parameters beyond which a model is no regression any more.
MAX_ETA_SIZE = 300


def is_regression(model: TaskModel, tasks: TaskSet, eta: Eta) -> bool:
    """Few weights, few meta-parameters, and an output linear in the weights (or a program): not a network."""
    small = model.weights.size <= MAX_CUBATURE_SIZE and sum(value.numel() for value in eta.values()) <= MAX_ETA_SIZE
    return small and model.is_linear(tasks)


def pooled_start(problem: Problem, batch: Batch, eta: Eta) -> Eta:
    """eta with theta0, shared parameters and noise scales at their best fit to all tasks at once, as if tasks did not differ,
    and a learned precision at what one observation knows, unless the user said where it starts.

    Data in raw units (weights of hundreds of grams, a predictor around 2,000) put the optimum far from where a model
    starts; this brings the quadratic and quasi-Newton methods near enough, in any units.
    """
    found = pooled_fit(problem.model, batch, eta)
    if found is None:
        return eta
    eta, information = found
    return eta | problem.model.prior.start_at(problem.model.weights, eta, information)


def pooled_fit(model: TaskModel, batch: Batch, eta: Eta) -> tuple[Eta, Tensor] | None:
    """eta fitted to all tasks at once, and what one observation knows there: the mean Hessian of its loss, `(D, D)`.

    None where the fit is not finite.
    """
    objective = Objective(model, Delta())
    moving = [name for name in eta if name.partition(".")[0] not in (PRECISION, TRIL)]
    noise = batch.support.x.new_zeros(1, 1, model.weights.size)

    def fn(row: Tree) -> Tensor:
        # one "task" whose parameters are all of eta's
        now = eta | {name: row[name].squeeze(0) for name in moving}
        phi = objective.guide.init(model, now, batch.support)
        return objective.terms(phi, now, batch.support, noise)[1].sum().reshape(1)

    start = {name: eta[name].detach().unsqueeze(0) for name in moving}
    solution = minimize(fn, start, NewtonCG(), max_steps=100)
    if solution.worst == Result.NON_FINITE:
        return None
    best = eta | {name: value.squeeze(0) for name, value in solution.value.items()}

    def total(theta: Tensor) -> Tensor:
        now = best | model.weights.unflatten(theta)
        return fn({name: now[name].unsqueeze(0) for name in moving}).squeeze()

    information = torch.autograd.functional.hessian(
        total, model.weights.flatten(best)
    ) / batch.support.mask.sum().clamp(min=1)
    return (best, information) if bool(torch.isfinite(information).all()) else None
