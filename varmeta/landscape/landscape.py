"""What theta0 sees with one weight a task: theta*(theta0), its jumps, two meta-objectives.

    F_i(theta; theta0) = f_i(theta) + lambda/2 (theta - theta0)^2   the regularised loss of task i
    theta_i*(theta0)   = argmin_theta F_i(theta; theta0)            the global one
    M(theta0)          = sum_i g_i(theta_i*(theta0))                the meta-objective of iMAML
    M_var(theta0)      = sum_i F_i(theta_i*(theta0); theta0)        the variational one

`argmin` is theta_i*, `reached` the minimum that descent from theta0 comes to; a summand of M_var is
the Moreau envelope of f_i.

In one dimension all of it can be known for certain, which is what pictures and tests need.  It is
computed by the parts that serve networks: the model's own losses, the inner minimisers and the
adjoints.

Source: F. Huszar, Notes on iMAML (2019); J. J. Moreau, Proximite et dualite dans un espace
hilbertien (1965).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from varmeta._checks import counted, one_of
from varmeta.landscape.functions import model_of_function, tasks_of_coefficients
from varmeta.landscape.global_minima import Anchored, RowDescent, phi_of, theta_of
from varmeta.landscape.wells import locate_jumps
from varmeta.models.check import check_model
from varmeta.models.model import TaskModel
from varmeta.numerics.adjoint import ImplicitAdjoint, unrolled
from varmeta.numerics.first_order import GradientDescent
from varmeta.numerics.minimize import FirstOrderMinimizer
from varmeta.results.result import Fit, training_tasks
from varmeta.strategies.problem import Losses
from varmeta.tasks import TaskSet

Route = Literal["closed form", "implicit", "unrolled", "central differences"]
ROUTES: tuple[Route, ...] = get_args(Route)
AnchoredOuter = Literal["query", "elbo"]  # iMAML's, and the variational one
Anchors = Tensor | Sequence[float] | float

_DOWNHILL = GradientDescent(0.01)
_MAX_STEPS = 20_000


class Jump(NamedTuple):
    """At `anchor` the minimum of a task's loss passes from `left` to `right`, which is as low.

    The loss is the regularised one.
    """

    anchor: float
    task: str
    left: float
    right: float


class Landscape:
    """The losses of tasks with one scalar weight, as functions of theta and of the anchor theta0.

    Results are float64 and have one row per anchor and one column per task, `(anchors, tasks)`;
    summed over the last axis they are the post's.  f_i is the negative log likelihood of the
    support data, with its constants; g_i that of the query data, or f_i where no task has any.  The
    penalty comes *without* the prior's normaliser: so M_var is the Moreau envelope itself, and
    `vm.meta_gradient` reports `normaliser` more for each task.

    model: with one weight per task, of any shape with one element.
    eta: shared parameters, noise scales and learned precisions, where they are not the model's
        start; theta0 is ignored.
    spacing: of the grid in theta on which minima are looked for: a well narrower than two of them
        may be missed.  The grid reaches as far as the penalty lets any minimum be, given the lowest
        f on it, and at least 5 / sqrt(lambda).

    Raises ValueError for a model with more weights, for tasks of which only some have query data,
    and where model and tasks do not fit each other.

    >>> landscape = Landscape.of(lambda theta: torch.sin(3 * theta) + 0.2 * theta**2)
    >>> landscape.argmin([0.7, -2.0]).flatten()
    tensor([-0.3822, -0.6479], dtype=torch.float64)
    >>> landscape.jumps(-2.0, 2.0)[0].anchor  # 7 pi / 30
    0.73303828...
    """

    def __init__(
        self,
        model: TaskModel,
        tasks: TaskSet,
        eta: Mapping[str, Tensor] | None = None,
        *,
        spacing: float = 0.01,
    ) -> None:
        if model.weights.size != 1:
            raise ValueError(
                "a landscape is drawn over one scalar weight, but the model has "
                f"{model.weights.size} weights per task, {list(model.weights.labels[:5])}: share "
                "all but one of them (shared=[...])"
            )
        if model.coefficients:
            raise ValueError(
                "a landscape is drawn over one theta0 for all tasks, but the prior's covariates "
                "give each its own: leave them out"
            )
        if not 0 < spacing < math.inf:
            raise ValueError(f"spacing must be a positive number, not {spacing}")
        tasks = tasks.to(torch.float64)
        bare = tasks.query_rows.bare(tasks.names)
        if 0 < len(bare) < len(tasks):
            raise ValueError(
                f"task {bare[0]!r} has no query data although others have: give all, or none"
            )
        check_model(model, tasks)
        self.model, self.tasks = model, tasks
        self._anchored = Anchored(model, tasks, eta or {}, spacing)

    @classmethod
    def of(
        cls,
        f: Callable[..., Tensor],
        precision: float = 1.0,
        coefficients: Any = None,
        query: Any = None,
        *,
        spacing: float = 0.01,
    ) -> Landscape:
        """The landscape of plain functions.

        f: `f(theta)`, or with coefficients `f(theta, c)`: one number for each theta, of any shape;
            `c[..., k]` is the k-th coefficient of theta's task and broadcasts against theta.
        precision: lambda.
        coefficients: of f_i, `(tasks, K)`; None for one task without any.  query: those of g_i;
            None where g_i = f_i.

        >>> bowl = lambda theta, c: (theta - c[..., 0]) ** 2 / 2
        >>> bowls = Landscape.of(bowl, 1.0, [[-1.0], [3.0]])
        >>> bowls.argmin(0.0)  # half-way to each
        tensor([[-0.5000, 1.5000]], dtype=torch.float64)
        """
        model = model_of_function(f, precision, coefficients is not None)
        return cls(model, tasks_of_coefficients(coefficients, query), spacing=spacing)

    @classmethod
    def of_fit(cls, fit: Fit, *, spacing: float = 0.01) -> Landscape:
        """The landscape that a fit has moved on, with all that it learned beside theta0.

        Raises ValueError for a guide that is not a point, and where the tasks are not kept (a
        stream, a file without data).
        """
        if not fit.is_point:
            raise ValueError(
                f"the fit's guide is {fit.strategy.guide!r}, which has a width beside its "
                "location: a landscape shows one theta per task, so fit with guide='delta'"
            )
        return cls(fit.model, training_tasks(fit), fit.eta, spacing=spacing)

    def __repr__(self) -> str:
        return f"<Landscape: {counted(len(self.tasks), 'task')}, precision {self.precision:.4g}>"

    @property
    def precision(self) -> float:
        """lambda."""
        return self._anchored.precision

    @property
    def normaliser(self) -> float:
        """-log N(theta0; theta0, 1 / lambda), in nats: what the penalty leaves out."""
        return self._anchored.normaliser

    # -- the post's three curves -------------------------------------------------------------------

    def loss(self, theta: Anchors) -> Tensor:
        """f_i(theta), `(thetas, tasks)`."""
        theta = _line(theta, "theta")
        rows = self._anchored.rows(theta)
        return rows("f", rows.anchor).reshape(len(theta), -1)

    def penalty(self, theta: Anchors, anchor: float) -> Tensor:
        """lambda/2 (theta - theta0)^2 at one anchor, the same for every task: `(thetas, 1)`."""
        return self._anchored.penalty(_line(theta, "theta"), _line(anchor, "anchor"))[:, None]

    def regularized(self, theta: Anchors, anchor: float) -> Tensor:
        """F_i = f_i(theta) + lambda/2 (theta - theta0)^2 at one anchor, `(thetas, tasks)`."""
        return self.loss(theta) + self.penalty(theta, anchor)

    # -- Alg ---------------------------------------------------------------------------------------

    def argmin(self, anchors: Anchors) -> Tensor:
        """theta_i*(theta0), the global minimum of the regularised loss, `(anchors, tasks)`.

        At a jump, either end of it.

        Raises ValueError for anchors that are not finite, for an f that is not finite on the way,
        and for one that falls as fast as the penalty rises; warns (RuntimeWarning) where Newton's
        method does not converge, as at a kink of f.
        """
        anchors = _line(anchors, "anchors")
        rows = self._anchored.rows(anchors)
        return self._anchored.argmin(rows.anchor, rows.task, self._anchored.grid(anchors)).reshape(
            len(anchors), -1
        )

    def reached(
        self, anchors: Anchors, minimizer: FirstOrderMinimizer = _DOWNHILL, steps: int | None = None
    ) -> Tensor:  # fmt: skip
        """Alg(f_i, theta0) started at theta0 itself, `(anchors, tasks)`.

        It is the post's "closest local minimum".

        steps: K steps and no more; None: until it stands, and then to the last digit by Newton's
            method.  Gradient descent whose lr is below 1 / curvature never steps over a stationary
            point, so it finds the minimum downhill.
        """
        rows = self._anchored.rows(_line(anchors, "anchors"))
        theta = theta_of(
            rows.minimize(
                minimizer, rows.anchor, steps=steps, tolerance=1e-6, max_steps=_MAX_STEPS
            ).value
        )
        return (theta if steps is not None else rows.polish(theta)).reshape(-1, len(self.tasks))

    def jumps(self, low: float, high: float, num_anchors: int = 401) -> list[Jump]:
        """Every jump of `argmin` for theta0 in [low, high], to 1e-9, by task and anchor.

        num_anchors: where theta* is looked at first; however many jumps lie between two of them,
            they are told apart.

        Raises ValueError for a range or a number of anchors that make no sense.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"expected a range of anchors, low < high, not {low} and {high}")
        if num_anchors < 2:
            raise ValueError(f"num_anchors must be at least 2, not {num_anchors}")
        anchors = torch.linspace(low, high, num_anchors, dtype=torch.float64)
        grid = self._anchored.grid(anchors)
        rows = self._anchored.rows(grid.theta)
        slope = rows.slopes(rows.anchor)[0].reshape(grid.loss.shape)
        found = locate_jumps(
            lambda anchor, task: self._anchored.argmin(anchor, task, grid),
            grid.theta,
            grid.theta[:, None] + slope / self.precision,
            anchors,
            tolerance=1e-9,
        )
        columns = (column.tolist() for column in found)
        return [
            Jump(at, self.tasks.names[i], left, right)
            for at, i, left, right in zip(*columns, strict=True)
        ]

    def derivative(self, anchors: Anchors, route: Route = "implicit") -> Tensor:
        """d theta_i* / d theta0 of `argmin`, `(anchors, tasks)`, by one of four routes.

        They agree away from jumps.

        "closed form": lambda / (lambda + f''(theta*)), the post's 1 / (1 + f'') at lambda = 1.
        "implicit": `ImplicitAdjoint`, which knows products with the Hessian only.
        "unrolled": backpropagation through 40 steps of gradient descent, each of 1/2 / curvature,
            to the minimum from the grid point beside it.
        "central differences": of the problem solved again at theta0 +- 1e-5; beside a jump the gap
            over 2e-5.

        Raises ValueError for another route.
        """
        one_of("route", route, ROUTES)
        anchors = _line(anchors, "anchors")
        if route == "central differences":
            step = 1e-5
            return (self.argmin(anchors + step) - self.argmin(anchors - step)) / (2 * step)
        theta = self.argmin(anchors)
        if route == "implicit":
            return self._gradient(anchors, theta, theta_of)
        rows = self._anchored.rows(anchors, live=True)
        curvature = self.precision + rows.slopes(theta.flatten())[1]
        if route == "closed form":
            return (self.precision / curvature).reshape(theta.shape)
        start = (theta.flatten() / self._anchored.spacing).round() * self._anchored.spacing
        # every step halves the distance to the minimum, and what the derivative lacks
        found = rows.minimize(RowDescent(0.5 / curvature), start, steps=40, create_graph=True)
        losses = unrolled(theta_of, found.value, rows.eta)
        return torch.autograd.grad(losses.sum(), rows.anchor)[0].reshape(theta.shape)

    # -- what theta0 is optimised for --------------------------------------------------------------

    def meta_objective(self, anchors: Anchors, theta: Tensor | None = None) -> Tensor:
        """g_i(theta_i*(theta0)), `(anchors, tasks)`: iMAML's; it jumps where theta* does.

        theta: what Alg found, `(anchors, tasks)`; by default `argmin(anchors)`.
        """
        return self._outer("query", _line(anchors, "anchors"), theta)

    def variational_objective(self, anchors: Anchors, theta: Tensor | None = None) -> Tensor:
        """F_i(theta_i*; theta0), theta_i* the minimum, `(anchors, tasks)`.

        F_i = f_i(theta_i*) + lambda/2 (theta_i* - theta0)^2.

        With the global minimum it is the Moreau envelope of f_i: continuous, also where theta*
            jumps.
        """
        return self._outer("elbo", _line(anchors, "anchors"), theta) - self.normaliser

    def gradient(
        self, anchors: Anchors, outer: AnchoredOuter = "query", theta: Tensor | None = None
    ) -> Tensor:
        """Each task's meta-gradient, `(anchors, tasks)`, by `ImplicitAdjoint`.

        It is the objective's derivative between jumps.

        outer: "query", of `meta_objective`; "elbo", of `variational_objective`: lambda (theta0 -
            theta*), no Hessian.

        Raises ValueError for another outer objective.
        """
        one_of("outer", outer, get_args(AnchoredOuter))
        anchors = _line(anchors, "anchors")
        return self._gradient(anchors, self._minima(anchors, theta), outer)

    def _minima(self, anchors: Tensor, theta: Tensor | None) -> Tensor:
        if theta is None:
            return self.argmin(anchors)
        if theta.shape != (len(anchors), len(self.tasks)):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}, but {len(anchors)} anchors and "
                f"{len(self.tasks)} tasks were expected"
            )
        return theta.detach().to(torch.float64)

    def _outer(self, name: AnchoredOuter, anchors: Tensor, theta: Tensor | None) -> Tensor:
        theta = self._minima(anchors, theta)
        return self._anchored.rows(anchors)(name, theta.flatten()).reshape(len(anchors), -1)

    def _gradient(self, anchors: Tensor, theta: Tensor, outer: AnchoredOuter | Losses) -> Tensor:
        rows = self._anchored.rows(anchors, live=True)
        inner = rows.losses("elbo")
        # the inner function itself, so that the envelope theorem is seen to apply
        function = (
            inner if outer == "elbo" else rows.losses(outer) if isinstance(outer, str) else outer
        )
        losses, _ = ImplicitAdjoint()(inner, function, phi_of(theta.flatten()), rows.eta)
        return torch.autograd.grad(losses.sum(), rows.anchor)[0].reshape(len(anchors), -1)


def _line(values: Anchors, name: str) -> Tensor:
    """One axis of finite numbers, in float64."""
    line = torch.as_tensor(values, dtype=torch.float64).detach()
    line = line[None] if line.dim() == 0 else line
    if line.dim() != 1 or not len(line):
        raise ValueError(f"{name} must be numbers along one axis, not of shape {tuple(line.shape)}")
    if not bool(line.isfinite().all()):
        raise ValueError(
            f"{name} must be finite, but {float(line[~line.isfinite()][0])} is among them"
        )
    return line
