"""What a low-rank prior's factor may do that its covariance does not show."""

from __future__ import annotations

import torch

from varmeta.priors.factor_normal import FactorNormal
from varmeta.priors.start import is_told_apart
from varmeta.results.result import Fit

# The least share of a weight's variance that is its own; less is none.
NONE_OF_ITS_OWN = 1e-4
# So many weights are named in a sentence.
FEW = 6


def heywood(fit: Fit) -> str | None:
    """A weight that the shared directions determine: the factor runs to infinity in its units.

    In factor analysis a Heywood case; of few tasks it is common.
    """
    with torch.no_grad():
        prior = fit.model.prior_distribution(fit.eta)
    if not isinstance(prior, FactorNormal):
        return None
    share = prior.root.spread.square() / prior.root.variances
    gone = share < NONE_OF_ITS_OWN
    if not bool(gone.any()):
        return None
    named = [label for label, yes in zip(fit.prior.labels, gone.tolist(), strict=True) if yes]
    more = f" and {len(named) - FEW} weights more" if len(named) > FEW else ""
    rank = prior.root.factor.shape[-1]
    along = f"the {rank} directions" if rank > 1 else "the one direction"
    lower = f"give a lower rank than {rank}, or " if rank > 1 else "use "
    return (
        f"the prior's variance of {', '.join(named[:FEW])}{more} beside {along} that all weights "
        f"share runs to zero ({float(share.min()):.1e} of it are left): in every task its value is "
        "that of the directions.  That may be the best-fitting value where tasks are few (a "
        f"Heywood case); if not: {lower}learn_precision='full'"
    )


def has_one_factor(fit: Fit) -> bool:
    """Whether its low-rank covariance has one factor, up to signs.

    With more columns several factors are the same prior, which says nothing of the fit.
    """
    weights = fit.model.weights
    return is_told_apart(weights.size, fit.model.prior.rank_for(weights))
