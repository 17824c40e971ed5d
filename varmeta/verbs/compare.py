"""`compare`: several strategies on the same tasks, seeds and budget, beside baselines."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from varmeta._checks import positive_number, probability, whole_number
from varmeta.fitting.baselines import BASELINES, baselines_of
from varmeta.fitting.compiled_step import Compile, check_compile
from varmeta.fitting.descent import OptimizerFactory
from varmeta.hyper.integrate import check_hyperguide
from varmeta.models.check import check_model
from varmeta.models.hyper_posterior import Hyperguide
from varmeta.models.model import TaskModel
from varmeta.strategies.check import check_kinds, check_strategy
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import TaskSet
from varmeta.verbs.compare_runs import Outcome, Plan
from varmeta.verbs.report import Report


def compare(
    strategies: Mapping[str, Strategy],
    model: TaskModel,
    train: TaskSet,
    test: TaskSet,
    seeds: int | list[int] = 5,
    *,
    models: Mapping[str, TaskModel] | None = None,
    hyperguide: Hyperguide | Mapping[str, Hyperguide] | None = None,
    budget: float = 2000,
    optimizer: OptimizerFactory | None = None,
    batch_size: int | None = None,
    baselines: bool = True,
    num_samples: int = 500,
    level: float = 0.9,
    compile: Compile = "auto",
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Fit each strategy on `train`, adapt to each task of `test`, score on its query data.

    Tasks are adapted to from their support data.

    Every strategy sees every row of the training tasks: with `outer="elbo"` (and in the baselines)
    the query data join the support; the other objectives keep the two apart.

    strategies: by the name that the table shows.
    model: the same start for all; for a network, each seed starts theta0 and shared parameters from
        a new initialisation of its layers, the same for every strategy, except where the prior's
        `loc` says where to start.
    models: another model for some of the strategies, by name: one that learns the precision, say.
    hyperguide: as in `fit`, for all strategies or by name for some: "multivariate_normal", "normal"
        or "reml" find the posterior of eta, which then flows into what is scored.  Such a fit has a
        solver of its own and runs to its end, outside budget, optimizer and batch_size, as the
        report says.  The baselines keep eta a point.
    seeds: how many, or which.
    budget: gradient evaluations per training task for every strategy and the pooled baseline (a
        Hessian product counts as two); adaptation at test time is not counted.  A run ends with the
        first step that spends it; the table says how many outer steps that were, and by how much a
        method overspent, as one to tolerance may in a single step.
    optimizer, batch_size: as in `fit`, and the same for every strategy; Adam at 1e-2 by default.
        Without them a regression starts from the pooled fit, and what `fit` solves by joint Newton
        steps is solved so here: once for all seeds, outside the budget, which the report says.
    compile: as in `fit`, judged for each run by itself.
    baselines: add "pooled" (one set of weights for all tasks) and "no pooling" (a posterior of each
        task on its own, with the guide that `fit` takes by default, under a prior that weighs a
        hundredth of one observation, so that tasks share next to nothing but the noise scale; for a
        network, a hundredth of the model's own precision).  They see no query rows apart, so that
        the temperature and the scale of `LeastSquaresClasses` stay where they start.
        Of classes (`Categorical`, `LeastSquaresClasses`) also "nearest neighbour" (the class of the
        support row nearest in x; nothing is fitted, and it has an error rate only) and, where the
        weights that vary are those of the last linear layer and the training tasks have query rows,
        two heads on the same body, learned from the query rows with the same seeds and budget:
        "prototypes" (`Prototypes()`) and "closed-form head" (`LeastSquaresClasses` with
        `Implicit("delta", "query", minimizer=ClosedForm())`).

    progress: a progress bar; None shows one on a terminal only.
    callback: called after each run with its row of the report's `runs`, a dict.

    A strategy that fails is kept in the report with its reason; it does not stop the others.  What
    the fits warn about stands in the report's `runs`.  Ctrl-C ends the comparison and returns, with
    a warning, what is complete: the seeds with which every method has run, or before the first of
    them the methods that have.

    Raises ValueError where the test tasks have no query data, a strategy does not fit the tasks, or
    has no posterior of eta to find; TypeError for arguments of the wrong kind; RuntimeError where
    every run failed.

    >>> from torch import nn
    >>> import varmeta as vm
    >>> train = vm.datasets.lines(12, 5, noise=0.1)
    >>> test = vm.datasets.lines(4, 3, 3, seed=1, noise=0.1)
    >>> prior = vm.GaussianPrior(learn_precision="per_parameter")
    >>> model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior)
    >>> dense = vm.Joint("multivariate_normal")
    >>> both = {"eta a point": dense, "posterior of eta": dense}
    >>> chosen = {"posterior of eta": "multivariate_normal"}
    >>> options = {"budget": 50, "baselines": False, "compile": False}
    >>> report = compare(both, model, train, test, 1, hyperguide=chosen, **options)
    >>> report.runs["hyperguide"].tolist()
    ['delta', 'multivariate_normal']
    """
    import pandas as pd
    from tqdm.auto import tqdm

    seed_list = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    chosen = {name: (models or {}).get(name, model) for name in strategies}
    _check(strategies, chosen, train, test, seed_list, level)
    rows = baselines_of(model, train) if baselines else ()
    _check_names(strategies, rows)
    chosen |= dict.fromkeys(rows, model)
    hyperguides = _hyperguides(hyperguide, strategies, chosen, train)
    positive_number("budget", budget)
    check_compile(compile)
    whole_number("num_samples", num_samples)
    if batch_size is not None:
        whole_number("batch_size", batch_size)
    stray = set(models or {}) - set(strategies)
    if stray:
        raise ValueError(
            f"models names {sorted(stray)}, but the strategies are {sorted(strategies)}"
        )
    methods = [*strategies, *rows]
    plan = Plan(
        strategies, chosen, hyperguides, train, test, budget, optimizer, batch_size, num_samples,
        level, compile,
    )  # fmt: skip
    jobs = [(name, seed) for seed in seed_list for name in methods]
    done: list[Outcome] = []
    try:
        for name, seed in tqdm(
            jobs, disable=None if progress is None else not progress, leave=False
        ):
            done.append(plan.run(name, seed))
            if callback is not None:
                callback(done[-1].row)
    except KeyboardInterrupt:
        total = len(done)
        done = _complete(done, len(methods))
        warnings.warn(
            f"interrupted after {total} of {len(jobs)} runs: the report holds the first "
            f"{len(done)}",
            RuntimeWarning,
            stacklevel=2,
        )
    scores = [outcome.score for outcome in done if outcome.score is not None]
    if not scores:
        raise RuntimeError(f"every strategy failed; the first: {done[0].row['stop']}")
    fits = {(o.row["method"], o.row["seed"]): o.fit for o in done if o.fit is not None}
    runs = pd.DataFrame([outcome.row for outcome in done])
    return Report(pd.concat(scores, ignore_index=True), runs, fits, level, float(budget))


