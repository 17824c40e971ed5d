"""`compare_models`: fitted models of the same data side by side."""

from __future__ import annotations

from collections.abc import Sequence

from varmeta._checks import counted, kind_of
from varmeta.results.fitted import Fitted, information_criteria, likelihood_ratios
from varmeta.results.left_out_differences import left_out
from varmeta.results.log_likelihood import log_likelihood_of
from varmeta.results.nested import other_fixed_effects
from varmeta.results.result import Fit
from varmeta.results.same_data import other_data
from varmeta.verbs.model_comparison import ModelComparison


def compare_models(
    *fits: Fit,
    names: Sequence[str] | None = None,
    nested: bool = False,
    leave_one_task_out: bool | None = None,
) -> ModelComparison:
    """Log likelihoods, AIC, BIC, likelihood-ratio tests and left-out tasks of fitted models.

    fits: two or more, of the same tasks, to the same rows of y; what predicts them may differ.
        (`compare` is for several strategies of one model.)
    names: what the table calls them, in their order; by default "model 1", "model 2", ...
    nested: whether each model with fewer parameters is a special case of those with more, where
        that cannot be seen by how they are built; True is taken on trust.
    leave_one_task_out: whether `Fit.leave_one_task_out` is taken of each, by `refitted` where all
        have it, else by `left_out`; None: of models whose tasks' evidence has a closed form, others
        need minutes.

    The log likelihood has the tasks' weights integrated out.  AIC and BIC are of exact ones alone;
    the n of BIC is the number of rows, as lme4's, and there is none where a row is several
    observations (trials, responses) or under REML.

    A model is tested against the largest of those with fewer parameters that it contains: of the
    same network and likelihood, with fewer of its columns or coefficients, with a coarser prior
    (equal precisions, no correlations), or with weights shared that vary in the larger.  The test
    is of maxima that are exact.  Where the smaller model sets a variance to 0 twice the difference
    is no chi-squared: for one variance p is that of the half-and-half mixture (halved, where
    nothing else is tested), which holds for many tasks; for more there is none.

    Raises TypeError for what is no fit; ValueError for fewer than two, for names of another number
    or used twice, and for what may not be compared, with the reason: other tasks, rows or
    responses (y transformed or standardised in one), densities beside probabilities, fits that did
    not converge, that integrated over eta, or whose objective is no likelihood or bound of one
    (query objectives, point guides), REML beside ML or with other fixed effects, and
    approximations beside exact values.
    Source: Self and Liang, J. American Statistical Association 82 (1987); Stram and Lee, Biometrics
        50 (1994).

    >>> import varmeta as vm
    >>> frame = vm.datasets.radon(as_frame=True)
    >>> tasks = vm.TaskSet.from_frame(frame, task="county", x=["floor"], y="log_radon")
    >>> def fit(shared):
    ...     prior, noise = vm.GaussianPrior(learn_precision="full"), vm.likelihoods.Gaussian()
    ...     return vm.fit(vm.TaskModel(vm.LinearPredictor(["floor"]), noise, prior, shared), tasks)
    >>> found = vm.compare_models(
    ...     fit(["floor"]), fit([]), names=["one slope", "slopes"], leave_one_task_out=False
    ... )
    >>> found.frame()[["log_likelihood", "AIC", "chi2", "df", "p"]].round(3)
               log_likelihood       AIC   chi2   df      p
    model
    one slope       -1044.853  2097.707    NaN  NaN    NaN
    slopes          -1043.521  2099.043  2.664  2.0  0.183
    """
    fitted = _fitted(fits, names)
    _check_data(fitted)
    _check_criteria(fitted)
    fitted.sort(key=lambda one: one.known.parameters)
    criteria, notes = information_criteria(fitted)
    tests, untested = likelihood_ratios(fitted, nested)
    tasks, missing = left_out(fitted, leave_one_task_out)
    notes = [*notes, *untested, *missing]
    return ModelComparison.of(fitted, criteria, tasks, tests, notes)


def _fitted(fits: tuple[object, ...], names: Sequence[str] | None) -> list[Fitted]:
    """Raises TypeError or ValueError, naming the fit that may not be compared."""
    for fit in fits:
        if not isinstance(fit, Fit):
            raise TypeError(
                "compare_models takes fits, one by one, as in compare_models(first, second), not "
                f"{kind_of(fit)}"
            )
    if len(fits) < 2:
        raise ValueError(
            f"compare_models takes two fits or more, not {len(fits)}: vm.compare is for strategies "
            "of one model"
        )
    if isinstance(names, str):
        raise TypeError(f"names must be a list, one for each fit, not {kind_of(names)}")
    called = [f"model {i + 1}" for i in range(len(fits))] if names is None else [*map(str, names)]
    if len(called) != len(fits) or len(set(called)) < len(called):
        raise ValueError(
            f"names must be as many as the {counted(len(fits), 'fit')}, each another one, not "
            f"{called}"
        )
    found = []
    for name, fit in zip(called, fits, strict=True):
        assert isinstance(fit, Fit)
        try:
            found.append(Fitted(name, fit, log_likelihood_of(fit)))
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be compared: {error}") from error
    return found


def _check_data(fitted: list[Fitted]) -> None:
    """Raise ValueError where two fits are not to the same rows of y."""
    first = fitted[0]
    for one in fitted[1:]:
        why = other_data(first.fit.tasks, one.fit.tasks, (first.name, one.name))
        why = why or _read_otherwise(first.fit, one.fit)
        if why is not None:
            raise ValueError(
                f"{first.name!r} and {one.name!r} are not models of the same data: {why}"
            )


def _read_otherwise(one: Fit, other: Fit) -> str | None:
    """Where the same numbers are other observations to the second likelihood, in words."""
    ours, theirs = one.model.likelihood, other.model.likelihood
    if ours is None or theirs is None:  # of a program nothing is known
        return None
    if (ours.kind == "regression") != (theirs.kind == "regression"):
        return "a density of real numbers stands beside probabilities of counts or classes"
    y = one.tasks.support_rows.y
    if ours.observed(y).shape != theirs.observed(y).shape:
        return f"{ours!r} and {theirs!r} read the columns of y as other things"
    return None


def _check_criteria(fitted: list[Fitted]) -> None:
    """Raise ValueError where log likelihoods are of different kinds."""
    reml = [one for one in fitted if one.known.criterion == "REML"]
    if reml and len(reml) < len(fitted):
        raise ValueError(
            f"{reml[0].name!r} is fitted by REML and others are not, and a restricted likelihood "
            "is of other numbers than y: fit all without hyperguide='reml'"
        )
    for one in reml[1:]:
        why = other_fixed_effects(reml[0].fit, one.fit)
        if why is not None:
            raise ValueError(
                f"{reml[0].name!r} and {one.name!r} are fitted by REML, which compares models of "
                f"the same fixed effects only, and here {why}: fit both without hyperguide='reml'"
            )
    ways = {one.known.by: one.name for one in fitted if not one.known.is_exact}
    exact = [one.name for one in fitted if one.known.is_exact]
    if ways and len(ways) + bool(exact) > 1:
        told = [f"{name!r} by {by}" for by, name in ways.items()]
        told += [f"{exact[0]!r} exactly"] if exact else []
        raise ValueError(
            f"log likelihoods are known in different ways, {', '.join(told)}, and how far off an "
            "approximation lies is not known: fit all alike, or compare left_out of "
            "fit.leave_one_task_out()"
        )
