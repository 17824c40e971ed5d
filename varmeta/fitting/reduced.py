"""What linear Gaussian tasks say, each reduced to a triangle: nothing per row is kept.

With Z the columns of all parameters that enter linearly, whitened over all rows together, and r
what their fit to all rows at once leaves of y, a task is the triangle T_i of the QR decomposition
of its rows [Z r], whose products are those of the rows.  In whitened columns the origin of a
predictor, its units, and how alike two of them are, cost no digits; in triangles nothing is
squared before it must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.likelihoods.base import LocationScale
from varmeta.likelihoods.weighted import unweighted
from varmeta.models.constants import constants
from varmeta.models.design import columns
from varmeta.models.model import TaskModel
from varmeta.numerics.triangular import whitened_columns
from varmeta.priors.validation import validation_enabled
from varmeta.strategies.strategy import Eta
from varmeta.tasks import TaskSet


@dataclass(frozen=True)
class ReducedTasks:
    """Of T tasks with D weights that vary and S parameters that do not, float64.

    Those are shared ones, and the coefficients of features.

    triangles: `(T, D + S + 1, D + S + 1)`, upper triangular.
    whitening: R `(D + S, D + S)`: parameters p have the whitened coordinates R p - origin.
    counts: observations of each task, `(T,)`.
    log_weights: the sums of the logarithms of their known relative precisions, halved, `(T,)`.
    """

    triangles: Tensor
    whitening: Tensor
    origin: Tensor
    counts: Tensor
    log_weights: Tensor

    @classmethod
    def of(cls, model: TaskModel, tasks: TaskSet, linear: tuple[str, ...]) -> ReducedTasks | None:
        """None where a column is a combination of the others, or a number is lost.

        linear: the names of the S parameters, for which the output is linear by construction too.
        """
        rows = tasks.support_rows
        design, y, weight, counts = linear_rows(
            model, rows.x.to(tasks.dtype), rows.y, rows.counts, tasks.features, linear
        )
        known = whitened_columns(design)
        are_white = known is not None
        known = known or _each_by_itself(model, design)
        if known is None:
            return None
        unit = len(design) ** 0.5
        del design  # of a million rows every copy is felt
        q, r = known[0].mul_(unit), known[1] / unit
        origin = q.mT @ y / len(q)
        if not are_white:  # any origin will do; this one leaves the least of y
            origin = torch.linalg.lstsq(q, y.unsqueeze(-1), driver="gelsd").solution[:, 0]
        z = torch.cat([q, (y - q @ origin).unsqueeze(-1)], -1)
        owner = torch.repeat_interleave(counts)
        log_weights = z.new_zeros(len(counts)).index_add(0, owner, weight.log())
        return cls(triangles(z, counts), r, origin, counts.to(z), log_weights)


def _each_by_itself(model: TaskModel, design: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `whitened_columns`, of the weights that vary and of what does not, each among themselves.

    For columns that are collinear together, where a theta0 that is held leaves no doubt: a factor
    whose levels all vary beside fixed effects of the same factor.  None where what is learned is
    collinear.
    """
    size, fixed = model.weights.size, model.weights.fixed
    if not fixed:
        return None
    learned = [
        torch.full((count,), name not in fixed)
        for name, count in zip(model.weights.names, model.weights.sizes, strict=True)
    ]
    free = torch.cat([*learned, torch.ones(design.shape[1] - size, dtype=torch.bool)])
    parts = [whitened_columns(part) for part in (design[:, :size], design[:, size:])]
    if parts[0] is None or parts[1] is None or whitened_columns(design[:, free]) is None:
        return None
    q, r = zip(*(part for part in parts if part is not None), strict=True)
    return torch.cat(q, -1), torch.block_diag(*r)


def triangles(rows: Tensor, counts: Tensor) -> Tensor:
    """Upper ones with the same products, of `counts` consecutive rows each, `(T, P, P)`.

    Tasks of about a size are taken together.
    """
    size = rows.shape[1]
    found = rows.new_zeros(len(counts), size, size)
    begin = counts.cumsum(0) - counts
    # a group's largest task is at most twice its smallest
    group = counts.clamp(min=size).double().log2().floor().long()
    for one in group.unique().tolist():
        at = (group == one).nonzero()[:, 0]
        width = max(size, int(counts[at].max()))
        within = torch.arange(width, device=rows.device)
        known = within < counts[at].unsqueeze(-1)
        index = (begin[at].unsqueeze(-1) + within).clamp(max=max(0, len(rows) - 1))
        block = rows[index].mul_(known.unsqueeze(-1))
        found[at] = torch.linalg.qr(block, mode="r").R
    return found


def linear_rows(
    model: TaskModel,
    x: Tensor,
    y: Tensor,
    counts: Tensor,
    features: Mapping[str, Tensor],
    linear: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns `(N, D + S)` and y `(N,)` in units of each observation's known relative noise.

    Its reciprocals follow, `(N,)`, and how many are each task's, `(T,)`.

    x, y: of all tasks' rows, `counts` `(T,)` of them one after another.  features: of the tasks.
    """
    net, likelihood = model.net, model.likelihood
    assert net is not None and likelihood is not None
    owner = torch.repeat_interleave(counts)
    shared = tuple(name for name in linear if name not in model.coefficients)
    names = (*model.weights.names, *shared)
    design, constant = columns(net, names, constants(net, model.constants, x), x)
    design, constant = design.double(), constant.double()
    parts = dict(zip(names, design.split([model.start[n].numel() for n in names], -1), strict=True))
    for key, (name, feature) in model.coefficients.items():
        known = features[feature].double()[owner]
        parts[key] = parts[name] * known[:, None, None]
    design = torch.cat([parts[name] for name in (*model.weights.names, *linear)], -1)
    response = likelihood.observed(y).double().reshape(constant.shape)
    weight = _relative_precision(model, constant, y).sqrt()
    design = (design * weight.unsqueeze(-1)).flatten(0, 1)
    response = ((response - constant) * weight).reshape(-1)
    return design, response, weight.reshape(-1), counts * constant.shape[1]


def _relative_precision(model: TaskModel, out: Tensor, y: Tensor) -> Tensor:
    """(scale / sd)^2 of every observation, `(rows, outputs)`, whatever the scale is."""
    likelihood = model.likelihood
    inner = unweighted(likelihood)
    assert likelihood is not None and isinstance(inner, LocationScale)
    eta: Eta = inner.init(out.new_zeros(()))
    shape = likelihood.observed(y).shape
    with validation_enabled(False):
        sd = likelihood.distribution(out.reshape(shape), eta, y).stddev
    return (inner.scale_of(out, eta) / sd).square().reshape(out.shape)