def _complete(done: list[Outcome], num_methods: int) -> list[Outcome]:
    """What an interrupted comparison keeps.  Raises KeyboardInterrupt where nothing came of it."""

    def came_of(some: list[Outcome]) -> bool:
        return any(not outcome.row["failed"] for outcome in some)

    if not came_of(done):
        raise KeyboardInterrupt
    seeds = done[: len(done) // num_methods * num_methods]  # whole seeds, if anything came of one
    return seeds if came_of(seeds) else done


def _check(
    strategies: object,
    models: Mapping[str, TaskModel],
    train: TaskSet,
    test: TaskSet,
    seeds: list[int],
    level: float,
) -> None:
    if not isinstance(strategies, Mapping) or not strategies:
        raise ValueError("strategies must be a dict of at least one, such as {'joint': vm.Joint()}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a number of at least 1, or different seeds, not {seeds}")
    probability("level", level)
    for name, strategy in strategies.items():
        for tasks in (train, test):
            check_kinds(models[name], tasks, strategy)
    bare = test.query_rows.bare(test.names)
    if bare:
        raise ValueError(
            f"the test tasks are scored on query data, but {bare[0]!r} has none: use "
            "test.split(...)"
        )
    for name, strategy in strategies.items():
        check_model(models[name], train)
        check_model(models[name], test)
        check_strategy(strategy, strategy.problem(models[name], train, 0), train)


def _check_names(strategies: Mapping[str, Strategy], rows: tuple[str, ...]) -> None:
    clash = set(strategies) & {*BASELINES, *rows}
    if clash:
        raise ValueError(
            f"{sorted(clash)} are the names of the baselines: call your strategies otherwise"
        )


def _hyperguides(
    given: object,
    strategies: Mapping[str, Strategy],
    models: Mapping[str, TaskModel],
    train: TaskSet,
) -> dict[str, str]:
    """What is found of eta by strategy, for those named.

    Raises ValueError, naming the strategy that cannot.
    """
    if isinstance(given, Mapping):
        stray = set(given) - set(strategies)
        if stray:
            raise ValueError(
                f"hyperguide names {sorted(stray)}, but the strategies are {sorted(strategies)}"
            )
        named = dict(given)
    else:
        named = {} if given is None else dict.fromkeys(strategies, given)
    every = train.merged()
    for name, value in named.items():
        try:
            strategy = strategies[name]
            problem = strategy.problem(models[name], every, 0)
            check_hyperguide(value, problem, every, strategy, free=True)
        except (TypeError, ValueError) as error:
            some = "" if isinstance(given, Mapping) else "; give a dict for some strategies only"
            raise type(error)(f"strategy {name!r}: {error}{some}") from error
    return named
