"""`ClosedForm`: phi is known, so that nothing is iterated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varmeta.guides import closed_form
from varmeta.guides.convex import inverse_ceiling
from varmeta.models.linearity import own_forward
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.linear_solve import Direct
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import detach
from varmeta.strategies.objective import Outer
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy
from varmeta.tasks import Batch


@dataclass(frozen=True)
class ClosedForm:
    """The inner minimiser of tasks whose posterior is Gaussian by construction.

    phi is the exact minimum of F_i, with its exact derivative in eta; nothing is iterated.
    It serves models that are linear in the weights that vary, `nn.Linear`, `vm.LinearPredictor` or
    the last linear layer of an `nn.Sequential` whose other layers are `shared`, under
    `likelihoods.Gaussian` or `LeastSquaresClasses`, and guides that are a point or a Gaussian.
    `Joint`, `Reinit` and `Implicit` choose it by themselves where the guide can be the posterior
    ("multivariate_normal"); give another minimiser to iterate instead.  With a dense guide the
    objective "elbo" is -log p(y_i | eta), and "query_predictive" -log p(query_i | y_i, eta).

    >>> import varmeta as vm
    >>> prior = vm.GaussianPrior(2.0)
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior)
    >>> tasks = vm.datasets.lines(5, num_query=5)
    >>> strategy = vm.Implicit("delta", outer="query", minimizer=vm.ClosedForm())
    >>> vm.meta_gradient(model, tasks, strategy).certificate.ok
    True
    """


def chosen(minimizer: object, problem: Problem, expectation: str, outer: Outer) -> bool:
    """Whether phi is taken in closed form.

    Where it was asked for, or nothing else was and the tasks' posteriors are known and in the
    guide's family.

    Raises ValueError where it was asked for and does not serve.
    """
    if isinstance(minimizer, ClosedForm):
        _check(problem)
        if expectation != "auto" and not problem.deterministic:
            raise ValueError(
                f"ClosedForm takes no draws, but expectation={expectation!r} asks for them: leave "
                "out the expectation, or the minimizer"
            )
        if not (problem.deterministic or knows(problem, outer)):
            normal = problem.model.predictive is problem.model
            known = "outer='query_predictive' under 'multivariate_normal', " * normal
            raise ValueError(
                f"ClosedForm takes no draws, but outer={outer!r} of the guide {problem.guide!r} "
                f"needs them with {problem.model.weights.size} weights per task: use "
                f"guide='delta', {known}or leave out the minimizer"
            )
        return True
    size = problem.model.weights.size
    free = minimizer is None and expectation == "auto"
    return free and problem.model.is_linear_gaussian and problem.guide.is_any_gaussian(size)


def _check(problem: Problem) -> None:
    """Raise ValueError where `ClosedForm` was asked for and does not serve."""
    model = problem.model
    if not model.is_linear_gaussian:
        own = own_forward(model.net)
        raise ValueError(
            "ClosedForm serves models that are linear in the weights that vary by construction "
            "(nn.Linear, vm.LinearPredictor, or an nn.Sequential whose other layers are shared=) "
            "under likelihoods.Gaussian with one scale or LeastSquaresClasses, not "
            f"{model!r}: {'' if own is None else f'{own}, or '}leave out the minimizer"
        )
    if not _has_phi(problem):
        raise ValueError(
            f"ClosedForm does not know the minimum of the guide {problem.guide!r}: use "
            "'multivariate_normal', 'normal', 'laplace' or 'delta', or leave out the minimizer"
        )


def _has_phi(problem: Problem) -> bool:
    one = torch.ones(1, 1)  # of any number of weights
    return problem.guide.at_gaussian(one, torch.diag_embed(one)) is not None


def is_evidence(problem: Problem, outer: Outer) -> bool:
    """Whether the objective at phi is -log p(y_i | eta): of guides that can be the posterior."""
    return outer == "elbo" and _is_posterior(problem)


def knows(problem: Problem, outer: Outer) -> bool:
    """Whether the objective at phi is a known density of the data, of which nothing is drawn."""
    normal = problem.model.predictive is problem.model  # so are new observations
    known = outer == "elbo" or (outer == "query_predictive" and normal)
    return known and _is_posterior(problem)


def _is_posterior(problem: Problem) -> bool:
    """Whether the guide at phi is p(theta | y_i, eta)."""
    return problem.guide.is_any_gaussian(problem.model.weights.size) or problem.guide.at_mode


def losses(problem: Problem, outer: Outer, batch: Batch, step: int, eta: Eta) -> Tensor:
    """G_i at the minimum of F_i, `(tasks,)`, nats; differentiable in eta."""
    model = problem.model
    if is_evidence(problem, outer):
        return -closed_form.log_evidence(model, eta, batch.support)
    if outer == "query_predictive" and knows(problem, outer):
        return -closed_form.log_predictive(model, eta, batch.support, batch.require_query())
    return problem.losses(outer, batch, step)(_phi(problem, batch, eta), eta)


def loss(
    strategy: Strategy, problem: Problem, batch: Batch, eta: Eta, state: State
) -> tuple[Tensor, State, Stats]:
    """`Strategy.loss` with phi in closed form."""
    found = losses(problem, strategy.outer, batch, state.step, eta)
    stats = Stats(found.detach(), 1.0)
    if state.certify:
        linear = _certified(problem, strategy.outer, batch, state.step, detach(eta))
        stats = replace(stats, inner=solution(problem, batch, eta), linear=linear)
    return strategy.total(problem, batch, eta, found), replace(state, step=state.step + 1), stats


def _certified(
    problem: Problem, outer: Outer, batch: Batch, step: int, eta: Eta
) -> dict[str, Tensor]:
    """What differentiating F_i at phi says of it; where G_i is known without phi, of F_i alone."""
    phi = detach(_phi(problem, batch, eta))
    inner = problem.losses("inner", batch, step)
    same = knows(problem, outer) or (outer == "elbo" and not problem.guide.at_mode)
    other = inner if same else problem.losses(outer, batch, step)
    ceiling = inverse_ceiling(problem.model, problem.guide, eta)
    return ImplicitAdjoint(Direct())(inner, other, phi, eta, ceiling=ceiling)[1]


def solution(problem: Problem, batch: Batch, eta: Eta) -> Solution:
    """phi of every task; a task whose numbers are lost is told as not finite."""
    with torch.no_grad():
        phi = _phi(problem, batch, eta)
    sound = torch.stack([x.isfinite().reshape(len(x), -1).all(-1) for x in phi.values()]).all(0)
    result = torch.where(sound, int(Result.CONVERGED), int(Result.NON_FINITE))
    return Solution(phi, result, {"evaluations": torch.ones(len(batch)).to(batch.support.like)})


def _phi(problem: Problem, batch: Batch, eta: Eta) -> dict[str, Tensor]:
    phi = closed_form.best(problem.guide, problem.model, eta, batch.support)
    assert phi is not None  # `chosen`
    return phi
