"""A mixed model's formula and a table become tasks and their model."""

from __future__ import annotations

import glob
import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from varmeta.likelihoods.base import Likelihood, LocationScale
from varmeta.likelihoods.continuous import Gaussian
from varmeta.likelihoods.weighted import Weighted
from varmeta.models.linear_predictor import LinearPredictor
from varmeta.models.model import TaskModel
from varmeta.models.start import matches
from varmeta.priors.gaussian_prior import GaussianPrior
from varmeta.priors.hyperprior import Hyperprior
from varmeta.tasks import TaskSet
from varmeta.tasks.formula_columns import INTERCEPT, names_in
from varmeta.tasks.formula_design import FormulaDesign, Missing

if TYPE_CHECKING:
    import pandas as pd


class FormulaModel(TaskModel):
    """The `TaskModel` of a formula: `from_formula` makes it.

    design: how a table becomes x and y.
    """

    design: FormulaDesign

    @property
    def formula(self) -> str:
        """The formula, as it was given."""
        return self.design.formula

    def tasks(self, frame: pd.DataFrame, query: str | None = None) -> TaskSet:
        """The tasks of another table through the same design, for `Fit.adapt` and `score`.

        frame: one row per observation; its groups may be new.  Contrasts, knots, means and sds are
            those of the table that the formula was read with.
        query: a column of booleans or 0 and 1 that marks the query rows; None: all are support.

        Raises ValueError for a column that is missing, for missing values (where the formula was
        read with missing="drop" it warns of what it leaves out), and, by name, for a level that was
        not there.

        >>> from varmeta import datasets
        >>> frame = datasets.radon(as_frame=True)
        >>> _, model = from_formula("log_radon ~ floor + (1 | county)", frame[:500])
        >>> model.tasks(frame[500:]).x_names
        ('floor',)
        """
        return self.design.tasks(frame, query)

    def x(self, frame: pd.DataFrame) -> Tensor:
        """x of a table's rows, `(rows, columns)`, float64, for `Posterior.predict`.

        The table needs neither response nor groups.  Raises ValueError as `tasks`, and for a row
        that lacks a value in any case: each has its place.

        >>> from varmeta import datasets
        >>> frame = datasets.radon(as_frame=True)
        >>> _, model = from_formula("log_radon ~ center(floor) + (1 | county)", frame)
        >>> model.x(frame[["floor"]][:2]).round(decimals=3).tolist()
        [[-0.166], [-0.166]]
        """
        return self.design.x(frame)


