"""What a fit's log likelihood is: by which criterion, how it is known, of how many parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from varmeta.guides.quadrature import Quadrature
from varmeta.likelihoods.discrete import Binomial
from varmeta.likelihoods.weighted import Weighted, unweighted
from varmeta.models.model import TaskModel
from varmeta.priors.factors import FACTOR, PRECISION, TRIL
from varmeta.results.evidence_gap import is_tight
from varmeta.results.far_from_evidence import rough_quadrature
from varmeta.results.result import Fit, absent_tasks_of
from varmeta.strategies.inner_rates import RATE

Criterion = Literal["ML", "REML", "penalised"]
CLOSED_FORM, QUADRATURE, LAPLACE = "closed form", "quadrature", "Laplace"


@dataclass(frozen=True)
class LogLikelihood:
    """The log likelihood of a fit's estimates, the tasks' weights integrated out.

    value: nats.
    criterion: what was maximised: the likelihood, the restricted one, or a likelihood times
        hyperpriors (whose density is not in `value`).
    by: how it is known: "closed form", "quadrature", "Laplace", or which bound.
    fixed, covariance, noise: how many parameters were estimated: theta0, shared parameters and
        coefficients; sds and correlations of the prior; what the likelihood learns.
    """

    value: float
    criterion: Criterion
    by: str
    fixed: int
    covariance: int
    noise: int

    @property
    def is_exact(self) -> bool:
        return self.by in (CLOSED_FORM, QUADRATURE)

    @property
    def is_maximum(self) -> bool:
        """Whether it is the likelihood's own maximum, exactly."""
        return self.is_exact and self.criterion == "ML"

    @property
    def parameters(self) -> int:
        return self.fixed + self.covariance + self.noise


def log_likelihood_of(fit: Fit) -> LogLikelihood:
    """The log likelihood of a fit.

    Raises ValueError, with the reason and what to do, for a fit that has none, nor a bound or an
    approximation of it.
    """
    why = _refused(fit)
    if why is not None:
        raise ValueError(why)
    criterion: Criterion = (
        "REML" if fit.hyper is not None else "penalised" if fit.model.has_hyperprior else "ML"
    )
    penalty = 0.0 if criterion == "REML" else float(fit.model.penalty(fit.eta))
    fixed, covariance, noise = _parameters(fit)
    return LogLikelihood(penalty - fit.loss, criterion, _known_by(fit), fixed, covariance, noise)


def _refused(fit: Fit) -> str | None:
    """Why a fit has nothing that could stand in a table of log likelihoods."""
    likelihood = fit.model.likelihood
    if fit.run.streamed is not None:
        return "its tasks came as a stream and are not kept: fit a TaskSet"
    if absent_tasks_of(fit) is not None:
        return "it was saved without its tasks: save it with data=True"
    if fit.members is not None:
        return "it is an ensemble of several estimates: fit one member"
    if fit.hyper is not None and fit.hyper.hyperguide != "reml":
        return (
            f"it has integrated over eta (hyperguide={fit.hyper.hyperguide!r}), which leaves no "
            "estimates to judge: fit with hyperguide='delta'"
        )
    if not fit.converged:
        return f"it has not converged ({fit.stop}), and its maximum is not known: fit it to the end"
    if fit.strategy.outer != "elbo":
        return (
            f"its objective, {fit.loss_name}, judges rows that a task's weights were not fitted "
            "to, and is no likelihood of the data: fit with outer='elbo', or compare the two by "
            "fit.adapt(unseen_tasks).score()"
        )
    if fit.is_point:
        return (
            "its guide is a point, so that its objective is no bound of a likelihood: use "
            "guide='multivariate_normal'"
        )
    if fit.model.predictive is not fit.model:
        return (
            f"{likelihood!r} fits classes as targets, whose density is none of the classes: use "
            "likelihoods.Categorical"
        )
    if isinstance(likelihood, Weighted) and not likelihood.precision:
        return (
            "a weight raises the density of its row to a power, which is no density of the data: "
            "use Weighted(..., precision=True), or repeat the rows"
        )
    if fit.hyper is not None and fit.log_likelihood is None:
        return "its restricted likelihood is not known exactly: fit with hyperguide='delta'"
    return None


def _known_by(fit: Fit) -> str:
    guide = fit.problem.guide
    if fit.hyper is not None or is_tight(fit.model, fit.tasks.batch(), fit.eta, fit.loss):
        return CLOSED_FORM
    if isinstance(guide, Quadrature):
        return QUADRATURE if rough_quadrature(fit) is None else "rough quadrature"
    if guide.at_mode:
        return LAPLACE
    return f"{fit.loss_name.removesuffix(' - log hyperprior')} ({guide.name})"


def _parameters(fit: Fit) -> tuple[int, int, int]:
    """How many were estimated: of the mean, of the covariance, and of the noise."""
    model, counts = fit.model, {"fixed": 0, "covariance": 0, "noise": 0}
    own = () if model.likelihood is None else tuple(model.likelihood.task_weights())
    for name, value in fit.eta.items():
        if name.partition(".")[0] in (PRECISION, TRIL, FACTOR):
            counts["covariance"] += value.numel()
        elif name in model.start and name not in own:
            counts["fixed"] += value.numel()
        elif not name.startswith(RATE):
            counts["noise"] += value.numel()
    # directions that are not told apart add nothing to what a covariance can be
    most = model.weights.size * (model.weights.size + 1) // 2
    return counts["fixed"], min(counts["covariance"], most), counts["noise"]


def has_hidden_layers(model: TaskModel) -> bool:
    """Whether weights of a network stand behind others, nonlinearly: many of them are one function.

    What AIC and BIC count as a parameter is then not determined by the data.
    """
    if model.net is None or model.all_linear:
        return False
    layers = [one for one in model.net.modules() if any(True for _ in one.parameters(False))]
    return len(layers) > 1


def number_of_observations(fit: Fit) -> int | None:
    """How many independent observations the rows are, as lme4 counts them.

    None where a row is several (responses, trials) or that is not known.
    """
    rows, likelihood = fit.tasks.support_rows, fit.model.likelihood
    y = rows.y
    if likelihood is not None:
        if isinstance(unweighted(likelihood), Binomial):
            return None
        y = likelihood.observed(y)
    return len(y) if y.dim() == 1 else None
