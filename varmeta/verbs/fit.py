"""`fit`: learn the prior from tasks."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from functools import partial
from os import PathLike

import torch

from varmeta._checks import positive_number, whole_number
from varmeta.fitting import chunks
from varmeta.fitting.blame import drowning_at_start
from varmeta.fitting.callback import Callback, CallbackError
from varmeta.fitting.compiled_step import Compile, check_compile
from varmeta.fitting.descent import Descent, OptimizerFactory, adam, descend, lbfgs, lbfgs_applies
from varmeta.fitting.ensemble import close, first_run, members_of, reopened
from varmeta.fitting.evidence_newton import evidence_newton, evidence_newton_applies
from varmeta.fitting.joint_newton import newton, newton_applies
from varmeta.fitting.optimizer import check_factory
from varmeta.fitting.pooled_start import is_regression, pooled_start
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.profiled_newton import profiled, profiled_newton
from varmeta.fitting.run import Run
from varmeta.fitting.schedule import (
    Decay,
    ScheduleName,
    SchedulerFactory,
    decay_of,
    label,
    scheduler_of,
)
from varmeta.fitting.shard import check_group
from varmeta.fitting.validation import Validation
from varmeta.graphs.capture import seconds_compiling
from varmeta.group.processes import Processes, check_processes
from varmeta.guides.convex import LOG_CONCAVE
from varmeta.guides.make import default_guide
from varmeta.hyper.bounds import check_support
from varmeta.hyper.integrate import check_hyperguide, integrate
from varmeta.models.check import check_model, ways_left_unsaid
from varmeta.models.hyper_posterior import Hyperguide, HyperPosterior
from varmeta.models.kinks import kinked
from varmeta.models.model import TaskModel
from varmeta.models.responses import said_of_units
from varmeta.numerics.arguments import positive
from varmeta.numerics.quadrature import EVIDENCE
from varmeta.results.checkpoints import Checkpoints
from varmeta.results.doubts import doubts
from varmeta.results.result import Fit, profiled_of
from varmeta.results.resume import run_to_resume
from varmeta.strategies.check import check_model_kind, check_strategy, check_strategy_kind
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.inner_rates import initial_eta, without_rates
from varmeta.strategies.joint import Joint
from varmeta.strategies.members import Members
from varmeta.strategies.own_parts import no_state
from varmeta.strategies.problem import Problem
from varmeta.strategies.prototypes import Prototypes
from varmeta.strategies.strategy import Eta, State, Strategy
from varmeta.tasks import Batch, TaskSet
from varmeta.tasks.source import OfSet
from varmeta.tasks.stream import Stream, Streamed, stream_of
from varmeta.verbs.checkpoint import Saving, settings_of
from varmeta.verbs.progress import progress_bar
from varmeta.verbs.stream import check_stream
from varmeta.verbs.together import agree, begin_together
from varmeta.verbs.validation import validation_of, watching


def fit(
    model: TaskModel,
    tasks: TaskSet | Stream,
    strategy: Strategy | None = None,
    num_steps: int | None = None,
    optimizer: OptimizerFactory | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    *,
    hyperguide: Hyperguide | None = None,
    schedule: ScheduleName | Decay | SchedulerFactory = "cosine",
    clip: float | None = None,
    budget: float | None = None,
    compile: Compile = "auto",
    task_chunk_size: int | None = None,
    processes: Processes | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
    resume: Fit | str | PathLike[str] | None = None,
    checkpoint: Checkpoints | str | PathLike[str] | None = None,
    validate: TaskSet | Validation | None = None,
    ensemble: int | None = None,
    device: torch.device | str | None = None,
) -> Fit:
    """Learn eta (theta0, precisions, noise scales, shared parameters) from tasks.

    model, strategy: what is fitted, and how; by default as `resume`, or by
        `Implicit("quadrature")` for a linear predictor with up to three weights per task under a
        log-concave likelihood that is not Gaussian, without optimizer, batch size or budget;
        `Joint("multivariate_normal")` for up to 20 weights per task, a dense prior
        (`learn_precision="full"`) or a hyperguide; else `Joint("normal")`.
    tasks: a `TaskSet`; or a stream, whose tasks are used once and forgotten: a function `(step,
        generator)` that gives a step's tasks, what gives a task for a number (`vm.episodes`, a
        torch Dataset of tasks), a generator or a DataLoader with `collate_fn=list`.  See
        docs/streams.md.
    num_steps: outer steps at most.  By default 200 for Newton and quasi-Newton steps, 2,000 for the
        others.
    optimizer: a factory `params -> torch.optim.Optimizer` for eta.  By default: joint Newton on
        (phi, eta) for `Joint` and `Reinit` on small models whose expectations are free of noise,
        Newton on eta for the evidence by quadrature of a linear predictor;
        L-BFGS for `Implicit` and `Unrolled` with few meta-parameters; else, and where the
        likelihood has kinks (a Laplace density) or a minibatch or a budget is given, Adam at 1e-2.
        Small models then start from the pooled fit; with kinks, a minibatch or an optimizer of your
        own from where the model starts.
    batch_size: tasks per step (None: all); minibatches are drawn without replacement, by (seed,
        step).  Of a stream that gives one task at a time it is needed.
    hyperguide: what is found of eta: "delta", its best point (or what `resume` had); "normal" and
        "multivariate_normal", its posterior, by a Gaussian and importance weights (`Fit.hyper`,
        `Fit.hyperparameters()`), which then flows into `posterior`, `adapt` and `predict`; "reml",
        theta0 and the shared parameters integrated out, the variances at their best point, lme4's
        REML.  For small models and `Joint` with a Gaussian guide; see docs/hyper-posterior.md.
    schedule: a factor on the optimizer's learning rate: "cosine" (falls to zero over num_steps or
        the budget), "constant" (1), or a function of the fraction of the way, from 0 at the first
        step towards 1; or a scheduler of torch's instead, `functools.partial(StepLR,
        step_size=100)`, stepped after each outer step.  One that is made in the optimizer's factory
        and stepped in `callback` keeps its effect: both factors multiply.  The default L-BFGS
        ignores factors.
    clip: the largest norm of the gradient in eta, over all of it: longer ones are scaled down.
    budget: gradient evaluations per task, counted alike for every strategy; ends the run when
        spent.
    compile: capture each step as one graph and compile it: "auto" where eager steps would take four
        times what compiling does, True at once (10 to 90 seconds), False never.  Joint Newton steps
        are never compiled.  What cannot be captured runs eagerly, which the log says once.
    task_chunk_size: how many tasks of a step are worked on at a time, which bounds memory and
        changes nothing but rounding.  None: all that fit into about a gigabyte; compiled, what
        stays in cache.  Joint Newton steps take all.
    processes: those that share the work, `with vm.processes() as group:`; all of them make this
        call.  Each takes its part of every step's tasks and gets the whole fit; the first alone
        warns, calls `callback` and writes checkpoints.  See docs/many-processes.md.
    progress: a progress bar; None shows one on a terminal only.
    callback: called after every step with a dict of its numbers that has eta too: `row["loss"]`,
        `row.eta`.  `vm.StopFit` raised there ends the run; any other exception comes out of `fit`
        with what was learned by then as its `.fit`.
    resume: a `Fit` of the same model, tasks, strategy and seed to go on from, or where one is: a
        folder of checkpoints, of which the last is taken, or a file.  `num_steps` counts from its
        first step.
    checkpoint: a folder, or `vm.Checkpoints(folder, ...)`, into which it is written every so often
        where the fit stands: a run that is cut short goes on with `resume=folder`.  With both, the
        run begins where the folder is empty.  SIGTERM then ends the fit with all of it written, and
        the process, unless it is handled otherwise.  See docs/long-runs.md.
    validate: held-out tasks with query data, or `vm.Validation(tasks, ...)`.  Every 50 steps of an
        optimiser (by default Adam) they are adapted and scored, and the state that predicts them
        best is what is returned; 10 looks without a better one end the run.  For networks, which
        fit few rows too well.  `Fit.history` has the curve, `Fit.stop` the step.
    ensemble: how many members to learn, for a network whose last layer is in closed form: the first
        starts where the model does, each other at layers drawn anew, and all take their steps in
        one descent.  `adapt` and `predict` then mix them with equal weights: a posterior of eta
        where a point of it fits few rows too well.
    device: where the tasks are moved, a stream's step by step, and all is computed ("cuda"); None:
        where the tasks are.

    Ctrl-C ends the run early and returns what has been learned; `.stop` says why a run ended.
    SIGTERM is left to the process: see `sigterm_ends_fit`.

    Raises ValueError or TypeError, before any work, for input that does not fit together, and
    OSError for a folder that cannot be written or read.

    >>> import varmeta as vm
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(torch.nn.Linear(1, 1), vm.likelihoods.Gaussian(), prior)
    >>> result = vm.fit(model, vm.datasets.lines(20, num_support=5, noise=0.1))
    >>> result.converged
    True
    """
    # a budget is spent step by step, so solvers whose steps are large and of unequal cost do not
    # serve it
    validation = None if validate is None else validation_of(validate)
    given = optimizer, batch_size, budget, validation, ensemble, clip, scheduler_of(schedule)
    free = all(one is None for one in given) and isinstance(tasks, TaskSet)
    saving, resume = _saving(checkpoint, resume, model, strategy, processes)
    strategy, hyperguide = _defaults(model, strategy, hyperguide, resume, free)
    _check_arguments(model, strategy, num_steps, optimizer, batch_size, budget, resume, seed, clip)
    decay = decay_of(schedule)
    work = compile, task_chunk_size, processes
    tasks, stream = _placed(tasks, batch_size, seed, resume, device, processes)
    eta = initial_eta(strategy, model, tasks.support_rows.x.new_zeros((), dtype=tasks.dtype))
    problem = _checked_problem(model, tasks, strategy, eta, seed, hyperguide, free, *work)
    if stream is not None:
        tasks = check_stream(stream, strategy, problem, ensemble)
    members = None if ensemble is None else members_of(strategy, problem, ensemble)
    # a likelihood whose curvature no second derivative sees is descended by Adam, from where the
    # model starts
    smooth = model.is_linear_gaussian or kinked(model, tasks.batch(), eta) is None
    exact = profiled(strategy, problem, tasks, eta) if free and hyperguide == "delta" else None
    way = "profiled" if exact else _way(strategy, problem, tasks, eta, hyperguide, free and smooth)
    # in raw units Adam would otherwise spend a budget on the way to the data
    pooled = smooth and optimizer is None and batch_size is None and stream is None
    if resume is None:
        run = _start(members or strategy, problem, tasks, eta, way, pooled)
    else:
        run = reopened(run_to_resume(resume, model, tasks, strategy, seed, stream), members)
    if processes is not None:
        callback, progress = begin_together(processes, run, callback, progress)
    few = 2000 if way == "steps" else 200
    steps = num_steps if num_steps is not None else None if budget is not None else few
    _check_steps(run, steps, decay, resume is not None and run.schedule == label(schedule))
    begun = partial(Fit, model, tasks, strategy, seed, run, problem)
    if saving is not None:
        saving.begin(begun(), settings_of(
            stream, validation, num_steps=steps, budget=budget, batch_size=batch_size,
            schedule=label(schedule), clip=clip, ensemble=ensemble, hyperguide=hyperguide,
        ))  # fmt: skip
    compiled, kept = seconds_compiling(), nullcontext() if saving is None else saving
    looks = nullcontext() if validation is None else watching(validation, begun(), members)
    with kept, progress_bar(progress, steps or few, callback) as report, looks as watch:
        if way in ("steps", "lbfgs"):
            own = task_chunk_size, scheduler_of(schedule), clip
            plan = _plan(way, optimizer, steps, budget, schedule, compile, own)
            run.schedule = None if way == "lbfgs" else label(schedule)
            source, others = stream or OfSet(tasks, batch_size, seed), (saving, processes)
            descend(problem, members or strategy, source, run, plan, report, watch, *others)
        else:
            how = hyperguide, steps or few, report, exact, saving, processes
            _solve(way, problem, strategy, tasks, run, *how)
    if members is not None:
        close(run, members, problem, tasks)
    run.seconds_compiling = seconds_compiling() - compiled
    result = begun(exact)
    if run.failure is not None:
        raise _with_fit(run.failure, result)
    judged = result if stream is None else Fit(model, stream.now, strategy, seed, run, problem)
    for sentence in _doubts(judged, num_steps, budget, validation):
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)
    return result


def _saving(
    checkpoint: Checkpoints | str | PathLike[str] | None,
    resume: Fit | str | PathLike[str] | None,
    model: TaskModel,
    strategy: Strategy | None,
    processes: Processes | None,
) -> tuple[Saving | None, Fit | None]:
    """Who reads and writes checkpoints, where any are, and the fit to go on from."""
    if processes is not None:
        check_processes(processes)
    if checkpoint is None and not isinstance(resume, (str, PathLike)):
        return None, resume
    writes = processes is None or processes.is_first
    saving = Saving(checkpoint, resume, model, strategy, writes)
    return saving, saving.resume


def _placed(
    tasks: TaskSet | Stream,
    batch_size: int | None,
    seed: int,
    resume: Fit | None,
    device: torch.device | str | None,
    processes: Processes | None,
) -> tuple[TaskSet, Streamed | None]:
    """The tasks on their device, a stream's first ones, and the stream where they are that."""
    found = None if resume is None else resume.run.checkpoint
    if isinstance(tasks, TaskSet):
        stream, placed = None, tasks if device is None else tasks.to(device=device)
    else:
        # a DataLoader that shuffles draws its order from torch's own generator
        if found is not None:
            torch.set_rng_state(found.begun)
        if processes is not None and processes.size > 1:
            torch.set_rng_state(processes.all(torch.get_rng_state())[0])
        stream = stream_of(
            tasks, batch_size, seed, 0 if resume is None else resume.run.step, device
        )
        placed = stream.tasks
    if found is not None:
        torch.set_rng_state(found.random)
    return placed, stream


def _plan(
    way: str,
    optimizer: OptimizerFactory | None,
    steps: int | None,
    budget: float | None,
    schedule: ScheduleName | Decay | SchedulerFactory,
    compile: Compile,
    own: tuple[int | None, SchedulerFactory | None, float | None],
) -> Descent:
    """own: what is handed on as it came."""
    if way == "lbfgs":
        return Descent(lbfgs, steps, budget, decay_of("constant"), compile, *own)
    return Descent(optimizer or adam, steps, budget, decay_of(schedule), compile, *own)


def _solve(
    way: str,
    problem: Problem,
    strategy: Strategy,
    tasks: TaskSet,
    run: Run,
    hyperguide: Hyperguide,
    most: int,
    report: Callback | None,
    exact: ProfiledEvidence | None,
    saving: Saving | None,
    processes: Processes | None,
) -> None:
    """By the solvers that look at all tasks at once."""
    if saving is not None:
        if saving.is_done(run, most):
            return
        # a posterior of eta is found whole or not at all
        report = report if way == "hyperguide" else saving.reporting(report)
    if exact is not None:
        profiled_newton(exact, tasks, run, most, report)
    elif way == "hyperguide":
        run.schedule = None
        own = hyperguide, most - run.step, problem.seed, report
        try:
            integrate(problem, strategy, tasks.batch(), tasks, run, *own)
        except CallbackError as error:  # all or nothing
            raise error.__cause__ or error from None
    elif way == "evidence":
        evidence_newton(problem, strategy, tasks.batch(), run, most, report)
    else:
        newton(problem, strategy, tasks.batch(), run, most, report)
    if processes is not None:
        agree(processes, run)
    if saving is not None:
        saving.last()


def _with_fit(error: Exception, fit: Fit) -> Exception:
    """What a callback, a source or a step raised, with what was learned by then as its `fit`."""
    error.fit = fit  # type: ignore[attr-defined]
    error.add_note(
        f"The fit was {fit.stop.partition(':')[0]}.  What was learned by then is this exception's "
        ".fit: save it, or go on with fit(..., resume=error.fit)."
    )
    return error


def _checked_problem(
    model: TaskModel,
    tasks: TaskSet,
    strategy: Strategy,
    eta: Eta,
    seed: int,
    hyperguide: Hyperguide,
    free: bool,
    compile: Compile,
    task_chunk_size: int | None,
    processes: Processes | None,
) -> Problem:
    """What is to be solved; raises where model, tasks and strategy do not go together."""
    check_compile(compile)
    check_model(model, tasks, eta)
    problem = strategy.problem(model, tasks, seed)
    check_strategy(strategy, problem, tasks)
    check_hyperguide(hyperguide, problem, tasks, strategy, free)
    if task_chunk_size is not None:
        chunks.check(task_chunk_size, problem)
    if processes is not None:
        check_group(processes, problem)
    # prototypes give a class without rows no probability
    ways = None if isinstance(strategy, Prototypes) else ways_left_unsaid(model, tasks)
    for sentence in (*said_of_units(model, tasks), ways):
        if sentence is not None:
            warnings.warn(sentence, RuntimeWarning, stacklevel=3)
    return problem


def _way(
    strategy: Strategy,
    problem: Problem,
    tasks: TaskSet,
    eta: Eta,
    hyperguide: Hyperguide,
    free: bool,
) -> str:
    """The solver: "hyperguide", "evidence", "newton", "lbfgs", or "steps" of an optimiser."""
    if hyperguide != "delta":
        return "hyperguide"
    if free and evidence_newton_applies(strategy, problem, eta):
        return "evidence"
    if free and newton_applies(strategy, problem, tasks.batch(), eta):
        return "newton"
    return "lbfgs" if free and lbfgs_applies(strategy, problem, eta) else "steps"


def _start(
    strategy: Strategy, problem: Problem, tasks: TaskSet, eta: Eta, way: str, pooled: bool
) -> Run:
    """The run before its first step; a regression at the fit to all tasks at once, if `pooled`."""
    if way == "profiled":
        check_support(problem.model, eta)
        return Run(eta, State())
    if isinstance(strategy, Members):
        return first_run(strategy, problem, tasks)
    whole = tasks.batch()
    if pooled and is_regression(problem.model, tasks, eta):
        eta = eta | pooled_start(problem, whole, without_rates(strategy, problem.model, eta))
        if way == "lbfgs" and problem.guide.at_mode:
            eta = _dense_start(problem.model, tasks, whole, eta, problem.seed)
    if way != "hyperguide":
        check_support(problem.model, eta)
    state = strategy.init(problem, whole, eta)
    if not isinstance(state, State):
        raise no_state(state, strategy)
    return Run(eta, state)


def _check_steps(run: Run, steps: int | None, decay: Decay, same_schedule: bool) -> None:
    """Refuse steps that a resumed run has taken already; warn where its step size starts anew."""
    if steps is None:
        return
    # of a checkpoint's run the end may be all that is left
    if run.step >= steps + (run.checkpoint is not None):
        raise ValueError(
            f"resume has taken {run.step} steps already: num_steps={steps} counts from its first, "
            "so give more"
        )
    if not same_schedule:
        return
    if run.checkpoint is not None:
        was = run.checkpoint.settings["num_steps"]
        if was is not None and decay(run.step / was) != decay(run.step / steps):
            warnings.warn(
                f"the run that is resumed was to end after {was} steps, by which its step size "
                f"falls, and now ends after {steps}: it is not one that was never cut short, as "
                "under schedule='constant'",
                RuntimeWarning,
                stacklevel=3,
            )
    elif run.stop.startswith("stopped") and decay(run.step / steps) > decay(1.0):
        low = "to zero" if decay(1.0) == 0 else f"to {decay(1.0):.2g} of its full size"
        warnings.warn(
            f"the step size of the run that is resumed had fallen {low} by its last step, "
            f"{run.step}, and now starts high again: schedule='constant', or an interrupted "
            "longer run, goes on as if it had never stopped",
            RuntimeWarning,
            stacklevel=3,
        )


def _doubts(
    result: Fit, num_steps: int | None, budget: float | None, validation: Validation | None
) -> list[str]:
    """What to warn of; given are what its user said of where the run ends."""
    run = result.run
    # where the user says when to stop, that it came before convergence is no surprise
    reached = num_steps is not None and run.step >= num_steps
    reached = reached or (budget is not None and run.evaluations >= budget)
    reached = reached or validation is not None
    interrupted = run.stop.startswith(("interrupted", "ended by the", "the source of tasks"))
    # where an interruption came before the first step, nothing was learned that one could doubt
    found = [] if interrupted and not run.step else doubts(result, own_end=reached or interrupted)
    if run.outlier is None and run.streamed is None and profiled_of(result) is None:
        run.outlier = drowning_at_start(
            result.strategy, result.problem, result.tasks.batch(), run.loss
        )
    return [*([run.outlier] if run.outlier else []), *found]


def _defaults(
    model: object,
    strategy: Strategy | None,
    hyperguide: Hyperguide | None,
    resume: object,
    free: bool,
) -> tuple[Strategy, Hyperguide]:
    """What the user left open: as in the fit that is resumed, else as suits the model."""
    known = resume if isinstance(resume, Fit) else None
    if strategy is None:
        strategy = known.strategy if known else _default_strategy(model, hyperguide, free)
    if hyperguide is None:
        hyper = known.hyper if known else None
        hyperguide = hyper.hyperguide if isinstance(hyper, HyperPosterior) else "delta"
    return strategy, hyperguide


def _default_strategy(model: object, hyperguide: Hyperguide | None, free: bool) -> Strategy:
    if not isinstance(model, TaskModel):  # about to be refused
        return Joint()
    # few weights, and a posterior of one mode that is not Gaussian: the evidence itself; a
    # Gaussian's bound may be far from it
    few = model.weights.size in EVIDENCE and model.is_linear and not model.is_linear_gaussian
    if few and type(model.likelihood) in LOG_CONCAVE and free and hyperguide in (None, "delta"):
        return Implicit("quadrature")
    return Joint(
        "multivariate_normal" if hyperguide not in (None, "delta") else default_guide(model)
    )


def _dense_start(model: TaskModel, tasks: TaskSet, whole: Batch, eta: Eta, seed: int) -> Eta:
    """eta where the bound of a dense guide is best; as it came where that is not found.

    On Laplace's evidence L-BFGS can overshoot to the edge of the covariances (an sd of 0), where
    all is flat; joint Newton steps on the bound come back from there, and its optimum is near.
    """
    dense = Joint("multivariate_normal")
    problem = dense.problem(model, tasks, seed)
    if not newton_applies(dense, problem, whole, eta):
        return eta
    run = Run(eta, dense.init(problem, whole, eta))
    newton(problem, dense, whole, run, 100, None)
    if run.stop.startswith("interrupted"):
        raise KeyboardInterrupt
    if not math.isfinite(run.loss):
        return eta
    return run.eta | model.prior.inside(model.weights, run.eta)


def _check_arguments(
    model: object, strategy: object, num_steps: int | None, optimizer: object,
    batch_size: int | None, budget: float | None, resume: object, seed: int, clip: float | None,
) -> None:  # fmt: skip
    check_model_kind(model)
    check_strategy_kind(strategy)
    if optimizer is not None:
        check_factory(optimizer)
    if resume is not None and not isinstance(resume, Fit):
        raise TypeError(
            f"resume must be a Fit or a path, not {type(resume).__name__}: a folder of checkpoints "
            "or a file of Fit.save"
        )
    whole_number("seed", seed, 0)
    for name, number in (("num_steps", num_steps), ("batch_size", batch_size)):
        if number is not None:
            whole_number(name, number)
    if budget is not None:
        positive_number("budget", budget)
    if clip is not None:
        positive("clip", clip)
