"""Alg as a distribution: a random start, minibatches, Langevin noise, and its score.

The post's generalisation of the meta-objective is E_{theta ~ Alg(f_i, theta0)} g_i(theta).  It
depends on eta in two ways: each minimum moves, and the probability of ending in it changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from varmeta._checks import one_of
from varmeta.guides.kl import location, move
from varmeta.numerics import noise
from varmeta.numerics.arguments import no_tensors
from varmeta.numerics.steps import value_and_gradient
from varmeta.numerics.tree import Tree, add, detach
from varmeta.strategies.problem import Losses, Problem
from varmeta.tasks import Batch

# Addresses of the noise, away from those of training (steps counted from 0) and of posterior draws
# (2^40).
_ALG = 2**41
_STEPS_APART = 2**20  # inner steps that one outer step may take
Estimator = Literal["auto", "score", "pathwise"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


@dataclass(frozen=True)
class StochasticAlg:
    """Alg(f_i, theta0) as a distribution over where the inner loop ends.

    For `Stochastic(Unrolled(...), alg)` and `Stochastic(Implicit(...), alg)`.

        theta_0     = theta0 + start_scale Lambda^-1/2 eps
        theta_{k+1} = theta_k - lr grad F_k(theta_k) + sqrt(2 lr T_k) xi_k,  k < num_steps

    with eps, xi ~ N(0, I), F_k the penalised loss F_i on `batch_size` rows drawn without
    replacement (their loss scaled up to the task's size), and T_k the temperature, constant or
    falling linearly.  The outer objective becomes the mean over `num_draws` runs for each task; the
    noise is new at every outer step, a function of (seed, step, task, draw).

    Two estimators of the gradient, both with the post's two mechanisms in them: "pathwise"
    differentiates through the noisy steps, the noise held fixed.  It serves every kind of noise and
    is unbiased, but where steps are many and minima far apart a few draws near the ridges carry it
    all: its variance explodes, and a sample without such a draw looks precise and is wrong
    (docs/post-in-numbers.md). "score" weights each draw by the derivative of its log density (of
    the start, and of each noisy step given the point before), with a leave-one-out baseline.  It
    needs Langevin noise: a score for the start alone misses that the ridges between the basins move
    with theta0.

    Under `Unrolled` the end is theta_K, and either serves.  `Implicit` goes on from theta_K to the
    bottom of the basin that was reached, which moves by the implicit function theorem; the score
    says how the probability of reaching it changes.  What the way down from a ridge would add to
    that is left out, so the noise must have settled (`cooling`).

    num_steps: K; lr: the step size.
    start_scale: sd of the start around theta0, in units of the prior's sd (1: the start is a draw
        from the prior).
    temperature: T of the Langevin noise; 1 with small steps samples the task's posterior.
    batch_size: rows per inner step; None: all.
    num_draws: runs per task in each outer step.
    cooling: let the temperature fall linearly to T / K at the last step, so that the end settles
        into a basin.
    estimator: "auto" is "score" where temperature > 0, else "pathwise".

    Reference: Huszár (2019), "What is missing? Stochasticity"; Welling and Teh (ICML 2011) for the
    noisy steps; Kool et al. (2019) for the baseline.

    Raises ValueError for a number out of range, and where nothing is random.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian())
    >>> noisy = vm.StochasticAlg(num_steps=5, lr=0.001, start_scale=1.0)
    >>> found = vm.meta_gradient(model, tasks, vm.Stochastic(vm.Unrolled(inner_steps=1), noisy))
    >>> sorted(found.moving) == sorted(found.grads)
    True
    """

    num_steps: int = 50
    lr: float = 0.01
    start_scale: float = 0.0
    temperature: float = 0.0
    batch_size: int | None = None
    num_draws: int = 8
    cooling: bool = True
    estimator: Estimator = "auto"

    def __post_init__(self) -> None:
        no_tensors(self)
        for name in ("num_steps", "num_draws", "batch_size"):
            number = getattr(self, name)
            if number is not None and (
                isinstance(number, bool) or not isinstance(number, int) or number < 1
            ):
                raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}")
        if self.num_steps >= _STEPS_APART:
            raise ValueError(f"num_steps must be below {_STEPS_APART}, not {self.num_steps}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be a positive number, not {self.lr}")
        for name in ("start_scale", "temperature"):
            number = getattr(self, name)
            if not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"{name} must be a finite number of at least 0, not {number}")
        if not (self.start_scale or self.temperature or self.batch_size):
            raise ValueError(
                "nothing is random here: give start_scale, temperature or batch_size, or leave alg "
                "out"
            )
        one_of("estimator", self.estimator, ESTIMATORS)
        if self.estimator == "score" and not self.temperature:
            raise ValueError(
                "estimator='score' needs the density of Langevin noise: give temperature > 0"
            )
        if self.uses_score and self.num_draws < 2:
            raise ValueError(
                "the score's baseline is the mean of the other draws: give num_draws of at least 2"
            )

    @property
    def uses_score(self) -> bool:
        return self.estimator == "score" or (self.estimator == "auto" and self.temperature > 0)

    def noise_scale(self, k: int) -> float:
        """sqrt(2 lr T_k)."""
        left = 1.0 - k / self.num_steps if self.cooling else 1.0
        return math.sqrt(2.0 * self.lr * self.temperature * left)

    def one_draw(self, problem: Problem, batch: Batch, eta: Mapping[str, Tensor]) -> Tree:
        """Where one run ends, `(tasks, D)`: a sample of Alg, for adaptation."""
        return self.walk(problem, batch, eta, 0, graph=False, num_draws=1)[-1]

    def walk(
        self,
        problem: Problem,
        batch: Batch,
        eta: Mapping[str, Tensor],
        step: int,
        graph: bool,
        num_draws: int | None = None,
    ) -> list[Tree]:
        """phi after 0, 1, ..., K noisy steps.

        Every tensor is `(num_draws * tasks, D)`, one draw of all tasks after another.

        graph: keep the graph, so that the end can be differentiated with respect to eta; else the
            points carry none.
        """
        num_draws = self.num_draws if num_draws is None else num_draws
        many = batch.repeat(num_draws)
        with torch.set_grad_enabled(graph):
            here = problem.start(many, eta)
            if self.start_scale:
                prior = problem.model.prior_distribution(eta)
                spread = move(prior, self._normal(problem, batch, step, 0, num_draws)) - location(
                    prior
                )
                here = {"loc": here["loc"] + self.start_scale * spread}
        points = [here]
        for k in range(self.num_steps):
            losses = self._losses(problem, batch, many, step, k, num_draws)
            _, point, gradient = value_and_gradient(
                lambda phi: losses(phi, eta),  # noqa: B023
                here,
                graph,
            )
            here = add(point if graph else detach(point), gradient, -self.lr)
            if self.temperature:
                here = {
                    "loc": here["loc"]
                    + self.noise_scale(k) * self._normal(problem, batch, step, k + 1, num_draws)
                }
            points.append(here)
        return points

    def score(
        self,
        problem: Problem,
        batch: Batch,
        eta: dict[str, Tensor],
        step: int,
        points: list[Tree],
        weights: Tensor,
    ) -> dict[str, Tensor]:
        """sum_r weights_r d log q(walk r | eta) / d eta, by name.

        For the entries of eta that ask for a gradient.

        q is the density of the walk: of its start (where `start_scale` > 0) and of every noisy step
            given the point before.
        weights: `(num_draws * tasks,)`, constants.
        """
        num_draws = len(weights) // len(batch)
        many = batch.repeat(num_draws)
        names = [name for name in eta if eta[name].requires_grad]
        if not names:  # a value alone is asked for
            return {}
        total = {name: torch.zeros_like(eta[name]) for name in names}
        points = [detach(point) for point in points]
        for k in range(self.num_steps):
            with torch.enable_grad():
                # without a density of the start, the first step's mean moves with it
                here = points[k] if k or self.start_scale else problem.start(many, eta)
                losses = self._losses(problem, batch, many, step, k, num_draws)
                inner = lambda phi: losses(phi, eta)  # noqa: B023, E731
                _, point, gradient = value_and_gradient(inner, here, create_graph=True)
                miss = points[k + 1]["loc"] - (point["loc"] - self.lr * gradient["loc"])
                log_density = -0.5 * (miss / self.noise_scale(k)).square().sum(-1)
                if not k and self.start_scale:
                    prior = problem.model.prior_distribution(eta)
                    center = location(prior)
                    log_density = log_density + prior.log_prob(
                        center + (points[0]["loc"] - center) / self.start_scale
                    )
                found = torch.autograd.grad(
                    (weights * log_density).sum(),
                    [eta[name] for name in names],
                    allow_unused=True,
                    materialize_grads=True,
                )
            total = {name: total[name] + g for name, g in zip(names, found, strict=True)}
        return total

    def _normal(self, problem: Problem, batch: Batch, step: int, k: int, num_draws: int) -> Tensor:
        """N(0, I) for every row of the walk, `(num_draws * tasks, D)`."""
        like = batch.support.x
        address = _ALG + step * _STEPS_APART + k
        size = problem.model.weights.size
        return noise.normal(problem.seed, address, batch.ids, num_draws, size, like.dtype).reshape(
            -1, size
        )

    def _losses(
        self, problem: Problem, batch: Batch, many: Batch, step: int, k: int, num_draws: int
    ) -> Losses:
        """F_i for the k-th inner step: on all rows, or on the step's own minibatch."""
        if self.batch_size is None or self.batch_size >= batch.support.width:
            return problem.losses("elbo", many, step)
        address = _ALG + step * _STEPS_APART + k
        points = batch.support.width
        order = noise.uniform(problem.seed, address, batch.ids, num_draws, points).reshape(
            -1, points
        )
        # padding last, so that the first rows of the order are data as far as there are any
        chosen = order.masked_fill(~many.support.mask, 2.0).argsort(-1)[:, : self.batch_size]
        data = many.support.take_points(chosen)
        share = many.support.num_points / data.num_points.clamp(min=1)
        return problem.scaled_losses(data, share.to(many.support.like.dtype))


def leave_one_out(losses: Tensor) -> Tensor:
    """The weights of the score, `(draws, tasks)`.

    They are every draw's loss less the mean of the others, divided by the number of draws.

    >>> leave_one_out(torch.tensor([[1.0], [3.0]])).T
    tensor([[-1.,  1.]])
    """
    draws = len(losses)
    return (losses - losses.mean(0)) / (draws - 1)
