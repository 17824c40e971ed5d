"""Refuse what a strategy cannot do with a model and its tasks, before any work is done."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta._checks import counted, kind_of, name_of
from varmeta.guides.laplace import Laplace
from varmeta.models.check_rows import rows_meet
from varmeta.models.kinks import kinked
from varmeta.models.model import TaskModel
from varmeta.numerics.arguments import no_tensors
from varmeta.numerics.first_order import Adam, GradientDescent
from varmeta.numerics.linear_solve import LinearSolver
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer
from varmeta.numerics.tree import take
from varmeta.priors.bounds_points import bounds_points
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.inner_rates import NOT_LEARNED, check_inner_rates, learned_rates
from varmeta.strategies.objective import OwnObjective, check_outer
from varmeta.strategies.own_parts import check_rule, no_traits
from varmeta.strategies.problem import Problem
from varmeta.strategies.prototypes import Prototypes, check_classes
from varmeta.strategies.stochastic import Stochastic
from varmeta.strategies.strategy import Strategy, Traits
from varmeta.strategies.unrolled import FirstOrder, Unrolled
from varmeta.tasks import TaskSet
from varmeta.tasks.taskset import no_tasks


def check_kinds(model: object, tasks: object, strategy: object) -> None:
    """Raise TypeError where one of the three is something else."""
    check_model_kind(model)
    if not isinstance(tasks, TaskSet):
        raise TypeError(f"tasks must be a TaskSet, not {no_tasks(tasks)}")
    check_strategy_kind(strategy)


def check_model_kind(model: object) -> None:
    if not isinstance(model, TaskModel):
        more = (
            ": of several models, fit each and compare the scores on tasks that none has seen"
            if isinstance(model, Mapping)
            else ""
        )
        raise TypeError(f"model must be a TaskModel, not {kind_of(model)}{more}")


def check_strategy_kind(strategy: object) -> None:
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be one of vm.Joint(), vm.Implicit(), ..., not {strategy!r}")


def check_strategy(
    strategy: Strategy, problem: Problem, tasks: TaskSet, for_fit: bool = True
) -> Traits:
    """The strategy's traits, if it can be asked for a gradient.

    `for_fit`: if what it asks for has an optimum too.

    Raises TypeError for parts of another kind, ValueError for what does not go together.
    """
    plain = strategy.strategy if isinstance(strategy, Stochastic) else strategy
    _check_parts(plain)
    _check_rates(strategy, problem.model)
    check_outer(strategy.outer)
    if callable(strategy.outer):
        _check_own_outer(strategy.outer, problem, tasks)
    elif strategy.outer != "elbo":
        check_query(strategy, tasks)
    elif for_fit and not len(tasks.support_rows.x):
        others = ", or learn from the query rows by vm.Implicit(outer='query')"
        raise ValueError(
            f"{'the task has' if len(tasks) == 1 else f'none of the {len(tasks)} tasks has'} "
            "support rows, so there is nothing to learn the prior from: give Task(support=(x, y))"
            + ("" if tasks.query_rows.bare(tasks.names) else others)
        )
    if for_fit and strategy.outer == "elbo":
        _check_told(problem.model)
    _check_curvature(plain, problem, tasks)
    traits = strategy.traits(problem)
    if not isinstance(traits, Traits):
        raise no_traits(traits, strategy)
    rule = getattr(plain, "minimizer", None)
    if isinstance(rule, FirstOrderMinimizer) and type(rule) not in (GradientDescent, Adam):
        check_rule(rule, problem, tasks)
    if isinstance(strategy, Prototypes):
        check_classes(tasks)
    _check_alg(strategy, problem, tasks)
    if for_fit:
        # the gradient of Laplace's formula at phi_K can be asked for; a fit would call its value an
        # evidence
        guide = problem.guide
        if strategy.outer == "elbo" and isinstance(guide, Laplace) and not traits.at_minimum:
            raise ValueError(
                f"{type(strategy).__name__} does not end at the mode, but the "
                f"{guide.evidence_name} of this guide is that around the mode, and no evidence "
                f"elsewhere: use vm.Implicit({strategy.guide!r}), or say Traits(at_minimum=True) "
                "of a strategy of your own that does end there"
            )
        _check_precision(strategy, problem, traits, tasks)
    return traits


def _check_parts(strategy: Strategy) -> None:
    """The parts that a strategy may have are objects, not names, and made of plain numbers."""
    no_tensors(strategy)
    minimizer, solver = (
        getattr(strategy, "minimizer", None),
        getattr(strategy, "linear_solver", None),
    )
    if minimizer is not None and not isinstance(minimizer, Minimizer | ClosedForm):
        raise TypeError(
            "minimizer must be one of vm.Adam(), vm.GradientDescent(), vm.NewtonCG() or "
            f"vm.ClosedForm(), not {kind_of(minimizer)}"
        )
    if solver is not None and not isinstance(solver, LinearSolver):
        raise TypeError(
            "linear_solver must be one of vm.CG(), vm.Neumann() or vm.Direct(), not "
            f"{kind_of(solver)}"
        )


def _check_rates(strategy: Strategy, model: TaskModel) -> None:
    """Inner rates by weight belong to weights that there are, and are learned where they can be."""
    plain = strategy.strategy if isinstance(strategy, Stochastic) else strategy
    if getattr(plain, "minimizer", None) is None:
        return
    if learned_rates(plain) is not None and not isinstance(strategy, Unrolled | FirstOrder):
        kind = type(plain).__name__ if plain is strategy else "a StochasticAlg"
        raise ValueError(f"{kind} cannot learn its rates: {NOT_LEARNED}")
    check_inner_rates(plain, model)


def check_query(strategy: Strategy, tasks: TaskSet) -> None:
    missing = tasks.query_rows.bare(tasks.names)
    if missing:
        raise ValueError(
            f"outer={strategy.outer!r} needs query data, but {counted(len(missing), 'task')} of "
            f"{len(tasks)} {'has' if len(missing) == 1 else 'have'} none, {missing[0]!r} first: "
            + (
                "a task of one row has none to split off; leave such tasks out, tasks.with_query()"
                if len(missing) < len(tasks)
                else "give query=(x, y), or split the support with tasks.split(...)"
            )
        )


def _check_told(model: TaskModel) -> None:
    """Refuse what is learned from query rows alone where the objective has none."""
    likelihood = model.likelihood
    names = likelihood.only_by_query if likelihood is not None else ()
    if names:
        raise ValueError(
            f"outer='elbo' is the regression of the support's targets, which says nothing of "
            f"{names[0]!r} of {type(likelihood).__name__}: learn it from query rows, as by "
            "vm.Implicit('delta', outer='query', minimizer=vm.ClosedForm()), or give it, "
            "temperature=..., learn_temperature=False"
        )


def _check_own_outer(outer: OwnObjective, problem: Problem, tasks: TaskSet) -> None:
    """Run it on two tasks of unlike lengths: it must give one loss each, of each task alone."""
    lengths = tasks.support_rows.counts + tasks.query_rows.counts
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    pair = tasks[[longest, shortest] if longest != shortest else [0]].batch()
    eta = problem.model.init(pair.support.like)
    phi = problem.start(pair, eta)
    losses = problem.losses(outer, pair, 0)(phi, eta)
    if not isinstance(losses, Tensor) or losses.shape != (len(pair),):
        came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else kind_of(losses)
        raise ValueError(
            f"the outer objective {name_of(outer)!r} must return one loss per task, of "
            f"{counted(len(pair), 'task')} shape ({len(pair)},), not {came}: sum over "
            "everything but the task axis"
        )
    alone = tasks[[shortest]].batch()
    one = problem.losses(outer, alone, 0)(take(phi, slice(len(pair) - 1, None)), eta)
    if not torch.allclose(losses[-1:], one, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise ValueError(
            f"the outer objective {name_of(outer)!r} gives task {alone.names[0]!r} "
            f"{float(one):.6g} nats alone and {float(losses[-1]):.6g} beside {pair.names[0]!r}: "
            "leave out rows where data.mask is False (padding), and let no task's loss depend on "
            "another task"
        )


def _check_curvature(strategy: Strategy, problem: Problem, tasks: TaskSet) -> None:
    """Refuse a likelihood with kinks where its second derivative is what the answer is made of."""
    minimizer = getattr(strategy, "minimizer", None)
    by_newton = minimizer is not None and not isinstance(minimizer, FirstOrderMinimizer)
    if not (by_newton or hasattr(strategy, "linear_solver")):
        return
    model = problem.model
    if model.is_linear_gaussian:
        return
    batch = tasks.batch()
    density = kinked(model, batch, model.init(batch.support.like))
    if density is not None:
        raise ValueError(
            f"the density of y, {density}, has a kink, whose curvature no second derivative sees: "
            f"{strategy.describe()} would rest on a curvature that is not there.  Use "
            "vm.Joint('normal') or vm.Joint('multivariate_normal'), whose steps are then Adam's, "
            "or a smooth density with heavy tails, such as likelihoods.StudentT()"
        )


def _check_alg(strategy: Strategy, problem: Problem, tasks: TaskSet) -> None:
    """Refuse minibatches of rows where the rows of a task are no separate observations."""
    if not isinstance(strategy, Stochastic) or strategy.alg.batch_size is None:
        return
    where = rows_meet(problem.model, tasks.batch().support, reorder=True)
    if where is not None:
        raise ValueError(
            f"{where}: a row's result depends on the task's other rows or on their order, so that "
            "a minibatch of them is another problem: leave out the StochasticAlg's batch_size"
        )


def _check_precision(strategy: Strategy, problem: Problem, traits: Traits, tasks: TaskSet) -> None:
    """Refuse a learned precision under points whose objective has no optimum in it, or passes no
    derivative to it.
    """
    model, prior = problem.model, problem.model.prior
    if prior.learn_precision is None or not problem.is_point(tasks):
        return
    if strategy.outer not in ("elbo", "query_elbo"):
        # the user's own is taken for what it can be: an objective that has an optimum
        if not traits.moves_precision:
            raise ValueError(
                f"{type(strategy).__name__} with a delta guide passes no derivative to the "
                "precision: fix it (learn_precision=None), or use Implicit or Unrolled"
            )
        return
    if bounds_points(prior, model.weights, len(tasks)):
        return
    if prior.learn_precision == "low_rank":
        raise ValueError(
            "a delta guide cannot learn a low-rank prior from this objective, which falls without "
            "bound as all weights meet theta0 and their correlations near 1, whatever is believed "
            "of their sds.  Two ways out: a Gaussian guide (guide='normal' or "
            "'multivariate_normal'), or a query objective (Implicit or Unrolled with "
            "outer='query' or 'query_predictive')"
        )
    if prior.hyperprior is not None or prior.scale_hyperprior is not None:
        raise ValueError(
            "the hyperprior does not bound the precision under a delta guide: its density falls "
            "too slowly, so that all weights under one precision, of all tasks, still gain from "
            "meeting theta0.  Take one with an exponential tail, such as a Gamma, for every "
            "learned precision (with learn_precision='full' also an lkj above 1 + tasks / 2), or a "
            "Gaussian guide"
        )
    raise ValueError(
        "a delta guide cannot learn the precision from this objective, which falls without bound "
        "as the precision grows and all weights meet theta0.  Three ways out: a Gaussian guide "
        "(guide='normal' or 'multivariate_normal'), a hyperprior on the precision "
        "(GaussianPrior(hyperprior=...)), or a query objective (Implicit or Unrolled with "
        "outer='query' or 'query_predictive')"
    )
