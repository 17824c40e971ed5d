"""One bad task ends a fit: whatever strategy, guide and kind of bad data, what is said names the
task.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import varmeta as vm
from tests.cases import seeded
from varmeta.fitting import chunks
from varmeta.fitting.blame import drowning_at_start
from varmeta.strategies.problem import Problem
from varmeta.strategies.strategy import Eta
from varmeta.tasks import Batch

GAUSSIAN, POISSON = vm.likelihoods.Gaussian, vm.likelihoods.Poisson


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e3)


def first_order(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Newton, normal": (vm.Joint("normal"), {"num_steps": 20}),
    "Newton, delta": (vm.Joint("delta"), {"num_steps": 20}),
    "Newton, dense": (vm.Joint("multivariate_normal"), {"num_steps": 20}),
    "Newton, low rank": (vm.Joint(vm.guides.LowRank(rank=1)), {"num_steps": 10}),
    "Adam, normal": (vm.Joint("normal"), {"num_steps": 20, "optimizer": first_order}),
    "draws": (vm.Joint("normal", expectation="monte_carlo"), {"num_steps": 20}),
    "minibatch": (vm.Joint("normal"), {"num_steps": 20, "batch_size": 2}),
    "wild steps": (vm.Joint("normal"), {"num_steps": 60, "optimizer": sgd}),
    "reinit": (vm.Reinit("normal", every=10), {"num_steps": 20}),
    "implicit elbo": (vm.Implicit("normal"), {"num_steps": 5, "optimizer": first_order}),
    "implicit query": (vm.Implicit("delta", "query"), {"num_steps": 20}),
    "implicit, steps": (
        vm.Implicit("delta", "query", 5, vm.GradientDescent(0.01), on_unconverged="ignore"),
        {"num_steps": 20},
    ),
    "implicit predictive": (vm.Implicit("normal", "query_predictive"), {"num_steps": 10}),
    "laplace": (vm.Implicit("laplace"), {"num_steps": 10}),
    "unrolled": (vm.Unrolled("delta"), {"num_steps": 10}),
    "unrolled normal": (vm.Unrolled("normal", "query_elbo"), {"num_steps": 10}),
    "first order": (vm.FirstOrder("delta"), {"num_steps": 20}),
    "reptile": (vm.Reptile(), {"num_steps": 20}),
    "posterior of eta": (vm.Joint("multivariate_normal"), {"hyperguide": "multivariate_normal"}),
}
# likelihood, and what x and y of the bad task are multiplied by
KINDS: dict[str, tuple[type, float, float]] = {
    "huge x": (GAUSSIAN, 1e200, 1.0),
    "huge y": (GAUSSIAN, 1.0, 1e200),
    "a rate that overflows": (POISSON, 1e4, 1.0),
    "a huge count": (POISSON, 1.0, 1e300),
}
# where the fit is right, or goes on, without a word about a task, and why it may
FINE = {
    # the mode of a Poisson task with a large x exists, and Newton finds it
    ("Newton, delta", "a rate that overflows"),
    ("implicit elbo", "a rate that overflows"),
}
SLOW = (
    "posterior of eta",
    "a rate that overflows",
)  # half a minute of line searches, to the same sentence as a huge count


def tasks(kind: str) -> vm.TaskSet:
    likelihood, by_x, by_y = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(4):
        x = torch.randn(6, 1, generator=generator, dtype=torch.float64)
        y = x[:, 0] + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
        y = (3 * y.abs()).round() + 1 if likelihood is POISSON else y
        part = (x * by_x, y * by_y) if i == 2 else (x, y)
        made.append(
            vm.Task(
                part,
                (part[0] + 0.1 * part[0].abs(), part[1]),
                name="bad" if i == 2 else f"good {i}",
            )
        )
    return vm.TaskSet(made)


def told(model: vm.TaskModel, data: vm.TaskSet, strategy: Any, options: dict[str, Any]) -> str:
    """Everything that a fit says: its error, or its warnings and why it ended."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = vm.fit(model, data, strategy, **options).stop
        except ValueError as error:  # nothing else: no IndexError, no LinAlgError
            found = str(error)
    return "\n".join([found, *(str(one.message) for one in caught)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_the_bad_task_is_named(call: str, kind: str) -> None:
    if (call, kind) == SLOW:
        pytest.skip("the same as a huge count, in half a minute")
    strategy, options = CALLS[call]
    prior = (
        vm.GaussianPrior(learn_precision="shared")
        if "hyperguide" in options
        else vm.GaussianPrior(1.0)
    )
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), KINDS[kind][0](), prior)
    said = told(model, tasks(kind), strategy, options)
    if (call, kind) in FINE:
        return
    assert "'bad'" in said, said


