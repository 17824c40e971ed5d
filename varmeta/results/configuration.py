"""How a model was made, and what it computes: what a file keeps of it, to tell it from another.

What is code (a forward, a program, a distribution of the user's own) is known by what it computes,
see `numbers_of`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varmeta.files.plain import Plain, plain
from varmeta.models.model import TaskModel, negative_log_likelihood
from varmeta.tasks import TaskSet

# Of the rows of the data, so many are enough to tell two models apart.
TASKS, ROWS = 3, 16


def configuration(model: TaskModel) -> Plain:
    """Everything that the model was made with.

    Left out are where its weights start and its constants (`models/constants.py`).

    A present attribute of an argument's name stands for the argument: prior=None has become a
    prior, patterns have become names.
    """
    # theta0 and the parameters of a program start anywhere: what was learned takes their place
    return {
        name: plain(getattr(model, name, value))
        for name, value in model.constructed_with.items()
        if name != "params"
    }


def numbers_of(model: TaskModel, tasks: TaskSet, eta: Mapping[str, Tensor]) -> Tensor:
    """What the model makes of eta and of a few rows of data, float64.

    Log densities of the prior, of y, and of the hyperpriors.

    At theta0 and two prior sds around it, of at most three tasks and sixteen rows each.  Code is
    told apart by it, and what an argument means to another version.
    """
    some = tasks[: min(TASKS, len(tasks))].batch()
    with torch.no_grad():
        prior = model.prior_distribution(eta)
        sd = prior.stddev
        # of either sign and unequal, so that no two weights stand for each other
        step = torch.cos(torch.arange(1.0, len(sd) + 1.0, dtype=torch.float64)).to(sd) * sd
        points = torch.stack([prior.mean, prior.mean + step, prior.mean - 2.0 * step])
        found = [prior.log_prob(points), torch.as_tensor(model.penalty(eta)).to(sd).reshape(1)]
        theta = points[:, None, None].expand(-1, len(some), 1, -1)
        for data in (some.support, some.query):
            if data is not None and data.width:
                few = data.first_points(min(ROWS, data.width))
                found.append(negative_log_likelihood(model, theta, eta, few)[1].reshape(-1))
    return torch.cat([part.double().cpu().reshape(-1) for part in found])


def same_numbers(saved: Tensor, now: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to what another machine's order of sums makes of them.

    What is not finite must stay so.
    """
    if saved.shape != now.shape:
        return False
    slack = torch.finfo(dtype).eps ** 0.5
    return bool(torch.allclose(saved, now, rtol=slack, atol=slack, equal_nan=True))
