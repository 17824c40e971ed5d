"""`fit(..., hyperguide=...)`: the posterior of eta, or of theta0 at REML variances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from varmeta._checks import counted, one_of
from varmeta.fitting.adapt import adapt
from varmeta.fitting.blame import largest
from varmeta.fitting.callback import Callback
from varmeta.fitting.groups_by_size import elbo_losses
from varmeta.fitting.joint_newton import MAX_NEWTON_ENTRIES, WHY_IT_ENDED
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.profiled_newton import profiled
from varmeta.fitting.run import Run, follow, non_finite
from varmeta.guides.pyro_guide import PyroGuide
from varmeta.hyper import exact as in_closed_form
from varmeta.hyper import family
from varmeta.hyper.bounds import check_support
from varmeta.hyper.conditional import conditionals
from varmeta.hyper.coordinates import Coordinates
from varmeta.hyper.gaussian import Gaussian
from varmeta.hyper.importance import Weighted, exact, importance
from varmeta.hyper.reml import restricted
from varmeta.likelihoods.discrete import CONCENTRATION
from varmeta.models.hyper_posterior import HYPERGUIDES, Hyperguide, HyperPosterior
from varmeta.models.kinks import kinked
from varmeta.numerics.joint import Step
from varmeta.numerics.quadrature import nodes
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import detach, flatten
from varmeta.strategies.joint import Joint
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.tasks import Batch, TaskSet

# Draws of eta that are kept; proposals in each round of importance sampling, the more the cheaper
# the tasks are.
DRAWS = 2000
PROPOSALS, MORE_PROPOSALS, WORK = 1000, 4000, 1_000_000
# Coordinates that a dense Gaussian may have: it has as many parameters as half its square.
MAX_SIZE = 24


def check_hyperguide(
    hyperguide: Hyperguide, problem: Problem, tasks: TaskSet, strategy: Strategy, free: bool
) -> None:
    """Refuse, before any work, what has no posterior of eta.  Raises ValueError or TypeError."""
    if not isinstance(hyperguide, str):
        raise TypeError(f"hyperguide must be one of {HYPERGUIDES}, not {hyperguide!r}")
    one_of("hyperguide", hyperguide, HYPERGUIDES)
    if hyperguide == "delta":
        return
    if type(strategy) is not Joint:
        raise ValueError(
            f"hyperguide={hyperguide!r} goes with vm.Joint(...), not with {type(strategy).__name__}"
        )
    if not free:
        raise ValueError(
            f"hyperguide={hyperguide!r} has a solver of its own: leave out optimizer, "
            "batch_size, budget and validate"
        )
    model, batch = problem.model, tasks.batch()
    eta = model.init(batch.support.like)
    _check_problem(hyperguide, problem, batch, eta)
    known = profiled(strategy, problem, tasks, eta, hyperguide == "reml") is not None
    _check_size(hyperguide, problem, batch, eta, known)
    prior = model.prior
    if hyperguide != "reml" and prior.learn_precision == "low_rank":
        raise ValueError(
            f"hyperguide={hyperguide!r} needs a density over all of eta, and a low-rank prior's "
            "directions have none of their own (each may change its sign, and one that shrinks to "
            "zero leaves the others): use hyperguide='reml' or 'delta', or learn_precision='full'"
        )
    if (
        hyperguide != "reml"
        and prior.learn_precision
        and len(tasks) < 3
        and not (prior.hyperprior or prior.scale_hyperprior)
    ):
        raise ValueError(
            f"{counted(len(tasks), 'task')} and a flat hyperprior on the prior's sd have no "
            "posterior, which takes at least 3: give GaussianPrior(scale_hyperprior=...)"
        )


def _check_problem(hyperguide: Hyperguide, problem: Problem, batch: Batch, eta: Eta) -> None:
    """Refuse guides and models whose evidence, or its curvature, is not to be had."""
    model = problem.model
    if problem.is_point(batch, eta):
        raise ValueError(
            f"hyperguide={hyperguide!r} weighs eta by each task's evidence, of which a delta guide "
            "has no bound: use vm.Joint('multivariate_normal')"
        )
    if isinstance(problem.guide, PyroGuide):
        raise ValueError(
            f"hyperguide={hyperguide!r} goes with guide='multivariate_normal' or 'normal', not "
            "with one's own"
        )
    if not problem.deterministic:
        raise ValueError(
            f"hyperguide={hyperguide!r} needs an expectation without noise: this model's "
            f"{counted(model.weights.size, 'weight')} per task are too many, or not linear; try "
            "Joint(..., expectation='cubature')"
        )
    density = kinked(model, batch, eta)
    if density is not None:
        raise ValueError(
            f"hyperguide={hyperguide!r} rests on curvatures, and the density of y, {density}, has "
            "its own in a kink, where no second derivative sees it: leave it out, or take a smooth "
            "density with heavy tails, such as likelihoods.StudentT()"
        )
    if hyperguide != "reml" and CONCENTRATION in eta:
        raise ValueError(
            f"hyperguide={hyperguide!r} has no posterior of NegativeBinomial's concentration under "
            "its flat density: as it grows, the counts become Poisson's and the likelihood stays "
            "as it is.  Fix it, learn_concentration=False"
        )


def _check_size(
    hyperguide: Hyperguide, problem: Problem, batch: Batch, eta: Eta, known: bool
) -> None:
    """Refuse an eta without numbers to integrate over, or with too many.

    known: whether the tasks' evidence is, so that no guides move.
    """
    size_of_eta = int(_free(Coordinates(problem.model, eta), hyperguide).sum())
    if not size_of_eta:
        raise ValueError(
            f"hyperguide={hyperguide!r} has nothing to integrate over: no theta0 is learned "
            "(learn_loc), nor anything shared.  Leave it out: the estimates are those of maximum "
            "likelihood"
        )
    if size_of_eta > MAX_SIZE:
        raise ValueError(
            f"eta has {size_of_eta} numbers to integrate over, more than the {MAX_SIZE} that "
            f"hyperguide={hyperguide!r} serves"
        )
    if known:
        return
    num_tasks, size = flatten(problem.start(batch, eta)).shape
    if (
        2 * size_of_eta * num_tasks * size * (size + size_of_eta * (size_of_eta + 3) // 2)
        > 4 * MAX_NEWTON_ENTRIES
    ):
        raise ValueError(
            f"{num_tasks} tasks with {size} guide parameters and {size_of_eta} numbers in eta are "
            f"too many for hyperguide={hyperguide!r}"
        )


def _free(coordinates: Coordinates, hyperguide: Hyperguide) -> Tensor:
    location = coordinates.is_location
    return location if hyperguide == "reml" else torch.ones_like(location)


def integrate(
    problem: Problem,
    strategy: Strategy,
    batch: Batch,
    tasks: TaskSet,
    run: Run,
    hyperguide: Hyperguide,
    max_steps: int,
    seed: int,
    callback: Callback | None,
) -> None:
    """Move `run` to the posterior of eta, in place.

    run.hyper is that posterior, run.eta its mean, and phi is at that eta.

    Raises ValueError where the objective is not finite.
    """
    begin, first = perf_counter() - run.seconds, run.step
    bounded = hyperguide != "reml"  # under which theta0's Gaussian is exact as it is
    if not bounded:
        check_support(problem.model, run.eta)
    coordinates = Coordinates(problem.model, run.eta, bounded)
    free = _free(coordinates, hyperguide)
    reml = None
    if hyperguide == "reml":
        reml = profiled(strategy, problem, tasks, run.eta, restricted=True)
    evidence = None if reml is not None else profiled(strategy, problem, tasks, run.eta)
    spent, each = run.evaluations, 1 if reml is not None else 2 * int(free.sum())

    def arrived(step: Step) -> None:
        work = each * step.evaluations
        follow(run, step._replace(evaluations=work), first, spent, begin, callback)

    if reml is not None:
        found = restricted(reml, coordinates, first > 0, max_steps, arrived)
        _check_found(problem, batch, run, found)
        weighted = exact(found.mean, found.factor, -found.bound, _proposals(problem, batch), seed)
    else:
        found = _gaussian(
            problem, batch, run, coordinates, free, hyperguide, max_steps, arrived, evidence
        )
        weighted = _weighted(problem, batch, run, coordinates, hyperguide, found, seed, evidence)
    _keep(run, hyperguide, coordinates, found, weighted, seed)
    run.state = _adapted(problem, strategy, batch, run)
    run.loss = found.bound
    run.converged = found.result == Result.CONVERGED
    steps = counted(run.step - first, "Newton step")
    of = "of the Gaussian of eta" if reml is None else "on the REML criterion, in closed form"
    run.stop = (
        f"converged after {steps} {of}"
        if run.converged
        else f"after {steps}: {WHY_IT_ENDED.get(found.result, 'it was to be no more')}"
    )


def _keep(
    run: Run,
    hyperguide: Hyperguide,
    coordinates: Coordinates,
    found: Gaussian,
    weighted: Weighted,
    seed: int,
) -> None:
    """Put the posterior of eta into the run, and eta at its mean."""
    run.hyper = HyperPosterior(
        hyperguide=hyperguide,
        points=coordinates.eta_of(weighted.points),
        log_weights=weighted.log_weights,
        rows=weighted.resampled(DRAWS, seed),
        mean=found.mean,
        factor=found.factor,
        pareto_k=weighted.pareto_k,
        final_k=weighted.final_k,
        ess=weighted.ess,
        log_evidence=weighted.log_evidence,
        evidence_error=weighted.evidence_error,
    )
    centre = (weighted.log_weights.exp()[:, None] * weighted.points).sum(0)
    run.eta = detach(coordinates.eta(coordinates.named(centre)))


def _gaussian(
    problem: Problem,
    batch: Batch,
    run: Run,
    coordinates: Coordinates,
    free: Tensor,
    hyperguide: Hyperguide,
    max_steps: int,
    callback: Callable[[Step], object],
    evidence: ProfiledEvidence | None,
) -> Gaussian:
    """q(eta) by the best bound, from where the run stands.

    evidence: of a regression, in the place of a bound of it.

    Raises ValueError where the objective is not finite.
    """
    options: dict[str, Any] = {
        "diagonal": hyperguide == "normal",
        "jacobian": hyperguide != "reml",
        # importance weights mend the rest; REML has none to mend it
        "tolerance": 1e-9 if hyperguide == "reml" else 1e-6,
        "max_steps": max_steps,
        "callback": callback,
    }
    try:
        if evidence is not None:
            found = in_closed_form.fit_gaussian(evidence, coordinates, run.eta, free, **options)
            if found.result not in (Result.NON_FINITE, Result.DIVERGED):
                return found
        found = family.fit_gaussian(problem, batch, coordinates, run.eta, free, **options)
    except torch.linalg.LinAlgError as error:
        raise ValueError(_no_evidence(problem, batch, run)) from error
    _check_found(problem, batch, run, found)
    return found


def _check_found(problem: Problem, batch: Batch, run: Run, found: Gaussian) -> None:
    """Raise ValueError where the objective was not finite."""
    if found.result in (Result.NON_FINITE, Result.DIVERGED):
        losses = elbo_losses(problem, batch)(detach(problem.start(batch, run.eta)), run.eta)
        raise ValueError(
            non_finite(batch, losses, "at the start")
            if not losses.isfinite().all()
            else f"{WHY_IT_ENDED[Result.DIVERGED]}; it started {largest(batch.names, losses)}"
        )


def _weighted(
    problem: Problem,
    batch: Batch,
    run: Run,
    coordinates: Coordinates,
    hyperguide: Hyperguide,
    found: Gaussian,
    seed: int,
    known: ProfiledEvidence | None,
) -> Weighted:
    """Draws around the Gaussian, weighted by the evidence of all tasks."""
    gaussian = problem.model.is_linear_gaussian

    def log_density(points: Tensor) -> Tensor:
        eta = coordinates.eta_of(points)
        if known is not None:
            evidence = in_closed_form.log_evidence(known, batch, eta).to(points)
        else:
            evidence = conditionals(problem.model, batch, eta, gaussian).log_evidence.sum(-1)
        if bool(evidence.isnan().any()):
            raise ValueError(_no_evidence(problem, batch, run))
        # under "reml" the sds are a point, and a Jacobian there would count as evidence
        return evidence + coordinates.log_density_of(points, hyperguide != "reml")

    number = _proposals(problem, batch)
    try:
        return importance(log_density, found.mean, found.factor, number, seed)
    except torch.linalg.LinAlgError as error:
        raise ValueError(_no_evidence(problem, batch, run)) from error


def _proposals(problem: Problem, batch: Batch) -> int:
    """The number of draws in a round: the more the cheaper the tasks are."""
    model = problem.model
    several = 1 if model.is_linear_gaussian else len(nodes(model.weights.size)[0])
    cost = several * batch.cells
    return max(PROPOSALS, min(MORE_PROPOSALS, WORK // max(1, cost)))


def _adapted(problem: Problem, strategy: Strategy, batch: Batch, run: Run) -> State:
    found = adapt(strategy, problem, batch, run.eta, compile=False)
    return replace(run.state, phi=detach(found.value), step=run.step)


def _no_evidence(problem: Problem, batch: Batch, run: Run) -> str:
    losses = elbo_losses(problem, batch)(detach(problem.start(batch, run.eta)), run.eta)
    return (
        "the evidence cannot be computed around the posterior of eta; it started "
        f"{largest(batch.names, losses)}: look at its data, or standardise them"
    )
