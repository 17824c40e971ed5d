"""A prior linear in what is known of a task: theta_i ~ N(theta0 + Gamma z_i, Lambda^-1).

The program samples u_i = theta_i - Gamma z_i ~ N(theta0, Lambda^-1), and Gamma z_i is added before
the likelihood sees the weights.  So guides, divergences and solvers know one theta0 for all tasks:
the Gaussian of u_i is that of theta_i moved, and KL, evidence and curvature do not change by a
move.  Each coefficient is an entry of eta, called as in `intercept:log_uppm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from varmeta._checks import kind_of, nearest
from varmeta.priors.weights import Weights

Covariates = Mapping[str, Sequence[str]] | Sequence[str] | None
# Of an entry of eta: parameter and feature.
Coefficients = Mapping[str, tuple[str, str]]


def check_covariates(given: object) -> Covariates:
    """Lists of feature names, for all weights or by parameter name, as tuples.

    Raises TypeError or ValueError.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {
            str(name): _names(features, f"covariates[{name!r}]") for name, features in given.items()
        }
    return _names(given, "covariates")


def _names(given: object, what: str) -> tuple[str, ...]:
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or not all(isinstance(name, str) for name in given)
    ):
        raise TypeError(
            f"{what} must list names of features, such as ['log_uppm'], not {kind_of(given)}"
        )
    if len(set(given)) < len(given):
        raise ValueError(f"{what} names a feature twice: {list(given)}")
    if any(":" in name for name in given):
        raise ValueError(
            f"{what} is {list(given)}: a colon joins weight and feature, so rename features that "
            "have one"
        )
    return tuple(given)


def coefficients_of(
    covariates: Covariates, weights: Sequence[str], shared: Sequence[str]
) -> Coefficients:
    """Parameter and feature of every coefficient, by its name in eta.

    weights: names of the parameters that vary between tasks; shared: of those that do not.

    Raises ValueError for a parameter that does not vary, or that there is not, and for a name that
    is taken.

    >>> coefficients_of({"intercept": ("uranium",)}, ["intercept", "floor"], [])
    {'intercept:uranium': ('intercept', 'uranium')}
    """
    if covariates is None:
        return {}
    by_name = covariates if isinstance(covariates, Mapping) else dict.fromkeys(weights, covariates)
    common = [name for name in by_name if name in shared]
    if common:
        raise ValueError(
            f"covariates move {common}, which all tasks share: features move weights that vary "
            "between tasks; of a shared one, put the product of column and feature into x instead"
        )
    unknown = [name for name in by_name if name not in weights]
    if unknown:
        raise ValueError(
            f"covariates name {unknown}, but the weights that vary are {list(weights)}"
            f"{nearest(unknown, weights)}"
        )
    found = {
        f"{name}:{feature}": (name, feature)
        for name in weights
        for feature in by_name.get(name, ())
    }
    taken = [name for name in found if name in (*weights, *shared)]
    if taken:
        raise ValueError(
            f"the coefficient {taken[0]!r} of covariates is called as a parameter is: rename the "
            "feature"
        )
    return found


def offset(
    coefficients: Coefficients,
    weights: Weights,
    eta: Mapping[str, Tensor],
    features: Mapping[str, Tensor],
) -> Tensor | None:
    """Gamma z_i of every task, `(tasks, D)`; None where there are no coefficients.

    features: `(tasks,)` each, by name.
    """
    if not coefficients:
        return None
    tasks = features[next(iter(coefficients.values()))[1]]
    moved: dict[str, Tensor] = {}
    for key, (name, feature) in coefficients.items():
        part = features[feature].reshape(-1, *(1,) * eta[key].dim()) * eta[key]
        moved[name] = moved[name] + part if name in moved else part
    zeros = {
        name: tasks.new_zeros(len(tasks), *shape)
        for name, shape in weights.shapes.items()
        if name not in moved
    }
    return weights.flatten(moved | zeros)


def check_features(coefficients: Coefficients, known: Sequence[str]) -> None:
    """Raise ValueError where the tasks lack a feature that moves their prior."""
    missing = [feature for _, feature in coefficients.values() if feature not in known]
    if missing:
        have = f"have {list(known)}" if known else "have none"
        raise ValueError(
            f"the prior's covariates need the features {list(dict.fromkeys(missing))}, but these "
            f"tasks {have}: give "
            "Task(features={...}) or TaskSet.from_frame(features=[...]), new tasks too"
            f"{nearest(missing, known)}"
        )
