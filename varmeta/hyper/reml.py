"""REML where the tasks' evidence is known: theta0 integrated out, the variances at their best.

Given the variances theta0 and all else that enters linearly is Gaussian, and its integral is known:
lme4's REML criterion, whose minimum Newton steps find.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from varmeta.fitting.profiled_at_eta import covariance_of_places
from varmeta.fitting.profiled_evidence import ProfiledEvidence
from varmeta.fitting.profiled_newton import minimum
from varmeta.hyper.coordinates import Coordinates
from varmeta.hyper.gaussian import Gaussian
from varmeta.numerics.joint import Step
from varmeta.numerics.joint_model import row
from varmeta.numerics.solution import Result
from varmeta.numerics.tree import named_parts
from varmeta.numerics.triangular import root_of_covariance


def restricted(
    objective: ProfiledEvidence,
    coordinates: Coordinates,
    resumed: bool,
    max_steps: int,
    callback: Callable[[Step], object],
) -> Gaussian:
    """The Gaussian of theta0 and the shared parameters; its bound is the criterion itself.

    objective: `restricted`.  resumed: whether to go on from its eta, instead of from its start.
    """
    point = objective.enter(objective.eta) if resumed else objective.start
    if point:
        solution = minimum(objective, point, max_steps=max_steps, callback=callback)
        point, result = row(solution.phi), solution.result
        bound = float(solution.stats["loss"][-1])
    else:  # all that is learned is integrated
        bound = float(objective(point))
        result = Result.CONVERGED if bound == bound else Result.NON_FINITE
        callback(Step(0, bound, {}, {}, 0.5))
    best = objective.leave(point)
    mean = coordinates.vector(coordinates.of(best))
    at = named_parts(torch.arange(len(mean)), best)
    index = torch.cat([at[name].reshape(-1) for name in objective.places])
    index, order = index.sort()
    covariance = covariance_of_places(objective, best)[order][:, order]
    factor = mean.new_zeros(len(mean), len(mean))
    factor[index[:, None], index] = root_of_covariance(covariance).to(mean)
    return Gaussian(mean.detach(), factor, bound, result)
