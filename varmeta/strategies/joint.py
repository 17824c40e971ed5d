"""`Joint`: phi is stored for every task, and phi and eta move together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from varmeta.graphs.pieces import at, run
from varmeta.guides.delta import Delta
from varmeta.guides.guide import Guide
from varmeta.guides.make import GuideName
from varmeta.models.kinks import kinked
from varmeta.numerics.first_order import Adam
from varmeta.numerics.minimize import FirstOrderMinimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.solution import Result, Solution
from varmeta.numerics.tree import Tree, detach, leaves, map_tree
from varmeta.strategies import closed_form
from varmeta.strategies.closed_form import ClosedForm
from varmeta.strategies.expectation import Point
from varmeta.strategies.prior_coordinates import minimize_in_prior_coordinates
from varmeta.strategies.problem import Losses, Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.tasks import Batch


@dataclass(frozen=True)
class Joint(Strategy):
    """Minimise sum_i F_i(phi_i, eta) over eta and every phi_i together: the post's M(theta0, Q_i).

    phi_i <- phi_i - step(dF_i/dphi_i),   eta <- eta - step(sum_i dF_i/deta)

    from one gradient of both.

    minimizer: None: `ClosedForm` where the model has one and the guide can be the posterior, so
        that phi is never stored; else the first-order rule for phi, by default Adam, while `fit`
        steps eta by torch.optim.  On small models `fit` replaces both by one Newton iteration on
        (phi, eta), unless an optimizer, batch size or budget is given.
    adapt_steps: steps of adaptation to new tasks where the expectation is by draws (else Newton, to
        tolerance).
    Reference: Amit and Meir (2018) for Gaussian guides; with a delta guide, Zhou et al. (2019),
        Meta-MinibatchProx.

    >>> import torch, varmeta as vm
    >>> tasks = vm.datasets.lines(9, 5, 5, noise=0.1, dtype=torch.float64)
    >>> prior = vm.GaussianPrior(learn_precision="shared")
    >>> model = vm.TaskModel(vm.LinearPredictor(["x"]), vm.likelihoods.Gaussian(), prior)
    >>> fit = vm.fit(model, tasks, vm.Joint("multivariate_normal"))
    >>> fit.converged, fit.log_likelihood is not None
    (True, True)
    """

    guide: GuideName | Guide | Callable[..., Any] = "normal"
    minimizer: FirstOrderMinimizer | ClosedForm | None = field(default=None, kw_only=True)
    adapt_steps: int = field(default=1000, kw_only=True)

    frozen = False
    usual: ClassVar[FirstOrderMinimizer] = Adam(lr=1e-2)

    @property
    def rule(self) -> FirstOrderMinimizer:
        """What moves phi where it is not known."""
        return self.usual if isinstance(self.minimizer, ClosedForm | None) else self.minimizer

    def traits(self, problem: Problem) -> Traits:
        if self._knows(problem):
            return Traits(noisy=False, closed_form=True, at_minimum=True)
        if problem.guide.at_mode:
            raise ValueError(
                f"{type(self).__name__} moves phi and eta down one objective, but this guide's "
                "evidence is defined at the mode, which does not minimise it: use "
                f"vm.Implicit({self.guide!r})"
            )
        return Traits(noisy=not problem.deterministic, stored=True)

    def _knows(self, problem: Problem) -> bool:
        return closed_form.chosen(self.minimizer, problem, self.expectation, self.outer)

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        if self._knows(problem):
            return State()
        phi = detach(problem.start(batch, eta))
        return State(phi, self.rule.init(phi))

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        if self._knows(problem):
            return closed_form.loss(self, problem, batch, eta, state)
        assert state.phi is not None and state.inner is not None
        phi = leaves(batch.of(state.phi))
        losses = problem.losses("elbo", batch, state.step)(phi, eta)
        names = [name for name in eta if eta[name].requires_grad]
        total = self.total(problem, batch, eta, losses)
        scale = batch.total / len(batch)
        gradients = torch.autograd.grad(
            total,
            [*phi.values(), *(eta[name] for name in names)],
            allow_unused=True,
            materialize_grads=True,
        )
        phi_gradient = dict(zip(phi, (g / scale for g in gradients), strict=False))
        factor = problem.pace(batch, self.rule, eta, phi).times(state.lr_scale)
        new, inner = self.rule.update(detach(phi), phi_gradient, batch.of(state.inner), factor)
        state = replace(
            state,
            phi=batch.into(state.phi, new),
            inner=batch.into(state.inner, inner),
            step=state.step + 1,
        )
        scalar = total.detach()
        for name, gradient in zip(names, gradients[len(phi) :], strict=True):
            # zero in value, `gradient` in derivative: eta's half of the one gradient that was taken
            scalar = scalar + (gradient * (eta[name] - eta[name].detach())).sum()
        return scalar, state, Stats(losses.detach(), 1.0)

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        if self._knows(problem):
            return closed_form.solution(problem, batch, eta)
        start = detach(problem.start(batch, eta))
        if problem.deterministic and kinked(problem.model, batch, eta) is None:
            inner = at(problem.losses("elbo", batch, 0), eta)
            found = minimize_in_prior_coordinates(problem, inner, eta, start, NewtonCG())
            if found is not None:
                return found
            return minimize(inner, start, NewtonCG(), units=problem.units(batch, start, eta))
        return _adapt_with_fresh_noise(problem, batch, eta, start, self.rule, self.adapt_steps)


def _adapt_with_fresh_noise(
    problem: Problem, batch: Batch, eta: Eta, phi: Tree, minimizer: FirstOrderMinimizer, steps: int
) -> Solution:
    """Stochastic descent on F_i, new draws at every step, the step size falling to zero.

    The location starts at the mode and moves in units of the prior's sd, so that it is reached in
    any units.
    """
    has_location = problem.has_location(phi)
    unit = {name: torch.ones_like(x) for name, x in phi.items()}
    origin = {name: torch.zeros_like(x) for name, x in phi.items()}
    if has_location:
        points = replace(problem, guide=Delta(), expectation=Point())
        point = {"loc": phi["loc"]}
        penalised = at(points.losses("elbo", batch, 0), eta)
        found = minimize(
            penalised, point, NewtonCG(), max_steps=100, units=points.units(batch, point, eta)
        )
        mode = torch.where(torch.isfinite(found.value["loc"]), found.value["loc"], phi["loc"])
        unit["loc"] = (
            problem.model.prior_distribution(eta).stddev.detach().expand_as(mode).contiguous()
        )
        origin["loc"], phi = mode, phi | {"loc": torch.zeros_like(mode)}
    move, pace = _NoisyStep(minimizer), problem.pace(batch, minimizer, eta, phi)
    one = batch.support.like.new_ones(len(batch))
    free, state, record = phi, minimizer.init(phi), []
    for step in range(steps):
        scale = pace.times(one * (1.0 - step / steps))
        losses, free, state = run(
            problem.losses("elbo", batch, step), move, free, state, scale, origin, unit, eta
        )
        record.append(losses)
    phi = map_tree(lambda o, u, x: o + u * x, origin, unit, free)
    result = torch.full((len(batch),), int(Result.STEP_LIMIT), device=losses.device)
    # a guide that ends above where it started, by more than the draws make of it, has not been
    # fitted
    tenth = max(2, steps // 10)
    first, last = torch.stack(record[:tenth]), torch.stack(record[-tenth:])
    chance = 3.0 * (first.var(0) + last.var(0)).sqrt() / tenth**0.5
    climbed = last.mean(0) > first.mean(0) + chance.clamp(min=0.1)
    result = torch.where(climbed, int(Result.DIVERGED), result) if steps >= 100 else result
    sound = torch.stack([torch.isfinite(x).reshape(len(x), -1).all(-1) for x in phi.values()]).all(
        0
    )
    result = torch.where(sound & torch.isfinite(record[-1]), result, int(Result.NON_FINITE))
    return Solution(phi, result, {"evaluations": torch.full_like(losses, float(steps)).detach()})


@dataclass(frozen=True)
class _NoisyStep:
    """The piece that is one step of phi = origin + unit * free."""

    rule: FirstOrderMinimizer

    def __call__(
        self,
        fn: Losses,
        free: Tree,
        state: Tree,
        lr_scale: Tensor | Tree,
        origin: Tree,
        unit: Tree,
        eta: Eta,
    ) -> tuple[Tensor, Tree, Tree]:
        point = leaves(free)
        with torch.enable_grad():
            losses = fn(map_tree(lambda o, u, x: o + u * x, origin, unit, point), eta)
            found = torch.autograd.grad(losses.sum(), list(point.values()))
        moved, state = self.rule.update(
            detach(point), dict(zip(point, found, strict=True)), state, lr_scale
        )
        return losses.detach(), moved, state
