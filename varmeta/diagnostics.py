"""How good a task's guide is: importance-weighted evidence beside the bound, and the shape of the weights' tail.

With draws theta_s of q_i and weights w_s = p(y_i, theta_s | eta) / q_i(theta_s): the mean of log w_s is the ELBO, the log of the
mean of w_s an estimate of log p(y_i | eta) that lies above it, and their gap an estimate of KL[q_i || posterior].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from varmeta import psis
from varmeta._numbers import whole_number
from varmeta.bayes.laplace import Laplace

if TYPE_CHECKING:
    import pandas as pd

    from varmeta.posterior import Posterior

# The tail of fewer draws than this says nothing.
MIN_DRAWS = 100


def log_weights(posterior: Posterior, num_samples: int, seed: int) -> Tensor:
    """log p(y_i, theta | eta) - log q_i(theta) at draws of q_i, `(draws, tasks)`.

    Raises ValueError for a point, which has no density, and for fewer than 100 draws.
    """
    num_samples = whole_number("num_samples", num_samples, MIN_DRAWS)
    if posterior.is_point:
        raise ValueError(
            "a delta guide has no density to weigh draws by: use guide='laplace' (with Implicit) or a Gaussian guide"
        )
    draws = posterior.draws(num_samples, seed).unsqueeze(-2)
    with torch.no_grad():
        log_joint = posterior.prior.log_prob(draws).squeeze(-1) + posterior.log_likelihood(draws)
        return log_joint - posterior.distribution.log_prob(draws).squeeze(-1)


def evidence(posterior: Posterior, num_samples: int, seed: int) -> pd.DataFrame:
    """See `Posterior.evidence`."""
    import pandas as pd

    weights = log_weights(posterior, num_samples, seed)
    table = pd.DataFrame(_evidence(posterior, weights), index=pd.Index(posterior.names, name="task"))
    total = table.sum()
    total["se"] = math.sqrt(float(table["se"].pow(2).sum()))
    return pd.concat([table, pd.DataFrame([total], index=pd.Index(["all"], name="task"))])


def diagnose(posterior: Posterior, num_samples: int, seed: int) -> pd.DataFrame:
    """See `Posterior.diagnose`."""
    import pandas as pd

    weights = log_weights(posterior, num_samples, seed)
    table = pd.DataFrame(_evidence(posterior, weights), index=pd.Index(posterior.names, name="task"))
    _, k = psis.smooth(weights.T.cpu().numpy().astype(float))
    share = (weights - weights.logsumexp(0)).exp()
    table["gap"] = table["evidence"] - table["elbo"]
    table["ess"] = (1.0 / share.square().sum(0)).tolist()
    table["k_hat"] = k
    table["reading"] = [psis.reading(value, num_samples, ess) for value, ess in zip(k, table["ess"], strict=True)]
    raised = _raised(posterior)
    if raised is not None:
        table["reading"] = np.where(raised, "no mode", table["reading"])
    return table


def _evidence(posterior: Posterior, weights: Tensor) -> dict[str, list[float]]:
    draws = len(weights)
    log_mean = weights.logsumexp(0) - math.log(draws)
    relative = (weights - log_mean).exp()
    # the logarithm's error by its derivative at the mean
    se = relative.std(0) / math.sqrt(draws)
    problem, batch = posterior.problem, posterior.tasks.batch()
    with torch.no_grad():
        objective = -problem.losses("elbo", batch, 0)(posterior.phi, posterior.eta)
    columns = {"objective": objective, "elbo": weights.mean(0), "evidence": log_mean, "se": se}
    return {name: value.tolist() for name, value in columns.items()}


def _raised(posterior: Posterior) -> np.ndarray | None:
    """Tasks whose Hessian was not positive definite, under Laplace's guide."""
    guide = posterior.problem.guide
    if not isinstance(guide, Laplace):
        return None
    return (guide.raised(posterior.phi, posterior.eta, posterior.support) > 0).cpu().numpy()
