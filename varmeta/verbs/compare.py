"""`compare`: several strategies on the same tasks, seeds and budget, beside baselines that pool
everything or nothing.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn

from varmeta._checks import positive_number, probability, whole_number
from varmeta.fitting.baselines import BASELINES, Pooled, baseline
from varmeta.fitting.compiled_step import check_compile
from varmeta.fitting.descent import OptimizerFactory
from varmeta.fitting.joint_newton import newton_applies
from varmeta.fitting.pooled_start import is_regression
from varmeta.hyper.integrate import check_hyperguide
from varmeta.models.check import check_model
from varmeta.models.kinks import kinked
from varmeta.models.model import TaskModel
from varmeta.results.result import Fit
from varmeta.strategies.check import check_kinds, check_strategy
from varmeta.strategies.strategy import Strategy
from varmeta.tasks import TaskSet
from varmeta.verbs.fit import fit
from varmeta.verbs.report import Report


def compare(
    strategies: Mapping[str, Strategy],
    model: TaskModel,
    train: TaskSet,
    test: TaskSet,
    seeds: int | list[int] = 5,
    *,
    models: Mapping[str, TaskModel] | None = None,
    hyperguide: str | Mapping[str, str] | None = None,
    budget: float = 2000,
    optimizer: OptimizerFactory | None = None,
    batch_size: int | None = None,
    baselines: bool = True,
    num_samples: int = 500,
    level: float = 0.9,
    compile: str | bool = "auto",
    progress: bool | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Fit every strategy on `train`, adapt to each task of `test` from its support data, score on
    its query data.

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
        first step that spends it; the table says by how much a method overspent, as one to
        tolerance may in a single step.
    optimizer, batch_size: as in `fit`, and the same for every strategy; Adam at 1e-2 by default.
        Without them a regression starts from the pooled fit, and what `fit` solves by joint Newton
        steps is solved so here: once for all seeds, outside the budget, which the report says.
    compile: as in `fit`, judged for each run by itself.
    baselines: add "pooled" (one set of weights for all tasks) and "no pooling" (a posterior of each
        task on its own, with the guide that `fit` takes by default, under a prior that weighs a
        hundredth of one observation, so that tasks share next to nothing but the noise scale; for a
        network, a hundredth of the model's own precision).

    progress: a progress bar; None shows one on a terminal only.
    callback: called after each run with its row of the report's `runs`, a dict.

    A strategy that fails is kept in the report with its reason; it does not stop the others.  What
    the fits warn about stands in the report's `runs`.  Ctrl-C ends the comparison and returns, with
    a warning, what is complete: the seeds with which every method has run, or before the first of
    them the methods that have.

    Raises ValueError where the test tasks have no query data, a strategy does not fit the tasks, or
    has no posterior of eta to find; TypeError for arguments of the wrong kind; RuntimeError where
    every run failed.

    >>> import varmeta as vm
    >>> train, test = vm.datasets.lines(12, 5, noise=0.1), vm.datasets.lines(4, 3, 3, seed=1, noise=0.1)
    >>> prior = vm.GaussianPrior(learn_precision="per_parameter")
    >>> model = vm.TaskModel(nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior)
    >>> both = {"eta a point": vm.Joint("multivariate_normal"), "posterior of eta": vm.Joint("multivariate_normal")}
    >>> chosen = {"posterior of eta": "multivariate_normal"}
    >>> report = compare(both, model, train, test, 1, hyperguide=chosen, budget=50, baselines=False, compile=False)
    >>> report.runs["hyperguide"].tolist()
    ['delta', 'multivariate_normal']
    """
    import pandas as pd
    from tqdm.auto import tqdm

    seed_list = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    chosen = {name: (models or {}).get(name, model) for name in (*strategies, *BASELINES)}
    _check(strategies, chosen, train, test, seed_list, level)
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
    methods = [*strategies, *(BASELINES if baselines else ())]
    scores, runs, fits = [], [], {}
    solved: dict[str, tuple[Fit, float]] = {}
    free = optimizer is None and batch_size is None
    jobs = [(seed, name) for seed in seed_list for name in methods]
    try:
        for seed, name in tqdm(
            jobs, disable=None if progress is None else not progress, leave=False
        ):
            started, integrated = _initialised(chosen[name], seed), hyperguides.get(name, "delta")
            begin = perf_counter()
            failed, reason, seconds, said, solver = 0, "", float("nan"), list[str](), "budget"
            try:
                with _collected(said):
                    own, strategy, rows = _parts(name, strategies, started, train)
                    if integrated != "delta":
                        solver = "posterior of eta"
                        result = fit(
                            own, rows, strategy, seed=seed, hyperguide=integrated, progress=False
                        )
                    elif free and (name in solved or _is_solved(own, strategy, rows, seed)):
                        solver = "exact"
                        if name in solved:
                            result, begin = solved[name][0], perf_counter() - solved[name][1]
                        else:
                            result = fit(
                                own, rows, strategy, seed=seed, compile=compile, progress=False
                            )
                            solved[name] = result, perf_counter() - begin
                    else:
                        result = fit(
                            own,
                            rows,
                            strategy,
                            optimizer=optimizer,
                            batch_size=batch_size,
                            seed=seed,
                            budget=budget,
                            compile=compile,
                            progress=False,
                        )
                    if result.stop.startswith("interrupted"):
                        raise KeyboardInterrupt  # half a run is no result
                    fits[name, seed] = result
                    seconds, reason = perf_counter() - begin, result.stop
                    score = result.adapt(test, compile=compile).score(
                        num_samples=num_samples, seed=seed, level=level
                    )
                by_task = score.iloc[:-1].reset_index()  # without "all"
                scores.append(by_task.assign(method=name, seed=seed))
            except (ArithmeticError, RuntimeError, ValueError) as error:
                failed, reason = 1, f"{type(error).__name__}: {error}"
            known = fits.get((name, seed))
            spent, settled = (
                (float("nan"), False) if known is None else (known.run.evaluations, known.converged)
            )
            runs.append(
                {
                    "method": name,
                    "seed": seed,
                    "hyperguide": integrated,
                    "solver": solver,
                    "evaluations": spent,
                    "seconds": seconds,
                    "failed": failed,
                    "converged": settled,
                    "stop": reason,
                    "warnings": "; ".join(said),
                }
            )
            if callback is not None:
                callback(runs[-1])
    except KeyboardInterrupt:
        if not any(not run["failed"] for run in runs):
            raise
        done = len(runs) // len(methods) * len(methods)  # whole seeds, if anything came of one
        if not any(not run["failed"] for run in runs[:done]):
            done = len(runs)
        kept = {(run["method"], run["seed"]) for run in runs[:done]}
        scores = [part for part in scores if (part["method"].iloc[0], part["seed"].iloc[0]) in kept]
        warnings.warn(
            f"interrupted after {len(runs)} of {len(jobs)} runs: the report holds the first {done}",
            RuntimeWarning,
            stacklevel=2,
        )
        runs, fits = runs[:done], {key: value for key, value in fits.items() if key in kept}
    if not scores:
        raise RuntimeError(f"every strategy failed; the first: {runs[0]['stop']}")
    return Report(
        pd.concat(scores, ignore_index=True), pd.DataFrame(runs), fits, level, float(budget)
    )


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
    clash = set(strategies) & set(BASELINES)
    if clash:
        raise ValueError(
            f"{sorted(clash)} are the names of the baselines: call your strategies otherwise"
        )
    for name, strategy in strategies.items():
        for tasks in (train, test):
            check_kinds(models[name], tasks, strategy)
    bare = [task.name for task in test if task.query is None or not len(task.query[1])]
    if bare:
        raise ValueError(
            f"the test tasks are scored on query data, but {bare[0]!r} has none: use "
            "test.split(...)"
        )
    for name, strategy in strategies.items():
        check_model(models[name], train)
        check_model(models[name], test)
        check_strategy(strategy, strategy.problem(models[name], train, 0), train)