def test_a_gradient_that_overflows_names_its_task() -> None:
    """The losses are finite, the gradient through the inner steps is not: 'eta is not finite at
    step 0' before.
    """
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), POISSON(), vm.GaussianPrior(1.0))
    with pytest.raises(
        ValueError, match="the gradient of task 'bad' is not finite at step 0: standardise"
    ):
        vm.fit(model, tasks("a rate that overflows"), vm.Unrolled("delta"), 10)


def test_nan_in_the_middle_of_training_names_its_task() -> None:
    """A network's own overflow, in one task alone, after some steps."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            out = self.line(x)
            # beyond |x| = 3 the root of what is left falls below 0 once the weight has moved
            return out + torch.where(
                x.abs() > 3.0, (1.05 - self.line.weight).sqrt() - 1.0, torch.zeros_like(x)
            )

    net = Edge()
    net.line.weight.data.fill_(0.0)
    x = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)[:, None]
    wide = torch.linspace(-4.0, 4.0, 5, dtype=torch.float64)[:, None]
    data = vm.TaskSet(
        [vm.Task((x, 3 * x[:, 0]), name="good")] * 1 + [vm.Task((wide, 3 * wide[:, 0]), name="bad")]
    )
    model = vm.TaskModel(net, GAUSSIAN(), vm.GaussianPrior(1.0))
    optimizer = lambda params: torch.optim.SGD(params, lr=5e-2)  # noqa: E731
    strategy = vm.Joint("delta", minimizer=vm.GradientDescent(lr=5e-2))
    with pytest.warns(
        RuntimeWarning,
        match="the loss of task 'bad' is not finite at step [1-9].*last step at which it was",
    ):
        fit = vm.fit(model, data, strategy, 40, optimizer)
    assert torch.isfinite(fit.eta["line.weight"]).all()


def test_one_task_in_whose_rounding_the_others_are_lost() -> None:
    """It was called converged, without a word, at a loss of 4e303 nats."""
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), POISSON(), vm.GaussianPrior(1.0))
    with pytest.warns(
        RuntimeWarning,
        match=r"the loss of task 'bad' is \d.*e\+30\d nats, in whose rounding the other tasks",
    ):
        vm.fit(model, tasks("a huge count"), vm.Joint("normal"), 60, first_order)


def test_such_a_task_at_the_start_is_looked_for_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), POISSON(), vm.GaussianPrior(1.0))
    data, strategy = tasks("a huge count"), vm.Joint("normal")
    problem, sizes = strategy.problem(model, data, 0), list[int]()
    whole = drowning_at_start(strategy, problem, data.batch(), 1e300)
    start = Problem.start

    def counted(self: Problem, batch: Batch, eta: Eta) -> Any:
        sizes.append(len(batch))
        return start(self, batch, eta)

    monkeypatch.setattr(chunks, "in_memory", lambda *_: 1)
    monkeypatch.setattr(Problem, "start", counted)
    assert whole is not None and whole == drowning_at_start(strategy, problem, data.batch(), 1e300)
    assert sizes == [1] * len(data)


def test_inner_steps_that_diverge_name_a_task() -> None:
    model = vm.TaskModel(seeded(lambda: nn.Linear(1, 1)), GAUSSIAN(), vm.GaussianPrior(1.0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 1, generator=generator, dtype=torch.float64)
    x[1] *= 30.0
    data = vm.TaskSet(
        [vm.Task((one, one[:, 0]), (one, one[:, 0]), name=f"task {i}") for i, one in enumerate(x)]
    )
    with pytest.warns(
        RuntimeWarning, match="the inner steps diverge for 1 task, 'task 1', whose loss they raise"
    ):
        vm.meta_gradient(model, data, vm.Unrolled("delta", minimizer=vm.GradientDescent(lr=0.05)))


@pytest.mark.parametrize(
    ("likelihood", "y", "told"),
    [
        (GAUSSIAN(), torch.tensor([0.0, 1.0, 0.0]), True),
        (vm.likelihoods.Categorical(2), torch.tensor([0, 1, 0]), False),
    ],
)
def test_of_a_squared_error_only_numbers_are_told(likelihood: Any, y: Any, told: bool) -> None:
    outputs = 1 if told else 2
    model = vm.TaskModel(nn.Linear(1, outputs), likelihood, vm.GaussianPrior(1.0))
    x = torch.tensor([[-90.0], [100.0], [110.0]])
    data = vm.TaskSet([vm.Task((x, y), (x, y))])
    steps = vm.Unrolled("delta", minimizer=vm.GradientDescent(1.0, per_point=True))
    with pytest.warns(RuntimeWarning, match="lower the minimizer's lr of 1") as said:
        vm.meta_gradient(model, data, steps)
    assert ("squared error" in str(said[0].message)) is told
