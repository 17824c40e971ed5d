"""Can the tasks' jointly optimised posteriors be reached from the prior?

It is the post's doubt about the joint objective, measured.

The joint strategies move phi_i and theta0 together, so that phi_i may end in a basin that an inner
loop from theta0 would not find: "the final values of theta_i which we reach by jointly optimizing
over everything may not be reachable by doing SGD from theta0 from scratch" (Huszár 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from varmeta._checks import counted
from varmeta.display.shown import Shown
from varmeta.numerics.minimize import FirstOrderMinimizer, Minimizer, minimize
from varmeta.numerics.newton import NewtonCG
from varmeta.numerics.steps import value_and_gradient
from varmeta.numerics.tree import Tree, detach
from varmeta.results.result import Fit, training_tasks
from varmeta.strategies.joint import Joint

if TYPE_CHECKING:
    import pandas as pd

# Noisy objectives are compared by these many draws, the same for both ends.
DRAWS = 64


@dataclass(frozen=True, repr=False)
class Reachability(Shown):
    """By task: F_i at the stored phi_i, where Alg(f_i, theta0) ended, and the gap (nats).

    A gap above 0: the joint solution is better than what the inner loop reaches from the prior.
    Below 0: the inner loop finds a better one than the joint run had arrived at.
    alg: what was run from the prior, in words.

    >>> import torch
    >>> found = Reachability(("a", "b"), torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]), "Adam")
    >>> found
    <Reachability: 2 tasks, the largest gap 0.5 nats>
    """

    names: tuple[str, ...]
    stored: Tensor
    reached: Tensor
    alg: str

    @property
    def gap(self) -> Tensor:
        """reached - stored, `(tasks,)`, in nats."""
        return self.reached - self.stored

    def frame(self) -> pd.DataFrame:
        """One row per task: stored, reached, gap, in nats."""
        import pandas as pd

        columns = {"stored": self.stored, "reached": self.reached, "gap": self.gap}
        return pd.DataFrame(
            {name: value.tolist() for name, value in columns.items()},
            index=pd.Index(self.names, name="task"),
        )

    def plot(self, ax: Any = None) -> Any:
        """The gaps of all tasks, sorted; returns the matplotlib axes."""
        from varmeta.plot import plot_gaps

        return plot_gaps(self.gap, ax)

    def _headline(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        largest = float(self.gap.max())
        return (
            f"<Reachability: {counted(len(self.gap), 'task')}, the largest gap {largest:.3g} nats>"
        )

    def __str__(self) -> str:
        gap = self.gap.to(torch.float64)
        low, middle, high = torch.quantile(
            gap, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        ).tolist()
        worst = int(gap.argmax())
        return (
            f"reached from the prior by {self.alg}, {len(gap)} tasks: F is worse than at the "
            f"stored solution by {middle:.3g} nats in the median (10 % to 90 %: {low:.3g} to "
            f"{high:.3g}), at most by {float(gap[worst]):.3g} ({self.names[worst]!r}); by more "
            f"than 1 nat in {float((gap > 1).double().mean()):.0%} of tasks"
        )


def reachability(
    fit: Fit, minimizer: Minimizer | None = None, inner_steps: int | None = None
) -> Reachability:
    """How much worse F_i is at Alg(f_i, theta0) than at the stored phi_i.

    Alg starts from the learned prior.

    fit: by `Joint` or `Reinit`, whose tasks' posteriors are stored.
    minimizer, inner_steps: Alg.  By default Newton to tolerance; with noisy expectations the
        strategy's own rule for its `adapt_steps`, new draws at every step.

    Raises TypeError for a fit by another strategy, ValueError for a minimizer that noise does not
    allow, and where the tasks are not kept (a stream, a file without data).

    >>> import varmeta as vm
    >>> net = torch.nn.Linear(1, 1).double()
    >>> model = vm.TaskModel(net, vm.likelihoods.Gaussian(), vm.GaussianPrior())
    >>> fit = vm.fit(model, vm.datasets.lines(5, dtype=torch.float64), vm.Joint("normal"))
    >>> bool(vm.reachability(fit).gap.abs().max() < 1e-6)  # one basin: reached
    True
    """
    strategy, state, tasks = fit.strategy, fit.run.state, training_tasks(fit)
    known = isinstance(strategy, Joint) and strategy.traits(fit.problem).closed_form
    if not isinstance(strategy, Joint) or (state.phi is None and not known):
        raise TypeError(
            f"reachability compares with stored posteriors, and a fit by {type(strategy).__name__} "
            "stores none: use Joint or Reinit"
        )
    problem, batch = fit.problem, tasks.batch()
    start = detach(problem.start(batch, fit.eta))
    stored = strategy.adapt(problem, batch, fit.eta).value if state.phi is None else state.phi
    if problem.deterministic:
        rule = NewtonCG() if minimizer is None else minimizer
        inner, pace = problem.losses("elbo", batch, 0), problem.pace(batch, rule, fit.eta, start)
        end = minimize(
            lambda phi: inner(phi, fit.eta), start, rule, steps=inner_steps, **pace._asdict()
        ).value
    else:
        rule = strategy.rule if minimizer is None else minimizer
        if not isinstance(rule, FirstOrderMinimizer):
            raise ValueError(
                f"with noisy expectations Alg is a first-order rule, not {type(rule).__name__}"
            )
        inner_steps = strategy.adapt_steps if inner_steps is None else inner_steps
        end, moments = start, rule.init(start)
        pace = problem.pace(batch, rule, fit.eta, start)
        for step in range(inner_steps):
            noisy = problem.losses("elbo", batch, step)
            factor = pace.times(1.0 - step / inner_steps)
            _, point, gradient = value_and_gradient(
                lambda phi: noisy(phi, fit.eta),  # noqa: B023
                end,
            )
            end, moments = rule.update(detach(point), gradient, moments, factor)

    def value(phi: Tree) -> Tensor:
        draws = 1 if problem.deterministic else DRAWS
        with torch.no_grad():
            return torch.stack(
                [problem.losses("elbo", batch, -1 - k)(phi, fit.eta) for k in range(draws)]
            ).mean(0)

    many = "to tolerance" if inner_steps is None else f"{inner_steps} steps"
    return Reachability(batch.names, value(stored), value(end), f"{type(rule).__name__} ({many})")