def from_formula(
    formula: str,
    frame: pd.DataFrame,
    *,
    likelihood: Likelihood | None = None,
    weights: str | None = None,
    query: str | None = None,
    missing: Missing = "refuse",
    loc_hyperprior: Hyperprior = None,
    scale_hyperprior: Hyperprior = None,
    lkj: float = 1.0,
) -> tuple[TaskSet, FormulaModel]:
    """Tasks and model of a mixed model's formula, as lme4 and bambi write it.

    `log_radon ~ floor + (floor | county)`: a task per county, whose intercept and slope vary around
    theta0.  A fixed effect that does not vary is shared; what varies without a fixed effect has a
    theta0 of 0.  So a Gaussian likelihood's fit is lmer's: maximum likelihood, or with
    `hyperguide="reml"` REML.

    formula: fixed effects (numbers; factors, whose first level is the reference; `a:b`, `a*b`;
        `log(x)` and any function that is known where this is called; `center(x)`, `scale(x)`,
        `bs(x, df=4)`, `poly(x, 2)`; `C(x)` for numbers that are levels), `offset(log(t))`, and
        `(1 | g)`, `(x | g)`, `(x || g)`, `(0 + x | g)` of one grouping factor g, or `a:b`.  Terms
        of the same group are independent of each other.  On the left a column, a function of one,
        `proportion(successes, trials)`, or `answer['yes']`.
    frame: one row per observation.  Factors are columns of text or categories, which keep their
        order.
    likelihood: one of `varmeta.likelihoods`; by default `Gaussian()`.
    weights: a column of positive weights.  Of likelihoods with a scale, precisions as in lmer: the
        variance is scale^2 / weight; else a row counts so often, as in glmer.  Where the
        likelihood is a `Weighted` one, what it says.
    query: a column that marks the query rows, as in `TaskSet.from_frame`.
    missing: "refuse" rows that lack a value that is used, or "drop" them with a warning that says
        which groups go with them.
    loc_hyperprior, scale_hyperprior, lkj: as of `GaussianPrior`; names are the formula's.

    Returns the tasks, whose x is `(rows, columns)` in the order of `tasks.x_names` (no column of
    ones), and the model, which makes tasks of other tables: `model.tasks(frame)`.

    Raises ValueError for a formula that cannot be read, for several grouping factors, a factor's
    name that is unknown, collinear fixed effects, and missing values; TypeError for dates.
    Source: Bates, Maechler, Bolker and Walker, J. Stat. Softw. 67 (2015); formulae of the bambi
    project reads the terms.

    >>> from varmeta import datasets
    >>> frame = datasets.radon(as_frame=True)
    >>> tasks, model = from_formula("log_radon ~ floor + (floor | county)", frame)
    >>> len(tasks), tasks.x_names, model.weights.labels
    (85, ('floor',), ('Intercept', 'floor'))
    """
    design = FormulaDesign(formula, frame, _names_of_caller(formula), weights, missing)
    tasks = design.tasks(frame, query)
    for name in design.numbers_as_text:
        warnings.warn(
            f"column {name!r} is text, and so a factor of {frame[name].nunique()} levels, but all "
            f"of them are numbers: pandas.to_numeric(frame[{name!r}]) makes numbers of it",
            RuntimeWarning,
            stacklevel=2,
        )
    net = LinearPredictor(design.columns, INTERCEPT if design.has_intercept else False,
                          design.offsets)  # fmt: skip
    likelihood = Gaussian() if likelihood is None else likelihood
    if weights is not None and not isinstance(likelihood, Weighted):
        likelihood = Weighted(likelihood, precision=isinstance(likelihood, LocationScale))
    called = {INTERCEPT: INTERCEPT, **net.parameter_names}
    known = tuple(name for name, _ in net.named_parameters())
    varying = [called[name] for name in design.varying]
    blocks = [[called[name] for name in block] for block in design.blocks]
    fixed = [called[name] for name in design.fixed]
    own = [] if not isinstance(likelihood, Likelihood) else [*likelihood.task_weights()]
    learned = [name for name in varying if name in fixed]
    dense = any(len(block) > 1 for block in blocks)
    prior = GaussianPrior(
        learn_precision="full" if dense else "per_parameter",
        blocks=blocks if dense and len(blocks) + len(own) > 1 else None,
        learn_loc=len(learned) == len(varying) or [*_exactly(learned, known), *own],
        loc_hyperprior=_renamed(loc_hyperprior, called),
        scale_hyperprior=_renamed(scale_hyperprior, called),
        lkj=lkj,
    )
    shared = _exactly([name for name in fixed if name not in varying], known)
    model = FormulaModel(net, likelihood, prior, shared=shared)
    model.design = design
    return tasks, model


def _exactly(names: list[str], known: tuple[str, ...]) -> list[str]:
    """Patterns that match these names alone, which may look like patterns of others."""
    return [
        glob.escape(name) if sum(matches(one, name) for one in known) > 1 else name
        for name in names
    ]


def _renamed(hyperprior: Hyperprior, called: Mapping[str, str]) -> Hyperprior:
    """By parameters' names; those that are unknown are told by the prior."""
    if not isinstance(hyperprior, Mapping):
        return hyperprior
    return {called.get(name, name): value for name, value in hyperprior.items()}


def _names_of_caller(formula: Any) -> dict[str, Any]:
    """What the formula names where `from_formula` was called: functions and knots of one's own."""
    frame = inspect.currentframe()
    if frame is None or frame.f_back is None or frame.f_back.f_back is None:
        return {}
    caller = frame.f_back.f_back
    known = {**caller.f_globals, **caller.f_locals}
    named = names_in(formula) if isinstance(formula, str) else ()
    return {name: known[name] for name in named if name in known}
