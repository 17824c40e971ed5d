"""Several etas at once: a strategy in closed form under each member of an ensemble."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from varmeta.numerics.solution import Solution
from varmeta.strategies import closed_form
from varmeta.strategies.expectation import ExpectationName
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta, State, Stats, Strategy, Traits
from varmeta.tasks import Batch


@dataclass(frozen=True)
class Members(Strategy):
    """The sum of a strategy's objective over `number` etas, whose values have that leading axis.

    Nothing but the data is common to them, so that the gradient of the sum is each one's own, and
    an optimiser that moves number by number, as Adam does, moves each as if it were alone.

    strategy: one that knows phi (`ClosedForm`).
    """

    # what is the strategy's own is not asked for again
    guide: object = field(default="delta", init=False, repr=False)  # type: ignore[assignment]
    expectation: ExpectationName = field(default="auto", init=False, repr=False)
    num_particles: int = field(default=2, init=False, repr=False)
    strategy: Strategy
    number: int

    def losses(self, problem: Problem, batch: Batch, eta: Eta, step: int) -> Tensor:
        """G_i under every member, `(members, tasks)`, nats."""

        def one(eta: Eta) -> Tensor:
            return closed_form.losses(problem, self.strategy.outer, batch, step, eta)

        return torch.func.vmap(one)(eta)

    def totals(self, problem: Problem, batch: Batch, eta: Eta, losses: Tensor) -> Tensor:
        """Each member's objective, `(members,)`, nats; losses as above."""
        return torch.func.vmap(lambda e, row: self.strategy.total(problem, batch, e, row))(
            eta, losses
        )

    def loss(
        self, problem: Problem, batch: Batch, eta: Eta, state: State
    ) -> tuple[Tensor, State, Stats]:
        found = self.losses(problem, batch, eta, state.step)
        stats = Stats(found.detach().mean(0), float(self.number))
        total = self.totals(problem, batch, eta, found).sum()
        return total, replace(state, step=state.step + 1), stats

    def init(self, problem: Problem, batch: Batch, eta: Eta) -> State:
        return State()

    def adapt(self, problem: Problem, batch: Batch, eta: Eta) -> Solution:
        raise NotImplementedError("members adapt as a mixture: see `Ensemble`")

    def traits(self, problem: Problem) -> Traits:
        return replace(self.strategy.traits(problem), copies=self.number)
