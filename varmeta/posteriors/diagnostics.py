"""How good a task's guide is: importance-weighted evidence, and the weights' tail.

With draws theta_s of q_i and weights w_s = p(y_i, theta_s | eta) / q_i(theta_s): the mean of log
w_s is the ELBO, the log of the mean of w_s an estimate of log p(y_i | eta) that lies above it, and
their gap an estimate of KL[q_i || posterior].  Where the posterior is Gaussian by construction, log
p(y_i | eta) itself stands in the estimate's place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta._checks import whole_number
from varmeta.guides.closed_form import log_evidence_in_parts
from varmeta.guides.laplace import Laplace
from varmeta.posteriors import psis
from varmeta.posteriors.draws import Draws, GuideDraws
from varmeta.posteriors.observer import Observer

if TYPE_CHECKING:
    import pandas as pd

# The tail of fewer draws than this says nothing.
MIN_DRAWS = 100
NO_DENSITY = (
    "a delta guide has no density to weigh draws by: use guide='laplace' (with Implicit) or a "
    "Gaussian guide"
)
NO_CLASSES = (
    "the evidence of this model is that of its regression of +-1 targets, and no density of "
    "classes: judge it by score() on query data, whose log_density is that of the classes"
)


def log_weights(observer: Observer, num_samples: int, seed: int) -> Tensor:
    """log p(y_i, theta | eta) - log q_i(theta) at draws of q_i, `(draws, tasks)`.

    Raises ValueError for a point, which has no density, for eta integrated out, and for fewer than
    100 draws.
    """
    num_samples, q = whole_number("num_samples", num_samples, MIN_DRAWS), observer.q
    if q.kind == "integrated":
        raise ValueError(
            "this posterior integrates over eta: fit.hyper tells how good that is; evidence and "
            "diagnose look at the guides of a fit with hyperguide='delta'"
        )
    if q.model.predictive is not q.model:
        raise ValueError(NO_CLASSES)
    if q.is_point:
        raise ValueError(NO_DENSITY)
    draws = q.theta(num_samples, seed)
    with torch.no_grad():
        log_joint = q.prior.log_prob(draws).squeeze(-1) + observer.log_likelihood(draws, q.eta)
        return log_joint - q.distribution.log_prob(draws).squeeze(-1)


def evidence(observer: Observer, num_samples: int, seed: int) -> pd.DataFrame:
    """See `Posterior.evidence`."""
    import pandas as pd

    weights = log_weights(observer, num_samples, seed)
    table = pd.DataFrame(
        _evidence(observer, weights), index=pd.Index(observer.q.batch.names, name="task")
    )
    total = table.sum()
    total["se"] = math.sqrt(float(table["se"].pow(2).sum()))
    return pd.concat([table, pd.DataFrame([total], index=pd.Index(["all"], name="task"))])


def diagnose(observer: Observer, num_samples: int, seed: int) -> pd.DataFrame:
    """See `Posterior.diagnose`."""
    import pandas as pd

    weights = log_weights(observer, num_samples, seed)
    table = pd.DataFrame(
        _evidence(observer, weights), index=pd.Index(observer.q.batch.names, name="task")
    )
    _, k = psis.smooth(weights.T.cpu().numpy().astype(float))
    share = (weights - weights.logsumexp(0)).exp()
    table["gap"] = table["evidence"] - table["elbo"]
    table["ess"] = (1.0 / share.square().sum(0)).tolist()
    table["k_hat"] = k
    table["reading"] = [
        psis.reading(value, num_samples, ess) for value, ess in zip(k, table["ess"], strict=True)
    ]
    raised = _raised(observer.q)
    if raised is not None:
        table["reading"] = np.where(raised, "no mode", table["reading"])
    return table


def _evidence(observer: Observer, weights: Tensor) -> dict[str, list[float]]:
    draws = len(weights)
    log_mean = weights.logsumexp(0) - math.log(draws)
    relative = (weights - log_mean).exp()
    # the logarithm's error by its derivative at the mean
    se = relative.std(0) / math.sqrt(draws)
    known = exact(observer)
    if known is not None:
        lost = known.isnan()
        log_mean, se = torch.where(lost, log_mean, known), torch.where(lost, se, 0.0)
    assert isinstance(observer.q, GuideDraws)  # log_weights refuses the others
    columns = {
        "objective": observer.q.objective(),
        "elbo": weights.mean(0),
        "evidence": log_mean,
        "se": se,
    }
    return {name: value.tolist() for name, value in columns.items()}


def exact(observer: Observer) -> Tensor | None:
    """log p(y_i | eta) `(tasks,)` where the posteriors are Gaussian by construction.

    NaN of the others.
    """
    q = observer.q
    if not q.model.is_linear_gaussian:
        return None
    return log_evidence_in_parts(q.model, q.eta, q.batch.support)


def _raised(q: Draws) -> np.ndarray | None:
    """Tasks whose Hessian was not positive definite, under Laplace's guide."""
    if not (isinstance(q, GuideDraws) and isinstance(q.guide, Laplace)):
        return None
    return (q.guide.raised(q.phi, q.eta, q.batch.support) > 0).cpu().numpy()
