"""New observations of linear Gaussian tasks: normal given eta, else a mixture of normals over eta.

The output is X theta + c, theta ~ N(m, L L') given eta and y ~ N(X theta + c, s^2); so
y ~ N(X m + c, X L L' X' + s^2), and without the last term the mean of an observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varmeta.guides.closed_form import design_of
from varmeta.models.model import TaskModel
from varmeta.numerics.normals import moments, quantiles
from varmeta.numerics.rows import rowwise
from varmeta.priors.validation import validation_enabled
from varmeta.tasks import Data
from varmeta.tasks.batch import WORTH
from varmeta.tasks.groups import alike

# Numbers of one tensor that are held at once.
CELLS = 1_000_000


@dataclass(frozen=True)
class Components:
    """What p(theta_i | y) is a mixture of: K Gaussians, each under its own eta.

    share: their weights `(K,)`.  eta: `(K, ...)` by name.  loc: `(K, tasks, D)`.
    root: sds of that shape, or square roots of covariances `(K, tasks, D, D)`; None for points.
    draws: the number of draws of eta, of which equal ones are one component; None: these are all
        that there are, and nothing was drawn.
    """

    share: Tensor
    eta: Mapping[str, Tensor]
    loc: Tensor
    root: Tensor | None
    draws: int | None = None

    def of(self, tasks: Tensor) -> Components:
        """For the tasks at these positions."""
        root = None if self.root is None else self.root[:, tasks]
        return Components(self.share, self.eta, self.loc[:, tasks], root, self.draws)


def predictive(
    model: TaskModel,
    components: Components,
    data: Data,
    noisy: bool = True,
    has_y: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Means `(K, n, outputs)` and covariances `(K, n, outputs, outputs)` of each observation.

    Of the n that are no padding, of some tasks of alike size at a time; before them where they
    stand among those of all tasks, int64 `(n,)`.

    noisy: False for the mean of an observation, without the noise of single ones.
    has_y: whether data's y are there, and with them each observation's own precision.
    """
    number, size = len(components.share), components.loc.shape[-1]
    begins = data.num_points.cumsum(0) - data.num_points
    with torch.no_grad():
        for tasks in alike([data.num_points], WORTH):
            group = data.take(tasks)
            step = max(1, CELLS // max(1, number * group.width * size))
            for begin in range(0, len(group), step):
                some = tasks[begin : begin + step]
                part = group.part(begin, begin + len(some))
                mean, covariance = _predictive(model, components.of(some), part, noisy, has_y)
                counts = part.num_points
                moved = begins[some] - (counts.cumsum(0) - counts)
                rows = moved.repeat_interleave(counts)
                rows += torch.arange(len(rows), device=rows.device)
                yield rows, mean[:, part.mask], covariance[:, part.mask]


def in_order(rows: Sequence[Tensor], parts: Sequence[Tensor], dim: int) -> Tensor:
    """What was made of `predictive`'s parts, with an axis `dim` of observations, as one."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim).index_select(dim, torch.cat(list(rows)).argsort())


def responses(model: TaskModel, data: Data) -> Tensor:
    """The numbers of every observation that is no padding, without its weight: `(n, outputs)`."""
    assert model.likelihood is not None
    _, y = data.flat()
    return model.likelihood.observed(y).reshape(len(y), -1)


def _predictive(
    model: TaskModel, some: Components, data: Data, noisy: bool, has_y: bool
) -> tuple[Tensor, Tensor]:
    x, y = data.filled
    assert model.likelihood is not None  # a program is not known to be normal
    likelihood, spread = model.likelihood, some.root if some.root is not None else some.loc * 0.0
    dense = spread.dim() > some.loc.dim()

    def under(eta: dict[str, Tensor], loc: Tensor, root: Tensor) -> Tensor:
        design, constant = design_of(model, eta, x)
        mean = constant + (design @ loc[:, None, :, None]).squeeze(-1)
        moved = design @ root.unsqueeze(1) if dense else design * root[:, None, None]
        covariance = moved @ moved.mT
        if noisy:
            at = constant.reshape(likelihood.observed(y).shape) if has_y else constant
            with validation_enabled(False):
                noise = likelihood.distribution(at, eta, y if has_y else None).variance
            covariance = covariance + torch.diag_embed(noise.reshape(constant.shape))
        return torch.cat([mean.unsqueeze(-1), covariance], -1)

    found = rowwise(under)(dict(some.eta), some.loc, spread)
    return found[..., 0], found[..., 1:]


@dataclass(frozen=True)
class NormalMixture:
    """The distribution of every number of every observation at the x of `data`.

    What is told of padding is 0.

    event: the shape of one observation.
    noisy: False for the mean of an observation, without the noise of single ones.
    """

    model: TaskModel
    components: Components
    data: Data
    event: tuple[int, ...]
    noisy: bool

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, `(tasks, points, *event)`."""
        mean, sd = self._each(lambda *part: torch.stack(moments(self.components.share, *part)))
        return mean, sd

    def quantiles(self, probabilities: tuple[float, ...]) -> Tensor:
        """`(len(probabilities), tasks, points, *event)`."""

        def one(mean: Tensor, variance: Tensor) -> Tensor:
            flat = mean.flatten(1), variance.flatten(1).sqrt()
            found = quantiles(self.components.share, *flat, probabilities)
            return found.reshape(-1, *mean.shape[1:])

        return self._each(one)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.mask.shape, *self.event)

    def _each(self, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What fn makes of means and variances `(K, n, outputs)`, some tasks at a time."""
        rows, parts = [], []
        for at, mean, covariance in predictive(self.model, self.components, self.data, self.noisy):
            rows.append(at)
            parts.append(fn(mean, covariance.diagonal(dim1=-2, dim2=-1)))
        found = in_order(rows, parts, 1)
        mask = self.data.mask
        told = found.new_zeros(len(found), *mask.shape, found.shape[-1])
        told[:, mask] = found
        return told.reshape(len(found), *self.shape)
