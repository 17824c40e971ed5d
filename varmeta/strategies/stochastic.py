"""`Stochastic`: an amortised strategy under an Alg that is a distribution."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from varmeta._checks import kind_of
from varmeta.guides.delta import Delta
from varmeta.models.model import TaskModel
from varmeta.numerics.adjoint import ImplicitAdjoint
from varmeta.numerics.solution import Solution
from varmeta.numerics.tree import Tree, detach
from varmeta.strategies.alg import StochasticAlg, leave_one_out
from varmeta.strategies.amortised import Amortised
from varmeta.strategies.expectation import ExpectationName
from varmeta.strategies.implicit import Implicit
from varmeta.strategies.objective import Outer
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.strategies.unrolled import Unrolled
from varmeta.tasks import Batch, TaskSet

DRAWS_ITS_OWN = "a StochasticAlg draws its own noise at every inner step"


@dataclass(frozen=True)
class Stochastic(Strategy):
    """E_{theta ~ Alg} G in place of G(phi*(eta)): the mean over draws of Alg.

    From where each draw ends `strategy` goes on.

    strategy: `Unrolled`, G where the noisy steps end, which take the place of its own; or
        `Implicit`, on to the minimum below, differentiated implicitly.  Under the delta guide.
    alg: see `StochasticAlg`.

    Raises ValueError or TypeError for what does not go together.

    >>> alg = StochasticAlg(temperature=0.5, num_draws=4)
    >>> Stochastic(Unrolled(), alg).describe()
    'Stochastic(Unrolled(delta, outer=query))'
    """

    # what is the strategy's own is not asked for again
    guide: object = field(default="delta", init=False, repr=False)  # type: ignore[assignment]
    expectation: ExpectationName = field(default="auto", init=False, repr=False)
    num_particles: int = field(default=2, init=False, repr=False)
    strategy: Amortised
    alg: StochasticAlg

    def __post_init__(self) -> None:
        if not isinstance(self.strategy, (Implicit, Unrolled)):
            raise TypeError(
                "Stochastic takes vm.Unrolled(...) or vm.Implicit(...) to go on from a draw, not "
                f"{kind_of(self.strategy)}"
            )
        if not isinstance(self.alg, StochasticAlg):
            raise TypeError(f"alg must be a StochasticAlg, not {kind_of(self.alg)}")
        if isinstance(self.strategy, Implicit):
            self._check_minimum(self.strategy)
        for name in ("guide", "expectation", "num_particles"):
            object.__setattr__(self, name, getattr(self.strategy, name))

    def _check_minimum(self, strategy: Implicit) -> None:
        if not self.alg.uses_score:
            raise ValueError(
                "Implicit takes the probability of reaching a minimum from the score of the "
                "Langevin noise, so its alg needs temperature > 0 and estimator='auto' or 'score': "
                "a score for the random start alone misses that the basins' boundaries move with "
                "theta0.  Stochastic(Unrolled(...), alg) serves every kind of noise"
            )
        if strategy.warm_start:
            raise ValueError(
                "warm_start and alg exclude each other: a draw of Alg starts at the prior"
            )

    @property
    def outer(self) -> Outer:
        return self.strategy.outer

    def describe(self) -> str:
        return f"Stochastic({self.strategy.describe()})"

    def problem(self, model: TaskModel, tasks: TaskSet, seed: int) -> Problem:
        return self.strategy.problem(model, tasks, seed)

    def traits(self, problem: Problem) -> Traits:
        if not isinstance(problem.guide, Delta):
            raise ValueError(
                "a StochasticAlg ends at points, so it goes with guide='delta', not "
                f"{self.guide!r}: a Gaussian guide is a distribution over weights already"
            )
        plain = self.strategy.traits(problem)
        graph = plain.not_captured or DRAWS_ITS_OWN
        return replace(plain, noisy=True, not_captured=graph, not_in_pieces=DRAWS_ITS_OWN)

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return self.strategy.init(problem, batch, eta)

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        alg, score = self.alg, self.alg.uses_score
        walk = alg.walk(problem, batch, detach(eta) if score else eta, state.step, graph=not score)
        many = batch.repeat(alg.num_draws)
        losses, stats = self.strategy.from_point(problem, many, eta, state, walk[-1])
        total = self.total(problem, batch, eta, self._mean(losses))
        if score:
            total = self._add_score(total, problem, batch, eta, state, walk, losses)
        steps = (4.0 if score else 3.0) * alg.num_steps
        stats = replace(
            stats,
            losses=self._mean(stats.losses),
            evaluations=alg.num_draws * (stats.evaluations + steps),
        )
        return total, replace(state, step=state.step + 1), stats

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        end = self.alg.one_draw(problem, batch, eta)
        return self.strategy.adapt_from_point(problem, batch, eta, end)

    def moving(
        self, problem: Problem, batch: Batch, eta: Eta, state: State, stats: Stats
    ) -> Tensor:
        """A scalar whose derivative is the part through how the ends of the draws move.

        Each end is taken as a minimum of F_i and differentiated implicitly; where it has no
        positive curvature nothing is counted.
        """
        assert stats.ends is not None
        inner, outer = self.strategy.objectives(problem, batch.repeat(self.alg.num_draws), state)
        solver = getattr(self.strategy, "linear_solver", None)
        losses, _ = ImplicitAdjoint(solver, certify=False)(inner, outer, stats.ends, eta)
        return self.total(problem, batch, eta, self._mean(losses))

    def _add_score(
        self,
        total: Tensor,
        problem: Problem,
        batch: Batch,
        eta: Eta,
        state: State,
        walk: list[Tree],
        losses: Tensor,
    ) -> Tensor:
        """`total`, whose derivative now also says how the probability of each draw changes; losses:
        one per draw and task.
        """
        weights = leave_one_out(losses.detach().reshape(self.alg.num_draws, -1)).reshape(-1)
        weights = weights * (batch.total / len(batch))
        found = self.alg.score(problem, batch, eta, state.step, walk, weights)
        for name, gradient in found.items():
            total = total + (gradient * (eta[name] - eta[name].detach())).sum()  # zero in value
        return total

    def _mean(self, losses: Tensor) -> Tensor:
        """Over the draws of Alg, `(tasks,)`."""
        return losses.reshape(self.alg.num_draws, -1).mean(0)