def _hyperguides(
    given: object,
    strategies: Mapping[str, Strategy],
    models: Mapping[str, TaskModel],
    train: TaskSet,
) -> dict[str, str]:
    """What is found of eta by strategy, for those named.  Raises ValueError, naming the strategy
    that cannot.
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
            check_hyperguide(value, models[name], every, strategies[name])
        except (TypeError, ValueError) as error:
            some = "" if isinstance(given, Mapping) else "; give a dict for some strategies only"
            raise type(error)(f"strategy {name!r}: {error}{some}") from error
    return named


def _initialised(model: TaskModel, seed: int) -> TaskModel:
    """The model with its network's layers initialised anew by `seed` (as PyTorch initialises
    them).
    """
    if model.net is None:
        return model
    fresh = copy.copy(model)
    net = copy.deepcopy(model.net).cpu()  # one generator, whatever the device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            # frozen statistics are data, not a start
            if callable(reset) and not isinstance(module, nn.modules.batchnorm._BatchNorm):
                reset()
    # a start that the user gave to the prior stays
    held = {*model.prior.start_loc, *model.weights.fixed}
    new = {
        name: value.detach().clone() for name, value in net.named_parameters() if name not in held
    }
    fresh.start = model.start | new
    return fresh


def _parts(
    name: str, strategies: Mapping[str, Strategy], model: TaskModel, train: TaskSet
) -> tuple[TaskModel, Strategy, TaskSet]:
    """What is fitted to what under this name."""
    if name in strategies:
        strategy = strategies[name]
    else:
        model, strategy = baseline(name, model, train, strategies.values())
    return model, strategy, train.merged() if strategy.outer == "elbo" else train


def _is_solved(model: TaskModel, strategy: Strategy, rows: TaskSet, seed: int) -> bool:
    """Whether `fit` without a budget goes to the optimum from the pooled fit, so that no seed and
    no start matters.
    """
    batch = rows.batch()
    eta = model.init(batch.support.x.new_zeros(()))
    if not is_regression(model, rows, eta) or kinked(model, batch, eta) is not None:
        return False
    problem = strategy.problem(model, rows, seed)
    # the pooled fit is where "pooled" ends
    return isinstance(strategy, Pooled) or newton_applies(strategy, problem, batch, eta)


@contextlib.contextmanager
def _collected(said: list[str]) -> Iterator[None]:
    """Keep what RuntimeWarnings say, each once, instead of showing it between the runs of a
    comparison.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            yield
        finally:
            kept = [item for item in caught if issubclass(item.category, RuntimeWarning)]
            said.extend(dict.fromkeys(str(item.message) for item in kept))
    for item in caught:
        if item not in kept:
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
